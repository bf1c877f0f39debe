"""Tokens with a role: where text begins and ends, and where the model stops."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.gguf.tokenizer.tokenizer_files import Json, TokenizerFiles, steps

#: Texts that end a turn, as llama.cpp knows them.
_END_OF_TURN = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|END_OF_TURN_TOKEN|>",
    "<|return|>",
    "<|user|>",
    "<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<|eot|>",
    "<|EOT|>",
)
_END_OF_MESSAGE = "<|eom_id|>"
#: Texts that llama.cpp stops at by itself.
_KNOWN_TO_STOP = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    _END_OF_MESSAGE,
    "<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that have a role, None where no token has it.

    Attributes:
        bos: begins a text.
        eos: ends a text.
        eot: ends a turn.
        eom: ends a message, or else also stops the model.
        unk: stands for what has no token.
        pad: fills.
        add_bos: whether a text gets ``bos`` in front.
        add_eos: whether a text gets ``eos`` at its end.
        stops: every token that the model stops at.
        notes: what llama.cpp will do otherwise.
    """

    bos: int | None
    eos: int | None
    eot: int | None
    eom: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    stops: tuple[int, ...]
    notes: tuple[str, ...] = ()


def special_tokens(
    files: TokenizerFiles, ids: Mapping[str, int], rows: int, *, adds_bos: bool
) -> SpecialTokens:
    """Roles from the settings, the generation configuration and the configuration.

    Args:
        files: of the tokenizer.
        ids: of all tokens by their text.
        rows: of the embedding.
        adds_bos: whether a text gets a beginning where no file says.

    Raises:
        CheckpointError: for an id beyond the embedding, or a role of an unknown token.
    """
    before, after = _template(files)
    bos = _first(_ids(files, "bos", ids, rows, settings_first=True))
    if bos is None and len(before or ()) == 1:
        bos = ids.get((before or [""])[0])
    stops = tuple(_ids(files, "eos", ids, rows, settings_first=False))
    eos, *others = stops or (None,)
    texts = {token_id: text for text, token_id in ids.items()}
    eot = next((i for i in stops if texts.get(i) in _END_OF_TURN), None)
    eom = next((i for i in others if texts.get(i) == _END_OF_MESSAGE), None)
    left = [i for i in others if i not in (eot, eom) and texts.get(i) not in _KNOWN_TO_STOP]
    if eom is None and left:
        eom = left.pop(0)
    notes = [f"llama.cpp does not stop at {texts.get(i, i)!r}" for i in left]
    if before is None:
        add_bos = bool(files.settings.get("add_bos_token", adds_bos))
        add_eos = bool(files.settings.get("add_eos_token", False))
    else:
        add_bos = before == [texts.get(bos)] if bos is not None else False
        add_eos = after == [texts.get(eos)] if eos is not None else False
        notes += _template_notes(before, add_bos, "before")
        notes += _template_notes(after, add_eos, "after")
    return SpecialTokens(
        bos,
        eos,
        eot,
        eom,
        _first(_ids(files, "unk", ids, rows, settings_first=True)),
        _first(_ids(files, "pad", ids, rows, settings_first=True)),
        add_bos and bos is not None,
        add_eos and eos is not None,
        stops,
        tuple(notes),
    )


def _ids(
    files: TokenizerFiles, role: str, ids: Mapping[str, int], rows: int, *, settings_first: bool
) -> list[int]:
    """Ids that any file gives a role, each once, the most telling first."""
    named = list(_named_id(files, role, ids))
    listed = [
        token_id
        for name, block in _configurations(files)
        for token_id in _listed_ids(files, name, f"{role}_token_id", block, rows)
    ]
    return list(dict.fromkeys(named + listed if settings_first else listed + named))


def _named_id(files: TokenizerFiles, role: str, ids: Mapping[str, int]) -> Iterator[int]:
    text = files.role_text(role)
    if text is None and role == "unk":
        text = files.model.get("unk_token")
    if text is None:
        return
    if text in ids:
        yield ids[text]
    elif role in ("bos", "eos"):
        raise CheckpointError(
            f"{files.folder / 'tokenizer_config.json'}: {role}_token {text!r} is none of the "
            "tokenizer's tokens; correct it, or download the model again"
        )


def _configurations(files: TokenizerFiles) -> Iterator[tuple[str, Json]]:
    yield "generation_config.json", files.generation
    yield "config.json", files.config
    text = files.config.get("text_config")
    if isinstance(text, dict):
        yield "config.json", text


def _listed_ids(
    files: TokenizerFiles, name: str, key: str, block: Json, rows: int
) -> Iterator[int]:
    value: Any = block.get(key)
    for token_id in value if isinstance(value, list) else [value]:
        if token_id is None:
            continue
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < rows:
            if key == "pad_token_id" and type(token_id) is int:
                continue  # -1 for none, or a token that only the tokenizer has
            raise CheckpointError(
                f"{files.folder / name}: {key} is {token_id!r}, but the embedding has {rows} "
                "rows; correct the file"
            )
        yield token_id


def _template(files: TokenizerFiles) -> tuple[list[str] | None, list[str]]:
    """Texts of the tokens that ``tokenizer.json`` puts before and after a text; None: no word."""
    before: list[str] | None = None
    after: list[str] = []
    for step in steps((files.tokenizer or {}).get("post_processor"), "processors"):
        if step.get("type") == "TemplateProcessing":
            before, after = [], []
            target = before
            for part in step.get("single") or ():
                if "Sequence" in part:
                    target = after
                else:
                    target.append(str((part.get("SpecialToken") or {}).get("id")))
        elif step.get("type") in ("RobertaProcessing", "BertProcessing"):
            before, after = [str(step["cls"][0])], [str(step["sep"][0])]
    return before, after


def _template_notes(texts: list[str], covered: bool, where: str) -> Iterator[str]:
    if texts and not covered:
        yield f"llama.cpp does not put {' '.join(texts)} {where} a text"


def _first(ids: list[int]) -> int | None:
    return ids[0] if ids else None
