"""``fusekit.json``: how a fused model was made, and from what."""

import hashlib
import json
import re
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from mlx_fusekit.reading import open_file

RECIPE_NAME = "fusekit.json"
_LFS_BLOB = re.compile(r"[0-9a-f]{64}")
_READ = 1 << 20


def sha256(path: Path, stopped: Callable[[], bool] = lambda: False) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Large files in the Hub's cache are named by it, so that it need not be computed.

    Args:
        stopped: asked between pieces; once true, what has been read is all that counts.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and _LFS_BLOB.fullmatch(real.name):
        return real.name
    digest = hashlib.sha256()
    with open_file(real) as file:
        while not stopped() and (read := file.read(_READ)):
            digest.update(read)
    return digest.hexdigest()


def holds_its_name(blob: Path) -> bool:
    """Whether a blob of the Hub's cache is what its name says; only large ones are asked."""
    if not _LFS_BLOB.fullmatch(blob.name):
        return True
    with open_file(blob) as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == blob.name


def versions() -> dict[str, str]:
    """Installed versions of what the result depends on."""
    found = {}
    for package in ("mlx-fusekit", "mlx", "mlx-lm", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def as_text(recipe: dict[str, Any]) -> str:
    """The recipe as the text of ``fusekit.json``; the same recipe gives the same bytes."""
    return json.dumps(recipe, indent=2, ensure_ascii=False) + "\n"
