"""Check that an environment holds what the lock files say, and nothing else.

python scripts/check_lock.py
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_OWN = "mlx-fusekit"


def main() -> None:
    """Exit with a line for each package that is not locked, or of another version."""
    installed = {normal(found.name): found.version for found in distributions()}
    installed.pop(_OWN, None)
    if wrong := differences(installed, locked("ci", "llamacpp")):
        sys.exit("\n".join(f"error: {line}; run `make clean`, or `make lock`" for line in wrong))
    print(f"{len(installed)} packages are as locked")


def differences(installed: dict[str, str], known: dict[str, set[str]]) -> list[str]:
    """A line for each package whose version is not locked."""
    return [
        f"{name} {version} is installed, and locked is {' or '.join(known.get(name, ())) or 'none'}"
        for name, version in sorted(installed.items())
        if version not in known.get(name, ())
    ]


def locked(*names: str) -> dict[str, set[str]]:
    """Versions of each package in some of the lock files; several where Python decides."""
    found: dict[str, set[str]] = {}
    for name in names:
        text = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8")
        for package, version in re.findall(r"^([\w.-]+)==([^ ;]+)", text, re.MULTILINE):
            found.setdefault(normal(package), set()).add(version)
    return found


def normal(name: str) -> str:
    """A package's name as all its spellings are told to be the same."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
