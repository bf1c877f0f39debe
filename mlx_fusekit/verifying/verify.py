"""Verifying: how close a fused model, read back from disk, is to base and adapter unmerged.

The reference is base+adapter as mlx-lm runs it. The base alone is measured beside the fused model,
so that one sees how much of the way from base to fine-tune the fused model has gone.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_fusekit import hub
from mlx_fusekit.adapters import AdapterFolder
from mlx_fusekit.adapters.sources import adapter_choices, open_bound
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.progress import StepProgress, of_step
from mlx_fusekit.running.model import MEMORY_SHARE, RunningModel, run_adapted, run_model
from mlx_fusekit.texts.data import read_sequences
from mlx_fusekit.texts.generate import generate_sequences
from mlx_fusekit.texts.seeds import derived_seed
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.options import MAX_TOKENS
from mlx_fusekit.verifying.parity import Model, Parity, Variant, compare
from mlx_fusekit.verifying.structure import (
    Check,
    check_no_adapter,
    check_same_model,
    check_structure,
)


@dataclass(frozen=True)
class ParityReport:
    """How close a fused model is to its reference, and whether that is close enough.

    KL is KL(reference || model) in nats at each scored token. Measures of the base are None when
    the reference is no base with an adapter, exact match is None when the data hold no answers.
    Numbers of a model that gives NaN are NaN, and None in :meth:`as_json`.

    Attributes:
        fused: Hub id or folder name of the model that was judged.
        reference: that of the reference, of the base where an adapter makes it the reference.
        revision: the commit of a reference from the Hub.
        adapters: what was put on the base, unmerged; empty with another reference.
        kl_mean: mean over all scored tokens; ``max_kl`` bounds it.
        kl_p99: 99 % of the tokens stay below.
        top1_agreement: share of the tokens where both models have the same arg-max.
        perplexity_fused: of the actual tokens.
        recovered: 1 - KL(fused) / KL(base): 1 is the reference, 0 no better than the base.
        exact_match_fused: share of the answers whose every token is the arg-max.
        tokens: how many were scored.
        data: where the text came from.
        float32: whether all weights were run as float32, so that kernels' rounding is left out.
        structure: checks of the fused model's files.
        passed: the structure is in order, all numbers are finite, and KL is at most ``max_kl``.
    """

    fused: str
    reference: str
    revision: str | None
    adapters: tuple[str, ...]
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_base_mean: float | None
    kl_base_median: float | None
    kl_base_p99: float | None
    top1_agreement: float
    top1_agreement_base: float | None
    perplexity_reference: float
    perplexity_fused: float
    perplexity_base: float | None
    exact_match_reference: float | None
    exact_match_fused: float | None
    exact_match_base: float | None
    recovered: float | None
    tokens: int
    sequences: int
    data: str
    seed: int
    float32: bool
    max_kl: float | None
    structure_ok: bool
    structure: tuple[Check, ...]
    passed: bool
    seconds: float
    warnings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object; numbers that are not finite are None."""
        values = asdict(self)
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }


@dataclass(frozen=True)
class _Reference:
    """What the fused model is compared with.

    Attributes:
        running: with its adapter, if there is one.
        folder: of the reference, or of its base.
        adapters: names of the adapters.
        checks: of the fused model's files.
        author: who wrote the text when none is given.
    """

    running: RunningModel
    folder: hub.LocalFolder
    adapters: tuple[str, ...]
    checks: tuple[Check, ...]
    warnings: tuple[str, ...]
    author: str


