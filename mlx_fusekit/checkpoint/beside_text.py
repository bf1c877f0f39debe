"""What a checkpoint holds beside the text model that mlx-lm runs: vision, sound, further heads.

mlx-lm's classes drop such tensors when they load a model, and would again. They are told from
those that something is computed from, whatever they are called.
"""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mlx_fusekit.checkpoint.mlx_lm import MLX_LM_ERRORS, builds

if TYPE_CHECKING:
    import mlx.core as mx

    Weights = dict[str, mx.array]
    Sanitize = Callable[[Weights], Weights]

#: Settings of what is not text.
_PROMISES = re.compile(r"(vision|visual|image|video|audio|mm|mtp|boi|eoi|boa|eoa)_\w+|.*nextn.*")
_NAMED = 4


def dropped(before: "Mapping[str, mx.array]", sanitize: "Sanitize") -> dict[str, str | None]:
    """The arrays that a class's ``sanitize`` drops, and the names it would drop them under again.

    Args:
        before: the stored arrays, lazy.
        sanitize: of mlx-lm's class.

    Returns:
        By stored name, the name to keep it under beside the converted tensors; None where a
        converted model would not load with it.
    """
    import mlx.core as mx

    # Some classes multiply in place, and these arrays are going to be the model's.
    before = {name: mx.array(array) for name, array in before.items()}
    after = sanitize(dict(before))
    unused = _unused(before, after)
    groups: dict[str, list[str]] = {}
    for name in unused:
        groups.setdefault(_stem(name), []).append(name)
    return {
        name: kept
        for group in groups.values()
        for name, kept in _kept_names(before, after, group, sanitize)
    }


def _kept_names(
    before: "Mapping[str, mx.array]",
    after: "Mapping[str, mx.array]",
    names: list[str],
    sanitize: "Sanitize",
) -> Iterator[tuple[str, str | None]]:
    """Names under which a converted model loads the same with these arrays as without.

    Several classes drop ``visual`` and not ``model.visual`` where the text has MLX's names; both
    are names that transformers knows, of older checkpoints and newer ones.
    """
    for prefix in ("", "model."):
        kept = {name: name.removeprefix(prefix) for name in names}
        if _harmless({kept[name]: before[name] for name in names}, after, sanitize):
            yield from kept.items()
            return
    yield from dict.fromkeys(names).items()


def _unused(before: "Mapping[str, mx.array]", after: "Mapping[str, mx.array]") -> frozenset[str]:
    """Names of the arrays that are no result, and that no result is computed from."""
    import mlx.core as mx

    results = {id(array) for array in after.values()}
    candidates = [name for name, array in before.items() if id(array) not in results]
    stored = {id(array) for array in before.values()}
    computed = [array for array in after.values() if id(array) not in stored]
    if not candidates or not computed:
        return frozenset(candidates)
    # An array that is both has the name it is given last, so that it is no candidate any more.
    named = {f"c{place}": before[name] for place, name in enumerate(candidates)}
    named |= {f"r{place}": array for place, array in enumerate(computed)}
    graph = io.StringIO()
    mx.export_to_dot(graph, **named)
    text = graph.getvalue()
    read = set(re.findall(r'"c(\d+)" ->', text))
    there = set(re.findall(r'"c(\d+)"', text))
    return frozenset(
        name
        for place, name in enumerate(candidates)
        if str(place) in there and str(place) not in read
    )


def _harmless(
    beside: "Mapping[str, mx.array]", after: "Mapping[str, mx.array]", sanitize: "Sanitize"
) -> bool:
    """Whether a converted model loads the same with these arrays beside it as without."""
    if set(beside) & set(after):
        return False
    try:
        without, having = sanitize(dict(after)), sanitize({**after, **beside})
    except MLX_LM_ERRORS:
        return False
    return set(without) == set(having) and all(
        (having[name] is after.get(name)) == (array is after.get(name))
        for name, array in without.items()
    )


def text_only(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what it says of vision, sound and further heads.

    What mlx-lm cannot build the text model without stays.
    """
    kept = _without_promises(config, builds)
    if isinstance(text := kept.get("text_config"), dict):
        kept["text_config"] = _without_promises(
            text, lambda shorter: builds({**kept, "text_config": shorter})
        )
    return kept


def _without_promises(
    settings: Mapping[str, Any], suffices: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    kept = dict(settings)
    for key in settings:
        shorter = {name: value for name, value in kept.items() if name != key}
        if _PROMISES.fullmatch(key) and suffices(shorter):
            kept = shorter
    return kept


def is_text_only(config: Mapping[str, Any], of: Mapping[str, Any]) -> bool:
    """Whether a configuration promises nothing more than text, where its base's does."""
    cut = text_only(of)
    return cut != dict(of) and not (set(config) & (set(of) - set(cut)))


def in_words(names: Iterable[str]) -> str:
    """Names of tensors, summed up: ``model.visual (12), mtp (3)``."""
    stems = Counter(_stem(name) for name in names).most_common()
    more = ", ..." if len(stems) > _NAMED else ""
    return ", ".join(f"{stem} ({count})" for stem, count in stems[:_NAMED]) + more


def _stem(name: str) -> str:
    parts = name.split(".")
    return ".".join(parts[:2] if parts[0] in ("model", "language_model") else parts[:1])
