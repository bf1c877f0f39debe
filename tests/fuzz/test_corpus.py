"""The committed corpus of the fuzz targets, without atheris: ``make fuzz`` goes on from there."""

from pathlib import Path

import pytest

from fuzz.fuzz import SHARES
from fuzz.mutate import mutated_json
from fuzz.targets import DIVIDER, TARGETS, BrokenPromiseError, run

CORPUS = Path(__file__).parent / "corpus"
MOST_FILES, MOST_BYTES = 300, 1_000_000


@pytest.mark.parametrize("target", TARGETS)
def test_a_reader_takes_or_refuses_whatever_it_is_given(target: str) -> None:
    inputs = sorted((CORPUS / target).iterdir())
    assert inputs
    wrong = []
    for path in inputs:
        try:
            run(target, path.read_bytes())
        except Exception as error:  # noqa: BLE001  # all that let something through are told
            wrong.append(f"{path.name}: {error!r}")
    assert wrong == []


def test_the_corpus_is_of_the_targets_and_small() -> None:
    assert sorted(TARGETS) == sorted(SHARES) == sorted(path.name for path in CORPUS.iterdir())
    assert sum(SHARES.values()) == 100
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) < MOST_FILES
    assert sum(path.stat().st_size for path in files) < MOST_BYTES


def test_what_counts_as_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_fusekit.errors import CheckpointError

    def raises(error: Exception) -> None:
        def target(_: bytes) -> None:
            raise error

        monkeypatch.setitem(TARGETS, "broken", target)

    raises(CheckpointError("one line"))
    run("broken", b"")
    raises(KeyError("dtype"))
    with pytest.raises(KeyError):
        run("broken", b"")


def test_a_reader_that_does_not_end_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(_: bytes) -> None:
        while True:
            pass

    monkeypatch.setattr("fuzz.targets.MOST_SECONDS", 0.05)
    monkeypatch.setitem(TARGETS, "broken", hangs)
    with pytest.raises(BrokenPromiseError, match="more than"):
        run("broken", b"")


def test_a_reader_that_takes_memory_without_end_is_a_finding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks = iter((1_000, 400_000_000))
    monkeypatch.setattr("fuzz.targets._peak_bytes", lambda: next(peaks))
    monkeypatch.setitem(TARGETS, "broken", lambda _: None)
    with pytest.raises(BrokenPromiseError, match="took 400 MB"):
        run("broken", b"")


def test_mutated_json_stays_json() -> None:
    import json

    content = b'{"a": [1, {"b": "c"}], "d": 4.0}'
    seen = {mutated_json(content, seed) for seed in range(200)}
    assert len(seen) > 100
    for changed in seen:
        assert changed is not None
        json.loads(changed)
    assert mutated_json(b"{", 0) is None
    assert DIVIDER not in b"".join(x for x in seen if x)