def verify(
    model: str | Path | None,
    adapter_path: str | Path | Sequence[str | Path] | None,
    fused: str | Path,
    *,
    reference: str | Path | None = None,
    data: str | Path | None = None,
    max_kl: float | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: StepProgress | None = None,
) -> ParityReport:
    """Compare a fused model, read back from disk, with base and adapter as mlx-lm runs them.

    Args:
        model: folder or Hub id of the base.
        adapter_path: as for :func:`mlx_fusekit.fuse`.
        fused: folder or Hub id of the fused model, whoever made it; or a GGUF file made of it,
            which runs in llama.cpp (the ``llamacpp`` extra).
        reference: folder or Hub id of a model to compare with instead of base and adapter.
        data: a JSONL file in mlx-lm's formats (of conversations and completions only the answers
            are scored) or a text file; by default text that the reference writes.
        max_kl: bound on the mean KL in nats a token.
        seed: of the text, of which calibration draws other from the same number.
        max_tokens: about how many tokens to run.
        revision: of the base or reference on the Hub.
        trust_remote_code: let model code that lies in the models' folders run.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure.
    """
    start = time.perf_counter()
    _check_options(model, adapter_path, reference, max_kl, max_tokens)
    if in_llama_cpp := _is_gguf(fused):
        _check_loadable(Path(fused).expanduser())
    found = None if in_llama_cpp else hub.resolve(fused, what="--fused", code=trust_remote_code)
    checkpoint = Checkpoint.open(found.path) if found is not None else None
    if reference is not None:
        folder = hub.resolve(
            reference, revision=revision, what="--reference", code=trust_remote_code
        )
        truth = _any_reference(folder, checkpoint, trust_remote_code)
    else:
        assert model is not None
        assert adapter_path is not None
        folder = hub.resolve(model, revision=revision, code=trust_remote_code)
        truth = _teacher(folder, adapter_path, checkpoint, trust_remote_code, progress)
    text_seed = derived_seed(seed, "verify")
    if data is not None:
        tokenizer = truth.running.tokenizer
        sequences = read_sequences(Path(data), tokenizer, tokens=max_tokens, seed=text_seed)
    else:
        sequences = generate_sequences(
            truth.running.model,
            truth.running.tokenizer,
            tokens=max_tokens,
            seed=text_seed,
            progress=of_step(progress, "generating text"),
        )
    judge = _judged_in_mlx if found is not None else _judged_in_llama_cpp
    folder_or_file = found.path if found is not None else Path(fused).expanduser()
    with judge(folder_or_file, truth.running, sequences, trust_remote_code) as judged:
        candidates: dict[str, Model] = {"fused": judged.model}
        if truth.adapters:
            candidates["base"] = Variant(truth.running.model, truth.running.without_adapter)
        measured = compare(
            truth.running.model, candidates, sequences, progress=of_step(progress, "comparing")
        )
    return _report(
        fused=found.public_name if found is not None else str(fused),
        truth=truth,
        measured=measured,
        sequences=sequences,
        checks=(*truth.checks, *judged.checks),
        data=str(data) if data is not None else f"generated by {truth.author} (seed {seed})",
        seed=seed,
        float32=truth.running.exact and judged.exact,
        max_kl=max_kl,
        seconds=time.perf_counter() - start,
    )


@dataclass(frozen=True)
class _Judged:
    """The fused model, ready to be called.

    Attributes:
        checks: that take running it.
        exact: as :attr:`RunningModel.exact`.
    """

    model: Any
    checks: tuple[Check, ...]
    exact: bool


@contextlib.contextmanager
def _judged_in_mlx(
    folder: Path,
    reference: RunningModel,
    _: Sequence[TokenSequence],
    trust_remote_code: bool,
) -> Iterator[_Judged]:
    running = run_model(folder, trust_remote_code=trust_remote_code, memory_share=MEMORY_SHARE / 2)
    yield _Judged(running.model, (_check_vocabulary(reference, running),), running.exact)


@contextlib.contextmanager
def _judged_in_llama_cpp(
    path: Path, reference: RunningModel, sequences: Sequence[TokenSequence], _: bool
) -> Iterator[_Judged]:
    from mlx_fusekit.running.llamacpp import LlamaCpp
    from mlx_fusekit.verifying.judged import JudgedGguf, check_tokenization

    longest = max(len(sequence.tokens) for sequence in sequences)
    with LlamaCpp(path, context=longest) as running:
        check = check_tokenization(running, reference.tokenizer, sequences)
        yield _Judged(JudgedGguf(running), (check,), exact=False)


def _is_gguf(fused: str | Path) -> bool:
    """Whether the fused model is a GGUF file, which llama.cpp runs."""
    path = Path(fused).expanduser()
    if path.suffix != ".gguf":
        return False
    if not path.is_file():
        raise CheckpointError(f"--fused {fused}: there is no such file")
    return True


def _check_loadable(path: Path) -> None:
    """Refuse a file that llama.cpp cannot load, before anything takes long."""
    from mlx_fusekit.running.llamacpp import LlamaCpp

    LlamaCpp(path, vocabulary_only=True).close()


