"""Look up whether a vulnerability is known of any package of the lock files; ``make audit``.

    python scripts/audit.py requirements/ci.txt ...

Asks PyPI through pip-audit. Exits with 1 for a vulnerability; where the service cannot be reached,
or knows none of the packages, says so and exits with 0, for then nothing is known either way.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

_ADVICE = "a package is vulnerable; `make lock` takes the newest versions"
_SECONDS = 100


def main() -> None:
    """Print what was found, and exit accordingly."""
    parser = argparse.ArgumentParser(description="Look for known vulnerabilities of the packages.")
    parser.add_argument("locks", type=Path, nargs="+")
    command = [sys.executable, "-P", "-m", "pip_audit", "--format=json", "--progress-spinner=off"]
    command += ["--require-hashes", "--disable-pip", "--timeout=10"]
    for lock in parser.parse_args().locks:
        command += ["--requirement", str(lock)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=_SECONDS
        )
    except subprocess.TimeoutExpired:
        print(f"audit: could not reach the service in {_SECONDS} s; nothing was looked up")
        return
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError, TypeError):
        print(done.stderr.strip())
        if "onnection" not in done.stderr and "imed out" not in done.stderr:
            sys.exit("audit: pip-audit failed")
        print("audit: could not reach the service; nothing was looked up")
        return
    text, code = verdict(packages)
    print(text)
    sys.exit(code)


def verdict(packages: list[dict[str, Any]]) -> tuple[str, int]:
    """What pip-audit's list of packages says, in words, and the exit code."""
    known = [package for package in packages if "skip_reason" not in package]
    lines = [
        f"{package['name']} {package['version']}: {found['id']}, mended in "
        f"{', '.join(found['fix_versions']) or 'no version yet'}"
        for package in known
        for found in package["vulns"]
    ]
    if lines:
        return "\n".join([*lines, f"audit: {_ADVICE}"]), 1
    unknown = len(packages) - len(known)
    if not known:
        return f"audit: the service knows none of {unknown} packages; nothing was looked up", 0
    rest = f"; it does not know {unknown} others" if unknown else ""
    return f"audit: no vulnerability is known of {len(known)} packages{rest}", 0


if __name__ == "__main__":
    main()
