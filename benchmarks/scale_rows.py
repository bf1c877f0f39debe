"""The measurements of ``scale.py``: one JSON file a row, so that a run that was cut off goes on.

Every row carries the commit that last changed the package. No table is made of rows of several.
"""

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx_fusekit

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("mlx-fusekit", "mlx", "mlx-lm", "numpy")
_VARIABLES = ("LD_PRELOAD", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")

Facts = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """The rows in a folder.

    Attributes:
        folder: each part has one of its own in it, with a file for each row.
        commit: of the code that measures now; None where nothing is measured.
        asked: options of this run that decide what a row says, such as the number of test items.
    """

    folder: Path
    commit: str | None
    asked: Facts = field(default_factory=dict)

    def has(self, part: str, name: str) -> bool:
        """Whether a row is there already.

        Raises:
            SystemExit: when it is, of another commit than this, or measured with other options.
        """
        path = self._path(part, name)
        if not path.exists():
            return False
        found = json.loads(path.read_text("utf-8"))
        here = {"commit": self.commit, "asked": self.asked}
        for key, wanted in here.items():
            if found[key] != wanted:
                raise SystemExit(
                    f"{path}: was measured with {key} {found[key]}, and now it is {wanted}; "
                    "give --out another folder, or remove the rows"
                )
        return True

    def keep(self, part: str, name: str, facts: Facts) -> None:
        """Write a row; it is there whole or not at all."""
        path = self._path(part, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        here = {"commit": self.commit, "asked": self.asked, "environment": _environment()}
        row = {"name": name, **here, **facts}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(row, indent=2) + "\n", "utf-8")
        partial.replace(path)

    def read(self, *parts: str) -> list[Facts]:
        """All rows of some parts, in the order of their names.

        Raises:
            SystemExit: when there are none, or of several commits.
        """
        paths = [path for part in parts for path in sorted((self.folder / part).glob("*.json"))]
        if not paths:
            raise SystemExit(f"{self.folder}: has no rows of {' or '.join(parts)} yet")
        rows: list[Facts] = [json.loads(path.read_text("utf-8")) for path in paths]
        _check_one_commit(paths, rows)
        return rows

    def _path(self, part: str, name: str) -> Path:
        return self.folder / part / f"{name}.json"


def _check_one_commit(paths: Sequence[Path], rows: Sequence[Facts]) -> None:
    for path, row in zip(paths, rows, strict=True):
        if row["commit"] != rows[0]["commit"]:
            raise SystemExit(
                f"{path} is of {row['commit']}, {paths[0]} of {rows[0]['commit']}: "
                "rows of several commits make no table; remove those of one, and measure again"
            )


def commit() -> str:
    """The commit that last changed the package, marked where files were changed since.

    Raises:
        SystemExit: when the package that runs is not this checkout's.
    """
    package = Path(mlx_fusekit.__file__).resolve().parent
    if package != ROOT / "mlx_fusekit":
        raise SystemExit(f"{package} is not of this checkout: run with PYTHONPATH={ROOT}")
    found = _git("log", "-1", "--format=%h", "--abbrev=12", "--", "mlx_fusekit")
    if _git("status", "--porcelain", "--", "mlx_fusekit"):
        found += f"+{_digest(package)}"
    return found


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _digest(package: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _environment() -> Facts:
    return {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in _PACKAGES},
        "variables": {name: os.environ.get(name, "") for name in _VARIABLES},
    }
