"""The fused model's folder: what lies beside its weights, and the last look at all of it."""

import json
import shutil
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from mlx_fusekit.checkpoint import beside_text, recipe
from mlx_fusekit.checkpoint.belongings import INDEX_NAME, Companions
from mlx_fusekit.checkpoint.folder import Checkpoint, index_fault
from mlx_fusekit.errors import OutputError
from mlx_fusekit.figures import size
from mlx_fusekit.fusing.report import dtype_name
from mlx_fusekit.merging.plan import FusePlan
from mlx_fusekit.writing import calls
from mlx_fusekit.writing.files import copy_file, reflink, write_new


class Hashing:
    """Hashes of files, computed while other work goes on.

    Args:
        files: by group.
    """

    def __init__(self, files: Mapping[str, Sequence[Path]]) -> None:
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


def check_disk(
    plans: Sequence[FusePlan], target: Path, staging: Path, *, clone: bool, kept: int = 0
) -> None:
    """Refuse to start what the disk cannot hold.

    Args:
        plans: what will be written.
        target: the folder that was asked for.
        staging: where it is made.
        clone: whether unchanged bytes may be shared with the base.
        kept: bytes that lie beside it until all is done.

    Raises:
        OutputError: with how much is needed and free.
    """
    free = shutil.disk_usage(staging).free - kept
    needed = sum(plan.output_bytes for plan in plans)
    if free >= needed:
        return
    base_file = next((file.base for plan in plans for file in plan.files if file.base), None)
    if clone and base_file is not None and reflink(base_file.file, staging / ".probe"):
        calls.unlink(staging / ".probe")
        needed = sum(plan.computed_bytes for plan in plans)
    if free < needed:
        raise OutputError(
            f"{target}: needs {size(needed + kept)}, but its disk has {size(free + kept)} "
            "free; make room or choose another --save-path"
        )


def write_beside_weights(
    plan: FusePlan, companions: Companions, staging: Path, *, text_only: bool
) -> None:
    """Write everything but the weights and the recipe, and bring it to the disk."""
    folder = plan.base.folder
    for name in companions.copied:
        if not (staging / name).parent.exists():
            calls.make_folder((staging / name).parent)
        copy_file(folder / name, staging / name)
    config = _changed_config(plan, text_only=text_only)
    if config is None:
        copy_file(folder / "config.json", staging / "config.json")
    else:
        write_new(staging / "config.json", config.encode())
    _write_index(plan, staging)
    for path in staging.iterdir():
        if path.is_dir():
            calls.sync_folder(path)


def write_recipe(staging: Path, content: dict[str, Any]) -> None:
    """Write ``fusekit.json``."""
    write_new(staging / recipe.RECIPE_NAME, recipe.as_text(content).encode())


def check_written(plan: FusePlan, staging: Path) -> None:
    """Read the result back as a stranger would, and compare it with the plan."""
    written = Checkpoint.open(staging)
    planned = {t.name: (t.dtype, t.shape) for file in plan.files for t in file.tensors}
    found = {t.name: (t.dtype, t.shape) for t in written.tensors.values()}
    if planned != found:
        raise AssertionError(f"written and planned tensors differ: {set(planned) ^ set(found)}")
    if written.warnings:
        raise AssertionError(f"what was written is not in order: {written.warnings}")


def _changed_config(plan: FusePlan, *, text_only: bool) -> str | None:
    """``config.json`` of the fused model, or None when the base's serves unchanged."""
    if plan.quantization is None and plan.options.dtype is None and not text_only:
        return None
    config = beside_text.text_only(plan.base.config) if text_only else dict(plan.base.config)
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
                config[key] = dtype_name(plan.options.dtype)
    return json.dumps(config, indent=4, ensure_ascii=False) + "\n"


def _write_index(plan: FusePlan, staging: Path) -> None:
    base_index = plan.base.folder / INDEX_NAME
    weight_map = {tensor.name: file.name for file in plan.files for tensor in file.tensors}
    if all(file.base is not None for file in plan.files):
        if not base_index.exists():
            return
        if index_fault(plan.base.folder, weight_map) is None:
            copy_file(base_index, staging / INDEX_NAME)
            return
    total = sum(tensor.nbytes for file in plan.files for tensor in file.tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_new(staging / INDEX_NAME, (json.dumps(index, indent=4) + "\n").encode())
