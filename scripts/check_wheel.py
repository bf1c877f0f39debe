"""Check that a wheel holds the whole package, nothing else, and is small.

python scripts/check_wheel.py dist/mlx_fusekit-0.1.0-py3-none-any.whl
"""

import argparse
import sys
import zipfile
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mlx_fusekit"
SIZE_LIMIT_BYTES = 5_000_000


def main() -> None:
    """Print what the wheel holds; exit with a list of what is wrong with it."""
    parser = argparse.ArgumentParser(description="Check the contents and size of a wheel.")
    parser.add_argument("wheel", type=Path)
    wheel: Path = parser.parse_args().wheel
    names = [name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")]
    size = wheel.stat().st_size
    problems = _wrong_names(names)
    if size > SIZE_LIMIT_BYTES:
        problems.append(f"{size:,} bytes are more than {SIZE_LIMIT_BYTES:,}")
    if problems:
        sys.exit("\n".join(f"error: {wheel.name}: {problem}" for problem in problems))
    print(f"{wheel.name}: {len(names)} files, {size / 1e6:.2f} MB")


def _wrong_names(names: list[str]) -> list[str]:
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = {
        path.relative_to(PACKAGE.parent).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = set(names) - metadata
    problems = [f"{name} is missing" for name in sorted(expected - found)]
    problems += [f"{name} does not belong there" for name in sorted(found - expected)]
    if not any(name.endswith("licenses/LICENSE") for name in metadata):
        problems.append("the license is missing")
    return problems


if __name__ == "__main__":
    main()
