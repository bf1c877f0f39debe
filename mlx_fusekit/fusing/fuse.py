"""Fusing: a base model and its adapters into one model folder.

Reading never writes, planning reads headers only, and nothing touches the target until everything
in the staging folder is checked.
"""

import json
import math
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from mlx_fusekit import hub
from mlx_fusekit.adapters import AdapterFolder
from mlx_fusekit.adapters.mlx_lm import CONFIG_NAME, WEIGHTS_NAME
from mlx_fusekit.adapters.sources import AdapterChoice, adapter_choices, open_bound
from mlx_fusekit.checkpoint import recipe
from mlx_fusekit.checkpoint.belongings import Companions, find_companions
from mlx_fusekit.checkpoint.clone import copy_file, reflink
from mlx_fusekit.checkpoint.folder import INDEX_NAME, Checkpoint
from mlx_fusekit.checkpoint.staging import check_target, staging_folder
from mlx_fusekit.checkpoint.writer import sync
from mlx_fusekit.errors import CheckpointError, ConfigurationError, OutputError
from mlx_fusekit.formats.floats import DTYPE_NAMES
from mlx_fusekit.fusing.execute import execute, working_memory
from mlx_fusekit.machine import default_workers, free_disk_bytes, memory_bytes
from mlx_fusekit.merging.plan import FuseOptions, FusePlan, plan_fuse
from mlx_fusekit.progress import StepProgress
from mlx_fusekit.requantize.options import (
    CALIBRATION_TOKENS,
    CalibrationOptions,
    CalibrationReport,
)
from mlx_fusekit.requantize.strategy import Nearest, Requantizer

STRATEGIES = ("auto", "calibrated", "nearest")
#: Round to nearest at this width or below can lose most of a LoRA (shared/FACTS section 1).
_LOSSY_BITS = 6
#: What ``auto`` keeps the mean KL below when it is not told, in nats a token, and how much larger
#: than its base it may make a model for that.
DEFAULT_MAX_KL = 0.1
DEFAULT_MAX_GROWTH = 0.1
#: Share of the machine's memory that a model may take to be run.
_RUNNABLE_SHARE = 0.8
#: Any of these is needed to make tokens of text.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


@dataclass(frozen=True)
class FuseReport:
    """What a fuse did, or with ``dry_run`` would do.

    Attributes:
        requantize: the strategy, None where nothing was re-quantized.
        modules: merged modules by the format they were written in.
        unchanged: how many of the adapter's modules have a zero update.
        computed_bytes: how much of ``output_bytes`` was computed and not copied.
        memory_bytes: working memory beyond the interpreter's own, estimated from the plan.
        cloned: whether the file system shared the untouched bytes with the base.
        left_out: files of the base that did not come along.
        calibration: what calibrating did, None where there was none.
    """

    save_path: str
    base: str
    revision: str | None
    adapters: tuple[str, ...]
    kind: str
    requantize: str | None
    modules: dict[str, int]
    unchanged: int
    parameters: int
    base_bytes: int
    output_bytes: int
    computed_bytes: int
    memory_bytes: int
    disk_free_bytes: int
    files: tuple[str, ...]
    cloned: bool
    seconds: float
    dry_run: bool
    warnings: tuple[str, ...]
    left_out: tuple[str, ...]
    calibration: CalibrationReport | None = None

    def as_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return asdict(self)

    @property
    def passed(self) -> bool:
        """Whether the bound the user set holds, if there is one."""
        return self.calibration is None or not (
            self.calibration.max_kl_asked and self.calibration.reached is False
        )


