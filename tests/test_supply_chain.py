"""The lock files, the oldest versions, and what an audit says."""

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from audit import verdict  # noqa: E402
from check_lock import differences, locked, normal  # noqa: E402
from minimum import minimums  # noqa: E402

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


def wanted(lock: str) -> Iterator[str]:
    """Requirements that a lock file is made for."""
    groups = PROJECT["dependency-groups"]
    if lock == "ci":
        yield from PROJECT["project"]["dependencies"]
        yield from (*groups["dev"], *groups["fuzz"], *PROJECT["build-system"]["requires"])
    elif lock == "llamacpp":
        yield from PROJECT["project"]["optional-dependencies"]["llamacpp"]
    else:
        yield from groups["lock" if lock == "tools" else lock]


@pytest.mark.parametrize("lock", [path.stem for path in LOCKS])
def test_what_is_asked_for_is_locked(lock: str) -> None:
    """After a change: make lock."""
    known = locked(lock)
    for text in wanted(lock):
        requirement = Requirement(text)
        versions = known.get(normal(requirement.name), set())
        assert versions, f"{text} is not in requirements/{lock}.txt"
        for version in versions:
            assert requirement.specifier.contains(version), text


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_every_locked_package_has_hashes(path: Path) -> None:
    text = path.read_text("utf-8")
    entries = re.split(r"^(?=\w)", text, flags=re.MULTILINE)[1:]
    assert len(entries) == len(re.findall("==", re.sub(r" ;.*", "", text)))
    for entry in entries:
        assert re.search(r"--hash=sha256:[0-9a-f]{64}\b", entry), entry


def test_an_environment_that_differs_from_the_lock_is_told() -> None:
    known = {"numpy": {"2.4.6"}, "mlx": {"0.32.4"}}
    assert differences({"numpy": "2.4.6", "mlx": "0.32.4"}, known) == []
    assert differences({"numpy": "2.4.5", "left-pad": "1.0"}, known) == [
        "left-pad 1.0 is installed, and locked is none",
        "numpy 2.4.5 is installed, and locked is 2.4.6",
    ]


def test_every_dependency_names_the_oldest_version_that_it_allows() -> None:
    found = minimums()
    for text in PROJECT["project"]["dependencies"]:
        requirement = Requirement(text)
        version = found[requirement.name]
        assert requirement.specifier.contains(version)
        first, *rest = Version(version).release
        below = f"{first}.{rest[0] - 1}.99" if any(rest) and rest[0] else f"{first - 1}.99"
        assert not requirement.specifier.contains(below), text


class TestAudit:
    def package(self, *vulnerabilities: str, **more: Any) -> dict[str, Any]:
        found = [{"id": name, "fix_versions": ["2.1"]} for name in vulnerabilities]
        return {"name": "numpy", "version": "2.0", "vulns": found, **more}

    def test_a_vulnerability_fails(self) -> None:
        text, code = verdict([self.package(), self.package("PYSEC-1")])
        assert text.startswith("numpy 2.0: PYSEC-1, mended in 2.1\n")
        assert code == 1

    def test_nothing_known(self) -> None:
        skipped = {"name": "mlx", "skip_reason": "not found"}
        text, code = verdict([self.package(), skipped])
        assert text == ("audit: no vulnerability is known of 1 packages; it does not know 1 others")
        assert code == 0

    def test_a_service_that_knows_nothing_is_no_all_clear(self) -> None:
        text, code = verdict([{"name": "mlx", "skip_reason": "not found"}])
        assert text == "audit: the service knows none of 1 packages; nothing was looked up"
        assert code == 0
