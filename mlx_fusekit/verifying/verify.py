"""Verifying: how close a fused model, read back from disk, is to base and adapter unmerged.

The reference is base+adapter as mlx-lm runs it. The base alone is measured beside the fused model,
so that one sees how much of the way from base to fine-tune the fused model has gone.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from mlx_fusekit import hub
from mlx_fusekit.adapters.combination import Combination
from mlx_fusekit.adapters.sources import AdapterNames, NamedSources
from mlx_fusekit.checkpoint.folder import Checkpoint, optional_json
from mlx_fusekit.checkpoint.json_text import shown
from mlx_fusekit.checkpoint.recipe import RECIPE_NAME
from mlx_fusekit.errors import CheckpointError, ConfigurationError
from mlx_fusekit.progress import StepProgress, of_step
from mlx_fusekit.texts.data import check_text
from mlx_fusekit.texts.sequences import TokenSequence
from mlx_fusekit.verifying.judged import Judged, in_llama_cpp, in_mlx, loadable_gguf
from mlx_fusekit.verifying.options import MAX_TOKENS, check_max_kl
from mlx_fusekit.verifying.parity import Model, Parity, Variant, compare
from mlx_fusekit.verifying.reference import Reference, any_model, teacher
from mlx_fusekit.verifying.report import ParityReport, parity_report
from mlx_fusekit.verifying.tasks import check_data, measure_tasks


def verify(
    model: str | Path | None,
    adapter_path: AdapterNames | None,
    fused: str | Path,
    *,
    reference: str | Path | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    max_kl: float | None = None,
    seed: int = 0,
    max_tokens: int = MAX_TOKENS,
    scale: float | None = None,
    combine: str | None = None,
    density: float | None = None,
    combine_seed: int = 0,
    ignore: Sequence[str] = (),
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
        data: JSON lines or an array in mlx-lm's formats (of conversations and completions only the
            answers are scored) or a text file; by default text that the reference writes. With
            several adapters, also one file for each: then the report tells what each task lost.
        max_kl: bound on the mean KL in nats a token.
        seed: of the text, of which calibration draws other from the same number.
        max_tokens: about how many tokens to run.
        scale: of the adapter's update, taken instead of the one in ``adapter_config.json``.
        combine: as for :func:`mlx_fusekit.fuse`; by default as ``fusekit.json`` of the fused model
            says, or else a sum.
        density: as for :func:`mlx_fusekit.fuse`.
        combine_seed: as for :func:`mlx_fusekit.fuse`.
        ignore: shell patterns (``*vision_tower*``) of the adapter's modules to leave out.
        revision: of the base or reference on the Hub.
        trust_remote_code: let model code that lies in the models' folders run.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure.
    """
    start = time.perf_counter()
    _check_options(model, adapter_path, reference, scale, ignore, max_kl, max_tokens)
    files = [data] if isinstance(data, str | Path) else list(data or ())
    for name in files:
        check_text(Path(name))
    file = loadable_gguf(fused)
    found = hub.resolve(fused, what="--fused", code=trust_remote_code) if file is None else None
    checkpoint = None
    if found is not None:
        checkpoint = Checkpoint.open(found.path, trust_remote_code=trust_remote_code)
    if model is not None and adapter_path is not None:
        named = NamedSources.find(
            model,
            adapter_path,
            revision=revision,
            trust_remote_code=trust_remote_code,
            scale=scale,
            combination=_combination(
                combine, density, combine_seed, checkpoint, several=not _is_one(adapter_path)
            ),
            ignore=ignore,
        )
        check_data([str(name) for name in files], len(named.adapters))
        truth = teacher(named, checkpoint, progress)
    else:
        assert reference is not None, "one of the two was given"
        other = hub.resolve(
            reference, revision=revision, what="--reference", code=trust_remote_code
        )
        truth = any_model(other, checkpoint)
    told = of_step(progress, "generating text")
    share = max(2, max_tokens // max(len(files), 1))  # of each text
    texts = [truth.text(file, share, seed, told) for file in files]
    if not texts:
        texts = [truth.text(None, max_tokens, seed, told)]
    sequences = [sequence for text in texts for sequence in text]
    if found is not None:
        judge = in_mlx(found, truth.running)
    else:
        assert file is not None, "what is no folder is a file"
        judge = in_llama_cpp(file, truth.running, sequences)
    with judge as judged:
        measured = _measured(truth, judged, sequences, progress)
        named_files = [str(name) for name in files]
        tasks = measure_tasks(truth, judged.model, named_files, texts, progress)
    return parity_report(
        fused=found.public_name if found is not None else str(fused),
        truth=truth,
        measured=measured,
        sequences=sequences,
        checks=(*truth.checks, *judged.checks),
        data=", ".join(named_files) or f"generated by {truth.author} (seed {seed})",
        seed=seed,
        float32=truth.running.exact and judged.exact,
        max_kl=max_kl,
        seconds=time.perf_counter() - start,
        tasks=tasks,
    )


def _combination(
    method: str | None,
    density: float | None,
    seed: int,
    fused: Checkpoint | None,
    *,
    several: bool,
) -> Combination:
    """As it was asked for, or else as the fused model tells that it was made."""
    if method is not None or fused is None or not several:
        return Combination(method or "sum", density, seed)
    recipe = optional_json(fused.folder, RECIPE_NAME) or {}
    told = recipe.get("combine")
    if not isinstance(told, dict):
        return Combination("sum", density, seed)
    method, share = told.get("method"), told.get("density")
    draws = told.get("seed")
    if not isinstance(method, str) or not isinstance(share, float | int):
        raise CheckpointError(
            f"{fused.folder / RECIPE_NAME}: combine is {shown(told)}, and does not say how "
            "adapters were combined; give --combine"
        )
    return Combination(method, density or float(share), draws if isinstance(draws, int) else seed)


def _is_one(adapters: AdapterNames) -> bool:
    return isinstance(adapters, str | Path) or len(adapters) < 2


def _measured(
    truth: Reference,
    judged: Judged,
    sequences: Sequence[TokenSequence],
    progress: StepProgress | None,
) -> dict[str, Parity]:
    """The fused model beside its reference, and the base by itself where there is an adapter."""
    candidates: dict[str, Model] = {"fused": judged.model}
    if truth.adapters:
        candidates["base"] = Variant(truth.running.model, truth.running.without_adapter)
    told = of_step(progress, "comparing")
    return compare(truth.running.model, candidates, sequences, progress=told)


def _check_options(
    model: object,
    adapter_path: object,
    reference: object,
    scale: float | None,
    ignore: Sequence[str],
    max_kl: float | None,
    max_tokens: int,
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
    if reference is not None and scale is not None:
        raise ConfigurationError(f"--scale {scale:g}: goes with --adapter-path; drop it")
    if reference is not None and ignore:
        raise ConfigurationError(f"--ignore {ignore[0]!r}: goes with --adapter-path; drop it")
    if max_kl is not None:
        check_max_kl(max_kl)
    if max_tokens < 2:
        raise ConfigurationError(f"--max-tokens {max_tokens}: must be 2 or more")
