"""Which text a fuse is calibrated on, and which is kept aside to measure it."""

import random
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlx_fusekit.errors import ConfigurationError
from mlx_fusekit.progress import Progress
from mlx_fusekit.texts.data import TrainingData, data_file, read_sequences
from mlx_fusekit.texts.generate import generate_sequences
from mlx_fusekit.texts.items import Features
from mlx_fusekit.texts.sequences import (
    FEWEST_SEQUENCES,
    TokenSequence,
    derived_seed,
    enough_to_conclude,
    most_held_out,
    up_to,
)

#: Lends a model that is ready to run: one object can be base and teacher in turn.
ModelLoan = Callable[[], AbstractContextManager[nn.Module]]
#: What a base wrote, by the number of tokens that were asked for and the seed.
Written = MutableMapping[tuple[int, int], list[TokenSequence]]

#: Where text is from that no model wrote.
PACKAGED = "packaged general text"
#: Share of the text that is general, so that the behaviour away from the task is held too.
GENERAL_SHARE = 0.25
#: Share of the general text that is conversations; the adapter's task is mostly one too, so that
#: the base's plain text is the further away from it.
_GENERAL_CHAT_SHARE = 0.5


@dataclass(frozen=True)
class CalibrationText:
    """Text to calibrate on, and where it is from.

    Attributes:
        sequences: what to calibrate on, text of the task and general text mixed; every token
            counts, whatever a sequence says is scored.
        held_out: text of the task that is not among ``sequences``, to measure with; at least one
            sequence.
        source: where the text of the task is from, in words for the report.
        tokens: tokens in ``sequences``.
        general_tokens: those of them that are general text.
        general_source: where that is from, in words.
    """

    sequences: tuple[TokenSequence, ...]
    held_out: tuple[TokenSequence, ...]
    source: str
    tokens: int
    general_tokens: int
    general_source: str = "written by the base"


def calibration_text(
    *,
    teacher: ModelLoan,
    base: ModelLoan,
    tokenizer: Any,
    author: str = "base+adapter",
    file: Path | None = None,
    features: Sequence[Features] = (),
    training_data: Sequence[TrainingData] = (),
    tokens: int = 16384,
    general_share: float = GENERAL_SHARE,
    seed: int = 0,
    max_length: int = 512,
    written: Written | None = None,
    packaged: Path | None = None,
    progress: Progress | None = None,
) -> CalibrationText:
    """Choose, or generate, the calibration text.

    It is the user's file if there is one, else the adapter's training data, else what the teacher
    writes. General text that the base writes is added to each, so that the behaviour away from the
    task is held too: ``general_share`` of the whole, also where a file has less than its share.

    Args:
        teacher: lends base+adapter.
        base: lends the base.
        tokenizer: of both, as ``mlx_lm.load`` returns it.
        author: what the teacher is called.
        file: what the user wants to calibrate on, as :func:`read_sequences` reads it.
        features: keys that its text may have beside mlx-lm's own.
        training_data: what :func:`~mlx_fusekit.texts.data.training_data` found, of several adapters
            that of each; every one gets the same share.
        tokens: about how many to calibrate on. A fifth of it, at most 1024, is held out on top,
            and of long texts more, so that a measurement on them can conclude something.
        general_share: at least 0, below 1.
        seed: of all choices and samples; each part draws its own numbers.
        max_length: longest sequence from a file, in tokens.
        written: what this base wrote before, which is taken again, and added to.
        packaged: a file with text that takes the place of what models would write, where they
            cannot be run for that.
        progress: called with tokens generated, and to be generated in all; not called if none are.

    Raises:
        ConfigurationError: if ``file`` cannot be used, if the numbers make no sense, or if the
            model writes no text to calibrate on.
    """
    if not 0 <= general_share < 1:
        raise ConfigurationError(f"general share {general_share}: choose 0 or more, and below 1")
    if tokens < 1:
        raise ConfigurationError(f"calibration tokens {tokens}: choose 1 or more")
    held_out_tokens = most_held_out(tokens)
    task_tokens = max(1, round(tokens * (1 - general_share)))
    read = partial(
        read_sequences,
        tokenizer=tokenizer,
        max_length=max_length,
        tokens=task_tokens + held_out_tokens + FEWEST_SEQUENCES * max_length,
        seed=derived_seed(seed, "selection"),
    )
    source, pool = _from_a_file(read, file, features, training_data, author)
    task, held_out = _split(pool, task_tokens + held_out_tokens, held_out_tokens)

    # Both are zero where nothing is to be generated.
    general_tokens = _general_tokens(task, task_tokens, general_share)
    if packaged is not None:
        instead = _different(read(packaged, features=(Features(),)))
        if not task:
            source = PACKAGED
            task, held_out = _split(instead, task_tokens + held_out_tokens, held_out_tokens)
        elif not held_out:
            held_out = list(up_to(_without(instead, task), held_out_tokens))
        general = list(up_to(_without(instead, [*task, *held_out]), general_tokens))
        return _mixed(task, held_out, general, source, seed, PACKAGED)
    by_teacher = (0 if task else task_tokens) + (0 if held_out else held_out_tokens)
    write = partial(
        _write, tokenizer=tokenizer, seed=seed, progress=progress, total=by_teacher + general_tokens
    )
    by_it = write(teacher, "task", by_teacher)
    if not task:
        task, held_out = _split(by_it, None, held_out_tokens)
    elif not held_out:
        held_out = _without(by_it, task)
    if not task or not held_out:
        raise ConfigurationError(
            f"{author} writes no text to calibrate on; give it some with --calibration FILE"
        )
    known = {} if written is None else written
    if (general_tokens, seed) not in known:
        known[general_tokens, seed] = write(
            base, "general", general_tokens, by_teacher, chat_share=_GENERAL_CHAT_SHARE
        )
    general = known[general_tokens, seed]
    general = _without(general, [*task, *held_out])
    return _mixed(task, held_out, general, source, seed, "written by the base")


