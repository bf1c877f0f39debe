"""Token ids from tokenizers of strangers, looked at before a model gets them.

For an id that an embedding has no row for, MLX reads the memory behind it and says nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_fusekit.errors import CheckpointError

#: Text of many kinds: what fails at one of them would fail after minutes of work. At the last of
#: them regular expressions take forever, if they can.
_TRIAL = f"The quick brown fox:\n\t42 jumps, été 名前 \U0001f600 {'a' * 40}!"
_CURE = "download the model again, with its tokenizer"
_LONGEST_WHY = 300


def token_rows(model: Any, config: Mapping[str, Any]) -> int | None:
    """How many token ids a model has rows for; None where it does not tell.

    That is what its configuration says, if an embedding has so many rows; else those of the
    largest: places are counted in embeddings too.

    Args:
        model: mlx-lm's, or what is called as one.
        config: of the model; may be empty.
    """
    if not isinstance(model, nn.Module):
        return None
    kinds = nn.Embedding | nn.QuantizedEmbedding
    rows = {
        int(module.weight.shape[0])
        for _, module in model.named_modules()
        if isinstance(module, kinds)
    }
    text = config.get("text_config")
    stated = (config, text if isinstance(text, dict) else {})
    sizes = [block.get("vocab_size") for block in stated]
    return next((size for size in sizes if size in rows), max(rows, default=None))


def guard_tokenizer(tokenizer: Any, folder: Path, rows: int | None = None) -> None:
    """Try a tokenizer out on a short text, and let it hand out no id that a model has no row for.

    From then on its ``encode`` and ``decode`` raise CheckpointError also where its Rust code gives
    up, as for a regular expression that takes too many steps.

    Args:
        tokenizer: as ``mlx_lm.load`` returns it.
        folder: where it was loaded from.
        rows: token ids of the model are below it; None where no model is known.

    Raises:
        CheckpointError: naming the folder and what is wrong.
    """
    wrapped: Any = getattr(tokenizer.encode, "__self__", None)  # transformers', in mlx-lm's
    guarded = _Guarded(wrapped if wrapped is not None else tokenizer, folder, rows)
    if wrapped is not None:
        wrapped.encode, wrapped.decode = guarded.encode, guarded.decode
    tokens = guarded.encode(_TRIAL)
    if not tokens:
        raise CheckpointError(f"{folder}: its tokenizer gives no tokens for a text; {_CURE}")
    if not isinstance(guarded.decode(tokens), str):
        raise CheckpointError(f"{folder}: its tokenizer gives no text for tokens; {_CURE}")
    for name in ("bos_token", "eos_token"):
        token = getattr(tokenizer, f"{name}_id")
        if token is not None:
            guarded.check([token], f"as {name}")


class _Guarded:
    """The two ways between text and token ids."""

    def __init__(self, tokenizer: Any, folder: Path, rows: int | None) -> None:
        self._encode, self._decode = tokenizer.encode, tokenizer.decode
        self._folder, self._rows = folder, rows

    def encode(self, text: Any, *args: Any, **options: Any) -> Any:
        """Token ids, each with a row."""
        with told_in_a_line(self._folder):
            tokens = self._encode(text, *args, **options)
        self.check(tokens, "for a text")
        return tokens

    def decode(self, tokens: Any, *args: Any, **options: Any) -> Any:
        """Text."""
        with told_in_a_line(self._folder):
            return self._decode(tokens, *args, **options)

    def check(self, tokens: Any, what: str) -> None:
        """Refuse what is no token id of the model."""
        for token in tokens:
            if type(token) is not int or token < 0:
                raise CheckpointError(
                    f"{self._folder}: its tokenizer gives {token!r} {what}, which is no token id; "
                    f"{_CURE}"
                )
            if self._rows is not None and token >= self._rows:
                raise CheckpointError(
                    f"{self._folder}: its tokenizer gives token {token} {what}, and the model's "
                    f"embedding has {self._rows} rows; they do not belong together; {_CURE}"
                )


@contextmanager
def told_in_a_line(folder: Path, what: str = "does not work", cure: str = _CURE) -> Iterator[None]:
    """What a tokenizer's own code raises as CheckpointError, panics of its Rust code among it."""
    try:
        yield
    except CheckpointError:
        raise
    except BaseException as error:
        # pyo3's class of panics, which cannot be imported, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = " ".join(str(error).split())[:_LONGEST_WHY] or type(error).__name__
        raise CheckpointError(f"{folder}: its tokenizer {what} ({why}); {cure}") from error