@dataclass(frozen=True)
class PreparedFuse:
    """A fuse that was checked and planned; nothing has been written.

    Attributes:
        strategy: "calibrated" or "nearest", or None where nothing is re-quantized.
        calibration: how to calibrate.
        notes: warnings about the strategy.
    """

    base_folder: hub.LocalFolder
    adapters: tuple[AdapterChoice, ...]
    target: Path
    plan: FusePlan
    companions: Companions
    strategy: str | None
    calibration: CalibrationOptions
    notes: tuple[str, ...] = ()
    trust_remote_code: bool = False

    def report(
        self,
        *,
        cloned: bool = False,
        seconds: float = 0.0,
        dry_run: bool = True,
        calibration: CalibrationReport | None = None,
    ) -> FuseReport:
        """What will be done, from the plan alone."""
        formats = Counter(
            str(step.target_spec) if step.target_spec else _dtype_name(step.dtype)
            for step in self.plan.merged
        )
        return FuseReport(
            save_path=str(self.target),
            base=self.base_folder.public_name,
            revision=self.base_folder.revision,
            adapters=tuple(choice.folder.public_name for choice in self.adapters),
            kind=self.plan.adapter.kind,
            requantize=self.strategy,
            modules=dict(formats),
            unchanged=len(self.plan.unchanged),
            parameters=len(self.plan.adapter.parameters),
            base_bytes=self.plan.base_bytes,
            output_bytes=self.plan.output_bytes,
            computed_bytes=self.plan.computed_bytes,
            memory_bytes=working_memory(self.plan, default_workers()),
            disk_free_bytes=free_disk_bytes(self.target),
            files=tuple(file.name for file in self.plan.files),
            cloned=cloned,
            seconds=seconds,
            dry_run=dry_run,
            warnings=(
                *self.plan.adapter.warnings,
                *self.notes,
                *self._rounding_warnings(),
                *_shortfall(calibration),
            ),
            left_out=self.companions.left_out,
            calibration=calibration,
        )

    def run(
        self,
        *,
        clone: bool = True,
        workers: int | None = None,
        progress: StepProgress | None = None,
    ) -> FuseReport:
        """Write the fused model.

        Args:
            clone: whether the file system may share unchanged blocks with the base.
            workers: threads; the result does not depend on their number.
            progress: called with the step, and how much of it is done and there is in all.

        Raises:
            FusekitError: with a line for the user; the target is then as it was before.
        """
        start = time.perf_counter()
        with staging_folder(self.target) as staging, _Hashing(self._hashed_files()) as hashing:
            _check_disk(self, staging, clone)
            final, requantizer, calibrated = self._requantizer(progress)
            if final is not self:
                _check_disk(final, staging, clone)
            cloned = execute(
                final.plan,
                staging,
                requantizer,
                workers=workers,
                clone=clone,
                progress=_counted(final.plan, progress),
            )
            _write_companions(final, staging)
            _check_written(final.plan, staging)
            _write_recipe(final, staging, hashing.result(), calibrated)
        return final.report(
            cloned=cloned,
            seconds=time.perf_counter() - start,
            dry_run=False,
            calibration=calibrated,
        )

    def _requantizer(
        self, progress: StepProgress | None
    ) -> tuple[Self, Requantizer, CalibrationReport | None]:
        """The strategy ready to be used, and this fuse with the widths it chose."""
        if self.strategy != "calibrated":
            return self, Nearest(), None
        # It needs mlx-lm, which takes longer to import than a dry run takes.
        from mlx_fusekit.requantize.auto import calibrate

        try:
            plan, solved, report = calibrate(
                self.plan,
                tuple(AdapterFolder.open(choice.folder.path) for choice in self.adapters),
                self.calibration,
                trust_remote_code=self.trust_remote_code,
                progress=progress,
            )
        except (CheckpointError, ConfigurationError) as error:
            if not self.calibration.optional:
                raise
            note = f"not calibrated: {error}"
            return replace(self, strategy="nearest", notes=(*self.notes, note)), Nearest(), None
        return (self if plan is self.plan else replace(self, plan=plan)), solved, report

    def _rounding_warnings(self) -> tuple[str, ...]:
        rounded = [
            step
            for step in self.plan.merged
            if self.strategy == "nearest"
            and step.target_spec is not None
            and step.target_spec.bits <= _LOSSY_BITS
        ]
        if not rounded:
            return ()
        bits = min(step.target_spec.bits for step in rounded if step.target_spec)
        return (
            f"{len(rounded)} modules are rounded to nearest at {bits} bits, which can lose most of "
            "a fine-tune (`mlx-fusekit inspect ADAPTER --model BASE` shows its size in steps); "
            "--bits 8 keeps more, in a larger file",
        )

    def _hashed_files(self) -> dict[str, list[Path]]:
        folder = self.plan.base.folder
        weights = Checkpoint.open(folder).headers if isinstance(self.plan.base, Checkpoint) else {}
        names = list(weights) or [path.name for path in sorted(folder.glob("model*.safetensors"))]
        return {
            "base": [folder / name for name in ("config.json", *names)],
            **{
                f"adapter {place}": [choice.folder.path / n for n in (CONFIG_NAME, WEIGHTS_NAME)]
                for place, choice in enumerate(self.adapters)
            },
        }