def _mixed(
    task: Sequence[TokenSequence],
    held_out: Sequence[TokenSequence],
    general: Sequence[TokenSequence],
    source: str,
    seed: int,
    general_source: str,
) -> CalibrationText:
    sequences = [*task, *general]
    random.Random(derived_seed(seed, "mixing")).shuffle(sequences)  # noqa: S311
    return CalibrationText(
        tuple(sequences),
        tuple(held_out),
        source,
        _count(sequences),
        _count(general),
        general_source,
    )


def _from_a_file(
    read: Callable[..., list[TokenSequence]],
    file: Path | None,
    features: Sequence[Features],
    training_data: Sequence[TrainingData],
    author: str,
) -> tuple[str, list[TokenSequence]]:
    """Where text is from, and different sequences of it: the user's file, or the training data.

    Without either there are none, and the source is who has to write them.
    """
    source = f"generated by {author}"
    if file is not None:
        sequences = read(file, features=(*features, Features()))
        return _short_name(data_file(file)), _different(sequences)
    pools, names = [], []
    for data in training_data:
        train = data_file(data.folder)
        try:
            pools.append(read(train, features=(data.features,)))
        except ConfigurationError as error:
            # The user did not ask for this file. The recipe tells the source, and no place of this
            # machine.
            why = str(error).replace(str(train), _short_name(train))
            return f"{source}, since its training data cannot be used: {why}", []
        names.append(_short_name(train))
    if not pools:
        return source, []
    whose = "the adapter's" if len(pools) == 1 else "the adapters'"
    return f"{whose} training data ({', '.join(names)})", _different(_in_turn(pools))


def _in_turn(pools: Sequence[Sequence[TokenSequence]]) -> list[TokenSequence]:
    """Sequences of all pools, such that each pool has about as many tokens up to every place."""
    left, taken = [list(pool) for pool in pools], [0] * len(pools)
    found = []
    while any(left):
        place = min((p for p in range(len(left)) if left[p]), key=lambda p: taken[p])
        found.append(left[place].pop(0))
        taken[place] += len(found[-1].tokens)
    return found


def _write(
    loan: ModelLoan,
    part: str,
    tokens: int,
    before: int = 0,
    *,
    tokenizer: Any,
    seed: int,
    progress: Progress | None,
    total: int,
    **options: Any,
) -> list[TokenSequence]:
    """What a model writes, as ``before + tokens`` of ``total``; nothing is lent for no tokens."""
    if not tokens:
        return []
    with loan() as model:
        return generate_sequences(
            model,
            tokenizer,
            tokens=tokens,
            seed=derived_seed(seed, part),
            progress=progress and (lambda done, _: progress(before + done, total)),
            **options,
        )


def _different(sequences: Sequence[TokenSequence]) -> list[TokenSequence]:
    return list(dict.fromkeys(sequences))


def _split(
    pool: Sequence[TokenSequence], tokens: int | None, held_out_tokens: int
) -> tuple[list[TokenSequence], list[TokenSequence]]:
    """The pool's sequences to calibrate on, at least one if it has any, and those to hold out.

    A small pool keeps a sixth aside, the same share as of a large one. Where nothing could be
    concluded from that, more is held out of what the pool has beyond ``tokens``, or else up to a
    quarter of it.
    """
    task = list(up_to(pool, tokens))
    spare, total = list(pool[len(task) :]), _count(task)
    aside = min(held_out_tokens, total // 6)
    held_out: list[TokenSequence] = []
    while len(task) > 1 and (not held_out or _count(held_out) < aside):
        held_out.append(task.pop())
    while spare and not enough_to_conclude(held_out):
        held_out.append(spare.pop(0))
    more = list(held_out)
    for sequence in reversed(task[1:]):
        if enough_to_conclude(more) or _count(more) + len(sequence.tokens) > total // 4:
            break
        more.append(sequence)
    if enough_to_conclude(more):
        task, held_out = task[: len(task) - len(more) + len(held_out)], more
    return task, held_out


def _without(
    sequences: Sequence[TokenSequence], others: Sequence[TokenSequence]
) -> list[TokenSequence]:
    """The sequences that have not the same tokens as any of the others."""
    known = {other.tokens for other in others}
    return [sequence for sequence in sequences if sequence.tokens not in known]


def _general_tokens(task: Sequence[TokenSequence], task_tokens: int, share: float) -> int:
    """General tokens to add, so that they are ``share`` of the whole."""
    have = min(_count(task), task_tokens) if task else task_tokens
    return round(have * share / (1 - share))


def _short_name(file: Path) -> str:
    return f"{file.parent.name}/{file.name}" if file.parent.name else file.name


def _count(sequences: Sequence[TokenSequence]) -> int:
    return sum(len(sequence.tokens) for sequence in sequences)
