"""The prompts that every arm gets."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.texts.chat import TEMPLATE_ERRORS
from mlx_fusekit.texts.sequences import derived_seed

#: What configurations call the most tokens that a model was made for.
_CONTEXT_KEYS = ("max_position_embeddings", "max_sequence_length", "n_positions", "n_ctx")
#: Characters of a prompt; a million tokens have about so many.
_LONGEST_PROMPT = 4_000_000


@dataclass(frozen=True)
class Shape:
    """How much is processed and generated in a trial.

    Attributes:
        prompt_tokens: of each prompt.
        generation_tokens: of each sequence.
        batch_size: sequences that run together.
    """

    prompt_tokens: int
    generation_tokens: int
    batch_size: int = 1

    def __str__(self) -> str:
        """As ``p512 g128``, with the batch where there is one."""
        batch = f" b{self.batch_size}" if self.batch_size > 1 else ""
        return f"p{self.prompt_tokens} g{self.generation_tokens}{batch}"


def random_prompts(
    shape: Shape, vocabulary: int, special: Collection[int], seed: int
) -> list[list[int]]:
    """Random token ids, ``[batch][prompt]``, the same for the same seed on every machine.

    Args:
        shape: how many.
        vocabulary: ids are below it.
        special: ids that stand for no text, which are left out.
        seed: of the choice.
    """
    allowed = np.setdiff1d(np.arange(vocabulary), np.fromiter(special, np.int64, len(special)))
    draw = np.random.default_rng(derived_seed(seed, f"prompts/{shape}"))
    chosen = draw.choice(allowed, (shape.batch_size, shape.prompt_tokens))
    return [[int(token) for token in row] for row in chosen]


def text_prompt(text: str, tokenizer: Any) -> list[int]:
    """A user's message through the chat template, or as plain text where there is none.

    Raises:
        ConfigurationError: when nothing comes of it, or too much.
        CheckpointError: when it becomes tokens that the model has no rows for.
    """
    tokens: Sequence[int] = []
    if len(text) > _LONGEST_PROMPT:
        raise ConfigurationError(
            f"--prompt: {len(text)} characters are more than any model has places for; give at "
            f"most {_LONGEST_PROMPT}"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigurationError("--prompt: not UTF-8 text; convert it to UTF-8") from error
    if getattr(tokenizer, "has_chat_template", False):
        try:
            tokens = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
            )
        except CheckpointError:  # of the tokenizer
            raise
        except TEMPLATE_ERRORS as error:
            raise ConfigurationError(
                f"--prompt: the chat template cannot render it ({error})"
            ) from error
    else:
        tokens = tokenizer.encode(text)
    if not tokens:
        raise ConfigurationError("--prompt: give a prompt that is not empty")
    return [int(token) for token in tokens]


def vocabulary_size(config: Mapping[str, Any]) -> int | None:
    """How many token ids a model knows, as its config says."""
    found = _of_text(config, ("vocab_size",))
    return found[1] if found else None


def check_context(config: Mapping[str, Any], shape: Shape, name: str) -> None:
    """Refuse more tokens than a model has places for.

    Raises:
        ConfigurationError: naming the limit.
    """
    found = _of_text(config, _CONTEXT_KEYS)
    needed = shape.prompt_tokens + shape.generation_tokens
    if found and needed > found[1]:
        raise ConfigurationError(
            f"-p {shape.prompt_tokens} -g {shape.generation_tokens}: {needed} tokens are more than "
            f"the {found[1]} that {name} has places for ({found[0]}); ask for fewer"
        )


def _of_text(config: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, int] | None:
    for text in (config, config.get("text_config") or {}):
        for key in keys:
            if isinstance(text.get(key), int):
                return key, text[key]
    return None
