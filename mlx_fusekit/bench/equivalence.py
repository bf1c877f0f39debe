"""Whether the arms that are timed say the same, so that nobody compares a fast wrong model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.nn as nn

from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.parity import compare


@dataclass(frozen=True)
class Equivalence:
    """How close an arm is to the reference arm on the text that the reference generated.

    Attributes:
        same_tokens: share of the generated tokens before the first difference, 1 for the same text.
        top1_agreement: share of positions with the same most likely token, given the same text.
        kl_mean: mean KL divergence from the reference in nats a token, given the same text.
    """

    same_tokens: float
    top1_agreement: float
    kl_mean: float


def equivalence(
    models: Mapping[str, nn.Module],
    reference: str,
    prompts: Sequence[Sequence[int]],
    tokens: Mapping[str, Sequence[Sequence[int]]],
) -> dict[str, Equivalence]:
    """Compare what arms generated, and how likely each finds the reference's text.

    Args:
        models: by arm.
        reference: which arm's text counts.
        prompts: token ids, one each sequence.
        tokens: generated ids by arm, one each sequence.
    """
    texts = tokens[reference]
    sequences = [
        TokenSequence((*prompt, *text), len(prompt))
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    others = {name: model for name, model in models.items() if name != reference}
    measured = compare(models[reference], others, sequences) if others else {}
    found = {reference: Equivalence(1.0, 1.0, 0.0)}
    for name, parity in measured.items():
        same = sum(_common(text, own) for text, own in zip(texts, tokens[name], strict=True))
        share = same / sum(len(text) for text in texts)
        found[name] = Equivalence(share, parity.top1_agreement, parity.kl_mean)
    return {name: found[name] for name in models}


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts have in common at their start."""
    pairs = zip(first, second, strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(first))