def prepare_fuse(
    model: str | Path,
    adapter_path: str | Path | Sequence[str | Path],
    save_path: str | Path,
    *,
    requantize: str = "auto",
    bits: int | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    max_kl: float | None = None,
    max_growth: float | None = None,
    seed: int = 0,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> PreparedFuse:
    """Check everything that can be refused, and plan the fuse; writes nothing.

    Args: as :func:`fuse`.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure.
    """
    if requantize not in STRATEGIES:
        raise ConfigurationError(f"--requantize {requantize}: choose {', '.join(STRATEGIES)}")
    settings = _calibration_options(
        requantize, calibration, calibration_tokens, max_kl, max_growth, seed
    )
    if dtype is not None and dtype not in DTYPE_NAMES:
        raise ConfigurationError(f"--dtype {dtype}: choose {', '.join(DTYPE_NAMES)}")
    options = FuseOptions(bits, dequantize, DTYPE_NAMES[dtype] if dtype else None)
    base_folder = hub.resolve(model, revision=revision, code=trust_remote_code)
    choices = adapter_choices(adapter_path)
    target = Path(save_path).expanduser()
    sources = (base_folder.path, *(choice.folder.path for choice in choices))
    check_target(target, overwrite=overwrite, sources=sources)
    base, adapter = open_bound(
        base_folder.path,
        [(AdapterFolder.open(choice.folder.path), choice.weight) for choice in choices],
        base_id=base_folder.repo_id or str(base_folder.path),
        trust_remote_code=trust_remote_code,
    )
    plan = plan_fuse(base, adapter, options)
    strategy, notes = _strategy(plan, requantize, settings)
    return PreparedFuse(
        base_folder=base_folder,
        adapters=choices,
        target=target,
        plan=plan,
        companions=find_companions(base_folder.path, trust_remote_code=trust_remote_code),
        strategy=strategy,
        calibration=settings,
        notes=notes,
        trust_remote_code=trust_remote_code,
    )


def fuse(
    model: str | Path,
    adapter_path: str | Path | Sequence[str | Path],
    save_path: str | Path,
    *,
    requantize: str = "auto",
    bits: int | None = None,
    dequantize: bool = False,
    dtype: str | None = None,
    calibration: str | Path | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    max_kl: float | None = None,
    max_growth: float | None = None,
    seed: int = 0,
    revision: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    progress: StepProgress | None = None,
) -> FuseReport:
    """Fuse adapters into a base model and write the result to a folder that mlx-lm loads.

    Args:
        model: folder or Hub id of the base, quantized by MLX or not.
        adapter_path: folder or Hub id of an mlx-lm adapter, or several; each may be followed by
            ``:WEIGHT`` to scale its update.
        save_path: the folder to make.
        requantize: how merged weights are brought back into the base's format: "calibrated" so
            that the layers' outputs change least on calibration text; "nearest" by rounding, which
            can lose a fine-tune; "auto" calibrated, and with wider bits for the modules that hurt
            most where ``max_kl`` asks for them.
        bits: width to give merged modules instead of the base's.
        dequantize: write the whole model unquantized.
        dtype: "float16", "bfloat16" or "float32" for ``dequantize``; by default as stored scales.
        calibration: text to calibrate on, a JSONL file in mlx-lm's formats, a folder with
            ``train.jsonl`` or a text file; by default the adapter's own training data where its
            configuration names an existing folder, else text that base+adapter writes.
        calibration_tokens: about how many tokens to calibrate on.
        max_kl: bound on the mean KL divergence from base+adapter, in nats a token, on text that
            was not calibrated on. For "auto" it is 0.1 by default.
        max_growth: how much larger than the base wider bits may make the model, as a share; by
            default there is no cap where ``max_kl`` is given, and 0.1 otherwise.
        seed: of calibration text that is chosen or generated.
        revision: of the base on the Hub.
        overwrite: replace an existing model folder.
        trust_remote_code: let model code that lies in the base's folder run, and copy it.
        progress: called with the step, and how much of it is done and there is in all.

    Raises:
        FusekitError: with one line that names the file, tensor or flag, and the cure; the target
            is then as it was before.
    """
    prepared = prepare_fuse(
        model,
        adapter_path,
        save_path,
        requantize=requantize,
        bits=bits,
        dequantize=dequantize,
        dtype=dtype,
        calibration=calibration,
        calibration_tokens=calibration_tokens,
        max_kl=max_kl,
        max_growth=max_growth,
        seed=seed,
        revision=revision,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    return prepared.run(progress=progress)


def _calibration_options(
    requantize: str,
    file: str | Path | None,
    tokens: int,
    max_kl: float | None,
    max_growth: float | None,
    seed: int,
) -> CalibrationOptions:
    given = {"--calibration": file, "--max-kl": max_kl, "--max-growth": max_growth}
    if requantize == "nearest":
        for flag, value in given.items():
            if value is not None:
                raise ConfigurationError(
                    f"{flag} goes with --requantize auto or calibrated; drop it, or nearest"
                )
    if max_growth is not None and requantize != "auto":
        raise ConfigurationError(
            "--max-growth goes with --requantize auto, which alone makes modules wider; drop it"
        )
    if max_kl is not None and not (math.isfinite(max_kl) and max_kl > 0):
        raise ConfigurationError(f"--max-kl {max_kl}: must be a number of nats above 0")
    if max_growth is not None and not (math.isfinite(max_growth) and max_growth >= 0):
        raise ConfigurationError(f"--max-growth {max_growth}: must be a share, 0 or more")
    if tokens < 1:
        raise ConfigurationError(f"--calibration-tokens {tokens}: must be 1 or more")
    path = None if file is None else Path(file).expanduser()
    if path is not None and not path.exists():
        raise ConfigurationError(f"--calibration {file}: there is no such file or folder")
    automatic = requantize == "auto"
    bound, growth = max_kl, max_growth
    if automatic and max_kl is None:
        bound = DEFAULT_MAX_KL
        growth = DEFAULT_MAX_GROWTH if max_growth is None else max_growth
    return CalibrationOptions(
        file=path,
        tokens=tokens,
        seed=seed,
        max_kl=bound,
        max_kl_asked=max_kl is not None,
        widen=automatic,
        max_growth=growth,
    )


def _strategy(
    plan: FusePlan, requantize: str, settings: CalibrationOptions
) -> tuple[str | None, tuple[str, ...]]:
    """The strategy to use, and warnings about it."""
    specs = [step.target_spec for step in plan.merged if step.target_spec is not None]
    if not specs:
        return None, ()
    if requantize == "nearest":
        return "nearest", ()
    narrow = any(spec.bits <= _LOSSY_BITS for spec in specs)
    if settings.optional and not narrow:
        return "nearest", ()
    folder = plan.base.folder
    obstacle = None
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        obstacle = f"{folder} has no tokenizer, which calibration text needs"
    elif plan.base_bytes > _RUNNABLE_SHARE * memory_bytes():
        obstacle = (
            f"the base has {plan.base_bytes / 1e9:.1f} GB, and this machine's memory "
            f"({memory_bytes() / 1e9:.1f} GB) is too small to run it"
        )
    if obstacle is None:
        return "calibrated", ()
    if settings.optional:
        return "nearest", (f"not calibrated: {obstacle}",)
    raise ConfigurationError(
        f"--requantize {requantize}: {obstacle}; --requantize nearest works without"
    )


def _shortfall(calibration: CalibrationReport | None) -> tuple[str, ...]:
    """What to tell when the bound does not hold, or calibration did not see everything."""
    if calibration is None:
        return ()
    notes = []
    if calibration.reached is False:
        notes.append(
            f"the mean KL is {calibration.kl_mean:.3g} nats a token, above the bound of "
            f"{calibration.max_kl:g}; more calibration text, --bits or a larger --max-growth "
            "bring it down"
        )
    if calibration.not_seen:
        notes.append(
            f"{len(calibration.not_seen)} modules saw no calibration text and were fitted by "
            f"weight error alone ({calibration.not_seen[0]}, for one)"
        )
    if calibration.skipped_tokens:
        notes.append(
            f"{calibration.skipped_tokens} calibration tokens gave infinite or NaN activations "
            "and were left out"
        )
    return tuple(notes)


def _check_disk(prepared: PreparedFuse, staging: Path, clone: bool) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(staging).free
    needed = prepared.plan.output_bytes
    if free >= needed:
        return
    base_file = next((file.base for file in prepared.plan.files if file.base), None)
    if clone and base_file is not None and reflink(base_file.file, staging / ".probe"):
        (staging / ".probe").unlink()
        needed = prepared.plan.computed_bytes
    if free < needed:
        raise OutputError(
            f"{prepared.target}: needs {needed / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB "
            "free; make room or choose another --save-path"
        )


def _write_companions(prepared: PreparedFuse, staging: Path) -> None:
    folder = prepared.plan.base.folder
    for name in prepared.companions.copied:
        (staging / name).parent.mkdir(exist_ok=True)
        copy_file(folder / name, staging / name)
    config = _changed_config(prepared.plan)
    if config is None:
        copy_file(folder / "config.json", staging / "config.json")
    else:
        (staging / "config.json").write_text(config, "utf-8")
    _write_index(prepared.plan, staging)
    for path in staging.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            with open(path, "rb") as file:
                sync(file.fileno())


def _write_recipe(
    prepared: PreparedFuse,
    staging: Path,
    digests: dict[str, dict[str, str]],
    calibrated: CalibrationReport | None,
) -> None:
    adapters = [
        {
            "id": choice.folder.public_name,
            "revision": choice.folder.revision,
            "weight": choice.weight,
            "sha256": digests[f"adapter {place}"],
        }
        for place, choice in enumerate(prepared.adapters)
    ]
    options = prepared.plan.options
    text = recipe.as_text(
        {
            "base": {
                "id": prepared.base_folder.public_name,
                "revision": prepared.base_folder.revision,
                "sha256": digests["base"],
            },
            "adapters": adapters,
            "kind": prepared.plan.adapter.kind,
            "requantize": prepared.strategy,
            "calibration": asdict(calibrated) if calibrated else None,
            "bits": options.bits,
            "dequantize": options.dequantize,
            "dtype": _dtype_name(options.dtype) if options.dtype else None,
            "seed": prepared.calibration.seed,
            "modules": [step.module for step in prepared.plan.merged],
            "parameters": list(prepared.plan.adapter.parameters),
            "versions": recipe.versions(),
        }
    )
    with open(staging / recipe.RECIPE_NAME, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        sync(file.fileno())


class _Hashing:
    """Hashes of files, computed while other work goes on."""

    def __init__(self, files: dict[str, list[Path]]) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._stopped = threading.Event()
        self._futures = {
            name: {path.name: self._pool.submit(self._digest, path) for path in paths}
            for name, paths in files.items()
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def _digest(self, path: Path) -> str:
        return recipe.sha256(path, self._stopped.is_set)

    def result(self) -> dict[str, dict[str, str]]:
        """Digest of each file, by group and file name."""
        return {
            name: {file: future.result() for file, future in futures.items()}
            for name, futures in self._futures.items()
        }


def _changed_config(plan: FusePlan) -> str | None:
    """``config.json`` of the fused model, or None when the base's serves unchanged."""
    if plan.quantization is None and plan.options.dtype is None:
        return None
    config = dict(plan.base.config)
    if plan.quantization:
        config["quantization"] = dict(plan.quantization)
        config["quantization_config"] = dict(plan.quantization)
    elif plan.quantization is not None:
        for key in ("quantization", "quantization_config"):
            config.pop(key, None)
            if isinstance(text := config.get("text_config"), dict):
                config["text_config"] = {k: v for k, v in text.items() if k != key}
    if plan.options.dtype is not None:
        for key in ("dtype", "torch_dtype"):
            if key in config:
                config[key] = _dtype_name(plan.options.dtype)
    return json.dumps(config, indent=4, ensure_ascii=False) + "\n"


def _write_index(plan: FusePlan, staging: Path) -> None:
    base_index = plan.base.folder / INDEX_NAME
    if all(file.base is not None for file in plan.files):
        if base_index.exists():
            copy_file(base_index, staging / INDEX_NAME)
        return
    weight_map = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    total = sum(tensor.nbytes for file in plan.files for tensor in file.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (staging / INDEX_NAME).write_text(json.dumps(index, indent=4) + "\n", "utf-8")


def _check_written(plan: FusePlan, staging: Path) -> None:
    """Read the result back as a stranger would, and compare it with the plan."""
    written = Checkpoint.open(staging)
    planned = {t.name: (t.dtype, t.shape) for file in plan.files for t in file.tensors}
    found = {t.name: (t.dtype, t.shape) for t in written.tensors.values()}
    if planned != found:
        raise AssertionError(f"written and planned tensors differ: {set(planned) ^ set(found)}")


def _counted(plan: FusePlan, progress: StepProgress | None) -> Callable[[int], None]:
    total, done = plan.output_bytes, 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress("writing", min(done, total), total)

    return count


def _dtype_name(dtype: str) -> str:
    return {stored: name for name, stored in DTYPE_NAMES.items()}.get(dtype, dtype)
