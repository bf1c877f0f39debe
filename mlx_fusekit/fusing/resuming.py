"""What decides the bytes of a calibrated fuse, so that work is gone on with only where it fits."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlx_fusekit import launched
from mlx_fusekit.adapters.sources import Sources
from mlx_fusekit.checkpoint import recipe
from mlx_fusekit.merging.plan import FusePlan
from mlx_fusekit.requantize.options import CalibrationOptions
from mlx_fusekit.texts.data import data_file, training_data


def deciding_inputs(
    plan: FusePlan,
    sources: Sources,
    options: CalibrationOptions,
    base_files: Sequence[Path],
    adapter_files: Mapping[str, Sequence[Path]],
) -> dict[str, Any]:
    """All that a calibrated fuse depends on, as JSON, by what a user calls it.

    Weights of the base are told apart by their size and time of change, since hashing them may take
    as long as a layer; all else by its content.
    """
    import mlx.core as mx

    return {
        "number of ranks": launched.ranks(),
        "base": [_identity(path) for path in base_files],
        "adapter": [
            [opened.kind, choice.weight, opened.scale, sorted(opened.ignored.modules)]
            + [recipe.sha256(path) for path in adapter_files[f"adapter {place}"]]
            for place, (choice, opened) in enumerate(
                zip(sources.choices, sources.opened, strict=True)
            )
        ],
        "set of flags": {
            "combine": sources.combination.as_json(),
            "formats": repr(plan.options),
            "calibrating": {name: str(value) for name, value in asdict(options).items()},
        },
        "calibration text": _text(sources, options),
        "version of mlx-fusekit or MLX": recipe.versions() | {"device": str(mx.default_device())},
    }


def _identity(path: Path) -> list[Any]:
    if path.suffix == ".json":
        return [path.name, recipe.sha256(path)]
    found = path.stat()
    return [path.name, found.st_size, found.st_mtime_ns]


def _text(sources: Sources, options: CalibrationOptions) -> list[str]:
    """Digests of the files that the text would be read from."""
    files = [] if options.file is None else [options.file]
    if not files:
        known = [training_data(opened.config, opened.folder) for opened in sources.opened]
        files = [data.folder for data in known if data is not None]
    digests = []
    for file in files:
        # What cannot be read is told when it is.
        with suppress(OSError):
            digests.append(recipe.sha256(data_file(file)))
    return digests
