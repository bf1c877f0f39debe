"""Print the oldest versions that ``pyproject.toml`` allows, as constraints for pip.

python scripts/minimum.py >constraints.txt
"""

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
_AT_LEAST = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)(?: *;.*)?")


def main() -> None:
    """Print a line for each package that we depend on."""
    for name, version in sorted(minimums().items()):
        print(f"{name}=={version}")


def minimums() -> dict[str, str]:
    """The oldest version of each dependency, by its name.

    Raises:
        ValueError: for a dependency without one.
    """
    found = {}
    for dependency in tomllib.loads(PROJECT.read_text("utf-8"))["project"]["dependencies"]:
        told = _AT_LEAST.fullmatch(dependency)
        if told is None:
            raise ValueError(f"pyproject.toml: {dependency!r} does not say which version it needs")
        found[told[1]] = told[2]
    return found


if __name__ == "__main__":
    main()