def _check_options(
    model: object, adapter_path: object, reference: object, max_kl: float | None, max_tokens: int
) -> None:
    if reference is not None and (model is not None or adapter_path):
        raise ConfigurationError(
            "--reference takes the place of --model and --adapter-path; give it or those"
        )
    if reference is None and (model is None or not adapter_path):
        missing = "--model" if model is None else "--adapter-path"
        raise ConfigurationError(
            f"{missing} is missing; give the base and adapter that were fused, or any model "
            "to compare with as --reference"
        )
    if max_kl is not None and not max_kl >= 0:
        raise ConfigurationError(f"--max-kl {max_kl}: must be a number of nats, 0 or more")
    if max_tokens < 2:
        raise ConfigurationError(f"--max-tokens {max_tokens}: must be 2 or more")


def _teacher(
    folder: hub.LocalFolder,
    adapter_path: str | Path | Sequence[str | Path],
    fused: Checkpoint | None,
    trust_remote_code: bool,
    progress: StepProgress | None,
) -> _Reference:
    choices = adapter_choices(adapter_path)
    base, adapter = open_bound(
        folder.path,
        [(AdapterFolder.open(choice.folder.path), choice.weight) for choice in choices],
        base_id=folder.repo_id or str(folder.path),
        trust_remote_code=trust_remote_code,
    )
    checks: tuple[Check, ...] = ()
    if fused is not None:
        check_same_model(base, fused, f"--model {folder.public_name}", f"--fused {fused.folder}")
        checks = check_structure(base, adapter, fused, of_step(progress, "comparing files"))
    running = run_adapted(
        folder.path,
        adapter,
        trust_remote_code=trust_remote_code,
        memory_share=MEMORY_SHARE / 2,
    )
    names = tuple(choice.folder.public_name for choice in choices)
    return _Reference(running, folder, names, checks, adapter.warnings, "base+adapter")


def _any_reference(
    folder: hub.LocalFolder, fused: Checkpoint | None, trust_remote_code: bool
) -> _Reference:
    running = run_model(
        folder.path, trust_remote_code=trust_remote_code, memory_share=MEMORY_SHARE / 2
    )
    checks = (check_no_adapter(fused),) if fused is not None else ()
    return _Reference(running, folder, (), checks, (), "the reference")


def _check_vocabulary(reference: RunningModel, fused: RunningModel) -> Check:
    """Whether a token id means the same to both models."""
    ours, theirs = (running.tokenizer.get_vocab() for running in (reference, fused))
    differing = len(set(ours.items()) ^ set(theirs.items()))
    detail = f"{len(ours)} tokens"
    if differing:
        detail = f"{differing} tokens of only one of them"
    return Check("same vocabulary", not differing, detail)


def _report(
    *,
    fused: str,
    truth: _Reference,
    measured: dict[str, Parity],
    sequences: Sequence[TokenSequence],
    checks: tuple[Check, ...],
    data: str,
    seed: int,
    float32: bool,
    max_kl: float | None,
    seconds: float,
) -> ParityReport:
    ours, base = measured["fused"], measured.get("base")
    kl = ours.kl_mean
    finite = math.isfinite(kl) and math.isfinite(ours.perplexity)
    if not finite:
        bad = int(np.logical_not(np.isfinite(ours.kl)).sum())
        check = Check("finite probabilities", False, f"KL is not finite at {bad} tokens")
        checks = (*checks, check)
    structure_ok = all(check.ok for check in checks)
    recovered = None
    if base is not None and base.kl_mean > 0:
        recovered = 1 - kl / base.kl_mean
    return ParityReport(
        fused=fused,
        reference=truth.folder.public_name,
        revision=truth.folder.revision,
        adapters=truth.adapters,
        kl_mean=kl,
        kl_median=ours.kl_median,
        kl_p99=ours.kl_p99,
        kl_base_mean=base.kl_mean if base else None,
        kl_base_median=base.kl_median if base else None,
        kl_base_p99=base.kl_p99 if base else None,
        top1_agreement=ours.top1_agreement,
        top1_agreement_base=base.top1_agreement if base else None,
        perplexity_reference=ours.perplexity_reference,
        perplexity_fused=ours.perplexity,
        perplexity_base=base.perplexity if base else None,
        exact_match_reference=ours.exact_match_reference,
        exact_match_fused=ours.exact_match,
        exact_match_base=base.exact_match if base else None,
        recovered=recovered,
        tokens=len(ours.kl),
        sequences=len(sequences),
        data=data,
        seed=seed,
        float32=float32,
        max_kl=max_kl,
        structure_ok=structure_ok,
        structure=checks,
        passed=structure_ok and (max_kl is None or kl <= max_kl),
        seconds=seconds,
        warnings=truth.warnings,
    )
