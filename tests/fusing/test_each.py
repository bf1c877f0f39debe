"""Several adapters, each fused by itself: the bytes of single fuses, and one pass over the base."""

import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from support.command import exit_code
from support.exportable import make_exportable
from support.folders import as_hugging_face, unstacked
from support.tiny import EXPERTS, LINEARS, LLAMA, QWEN3_MOE, make_adapter, make_model, save_adapter

from mlx_fusekit import fuse, fuse_each, prepare_each, prepare_fuse, samples
from mlx_fusekit.checkpoint import copying
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.checkpoint.header import TensorRef
from mlx_fusekit.errors import AdapterError, CheckpointError, ConfigurationError
from mlx_fusekit.fusing import one_pass
from mlx_fusekit.fusing.named import saved_names
from mlx_fusekit.fusing.prepared import PreparedFuse
from mlx_fusekit.hub import LocalFolder
from mlx_fusekit.requantize.needs import memory_needs
from mlx_fusekit.running import loading, shared

QV = ["self_attn.q_proj", "self_attn.v_proj"]
MOE = [*EXPERTS, "mlp.gate", "self_attn.q_proj"]
FLOAT16: dict[str, Any] = {"dtype": mx.float16}
#: Configuration and format of a base, and how to fuse.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "4 bits": (LLAMA, {}, {}),
    "3 bits to 8": (LLAMA, {"bits": 3}, {"bits": 8}),
    "mixed": (LLAMA, {"mixed": {"down_proj": {"bits": 8, "group_size": 32}, "k_proj": False}}, {}),
    "mxfp4": (LLAMA, {"mode": "mxfp4", "group_size": 32}, {}),
    "float": (LLAMA, {"bits": None}, {}),
    "dequantized": (LLAMA, {}, {"dequantize": True, "dtype": "float16"}),
    "nvfp4 experts": (QWEN3_MOE, {"mode": "nvfp4", "group_size": 16, "global_scale": True}, {}),
    "converted experts": (QWEN3_MOE, {"bits": None}, {}),
}


def content(folder: Path) -> dict[str, bytes]:
    """Of all files of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def adapters(folder: Path, base: Path) -> list[Path]:
    """Adapters that change nothing, much, little, and what no other does."""
    moe = "moe" in Checkpoint.open(base).config["model_type"]
    found = [
        make_adapter(folder / "still", base, keys=QV[:1], strength=0.0),
        make_adapter(folder / "all", base, keys=MOE if moe else LINEARS, rank=8),
        make_adapter(folder / "last", base, keys=QV, num_layers=1, seed=2),
    ]
    if not moe:
        found.append(make_adapter(folder / "dora", base, kind="dora", keys=QV, seed=3))
        tensors = {
            "model.layers.1.mlp.up_proj.weight": mx.random.normal((256, 128)) * 0.1,
            "model.norm.weight": 1 + mx.random.normal((128,)) * 0.1,
        }
        found.append(save_adapter(folder / "full", tensors, kind="full"))
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base") / "base", **FLOAT16)


@pytest.fixture(scope="module")
def sql(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("sql") / "sql", base, keys=QV)


@pytest.fixture(scope="module")
def style(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("style") / "style", base, seed=2)


@pytest.fixture(scope="module")
def loud(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter whose merged weights no float16 scale holds: it fails while it is written."""
    folder = tmp_path_factory.mktemp("loud") / "loud"
    return make_adapter(folder, base, keys=QV, strength=1e9)


@pytest.mark.parametrize("clone", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_has_the_bytes_of_a_single_fuse(tmp_path: Path, case: str, clone: bool) -> None:
    config, form, how = CASES[case]
    base = make_model(tmp_path / "base", config, **form)
    given = adapters(tmp_path, base)
    if "converted" in case:
        as_hugging_face(base, unstacked(dict(mx.load(str(base / "model.safetensors")))))
    how = {"requantize": "nearest", **how}
    report = prepare_each(base, [*given, f"{given[1]}-half:0.5"], tmp_path / "S", **how)
    assert report.failed.keys() == {f"{given[1]}-half:0.5"}  # there is no such folder
    shutil.copytree(given[1], tmp_path / "half")
    given.append(Path(f"{tmp_path / 'half'}:0.5"))
    done = prepare_each(base, given, tmp_path / "S", **how).run(clone=clone, workers=2)
    assert done.failed == {}
    for adapter in given:
        single = fuse(base, adapter, tmp_path / "single", overwrite=True, **how)
        name = adapter.name.removesuffix(":0.5")
        assert content(tmp_path / "S" / name) == content(tmp_path / "single")
        assert done.reports[name].modules == single.modules
    assert names(tmp_path / "S") == sorted(done.reports)


def test_each_byte_of_the_base_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of tensors that one adapter changes and another keeps."""
    base = make_model(tmp_path / "base")
    given = adapters(tmp_path, base)
    read: list[tuple[Path, int, int]] = []
    of_tensor, of_range = TensorRef._read, copying.copy

    def tensor(self: TensorRef, offset: int, length: int) -> Any:
        read.append((self.file, self.start + offset, length))
        return of_tensor(self, offset, length)

    def span(found: copying.CopyRange, *arguments: Any) -> None:
        read.append((found.source, found.offset, found.length))
        of_range(found, *arguments)

    prepared = prepare_each(base, given, tmp_path / "S", requantize="nearest")
    monkeypatch.setattr(TensorRef, "_read", tensor)
    monkeypatch.setattr(one_pass, "copy", span)
    prepared.run(clone=False)
    file = base / "model.safetensors"
    pieces = sorted((start, length) for path, start, length in read if path == file)
    assert len(pieces) > len(Checkpoint.open(base).tensors) / 2
    place = next(iter(Checkpoint.open(base).headers.values())).data_start
    for start, length in pieces:
        assert start == place
        place += length
    assert place == file.stat().st_size


@pytest.mark.parametrize("streamed", [False, True])
def test_calibrated_each_has_the_bytes_of_a_single_fuse(
    tmp_path: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base is loaded once, and writes its general text once.

    Where it does not fit beside what calibrating takes, it is let go after it wrote each text.
    """
    base, given = samples.model_path(), []
    for name, kind in (("first", "dora"), ("second", "lora")):
        made = make_adapter(tmp_path / name, base, kind=kind, keys=QV, num_layers=1, strength=1e-3)
        given.append(made)
    how: dict[str, Any] = {"requantize": "calibrated", "calibration_tokens": 64}
    if streamed:
        plan = prepare_fuse(base, given[0], tmp_path / "never").plan
        how["memory"] = memory_needs(plan, 64).resident - 1
    single = {}
    for adapter in given:
        fuse(base, adapter, tmp_path / "single" / adapter.name, **how)
        single[adapter.name] = content(tmp_path / "single" / adapter.name)
    loaded = []

    def load(source: LocalFolder, **more: Any) -> Any:
        loaded.append(source)
        return loading.run_model(source, **more)

    monkeypatch.setattr(shared, "run_model", load)
    report = fuse_each(base, given, tmp_path / "S", **how)
    assert {name: content(tmp_path / "S" / name) for name in report.reports} == single
    assert len(loaded) == (2 if streamed else 1)
    facts = [one.calibration for one in report.reports.values()]
    assert all(fact is not None and fact.general_tokens for fact in facts)
    assert all(fact is not None and fact.streamed == streamed for fact in facts)


def test_one_that_fails_leaves_the_others(
    base: Path, sql: Path, loud: Path, style: Path, tmp_path: Path
) -> None:
    """It fails while its blocks are written, after others were."""
    shutil.copytree(base, tmp_path / "S" / "loud")
    before = content(tmp_path / "S" / "loud")
    how: dict[str, Any] = {"requantize": "nearest", "overwrite": True}
    report = fuse_each(base, [sql, loud, style], tmp_path / "S", **how)
    with pytest.raises(AdapterError) as alone:
        fuse(base, loud, tmp_path / "alone", **how)
    # Which module is the first to fail, threads decide.
    lines = [line.partition(": ")[2] for line in (report.failed["loud"], str(alone.value))]
    assert list(report.failed) == ["loud"]
    assert lines[0] == lines[1]
    assert list(report.reports) == ["sql", "style"]
    assert names(tmp_path / "S") == ["loud", "sql", "style"]
    assert content(tmp_path / "S" / "loud") == before
    for adapter in (sql, style):
        fuse(base, adapter, tmp_path / "alone", **how)
        assert content(tmp_path / "S" / adapter.name) == content(tmp_path / "alone")


def test_the_folder_goes_again_when_nothing_came_of_it(
    base: Path, loud: Path, tmp_path: Path
) -> None:
    report = fuse_each(base, [loud], tmp_path / "new" / "S", requantize="nearest")
    assert list(report.failed) == ["loud"]
    assert names(tmp_path) == []


def test_a_bad_adapter_is_told_before_anything_is_written(
    base: Path, sql: Path, style: Path, tmp_path: Path
) -> None:
    """What is wrong with all of them is an error; what is wrong with one leaves the others."""
    shutil.copytree(sql, tmp_path / "broken")
    (tmp_path / "broken" / "adapters.safetensors").write_bytes(b"no tensors")
    target = tmp_path / "S"
    (target / "style").mkdir(parents=True)
    (target / "style" / "mine.txt").write_text("kept")
    given = [tmp_path / "broken", sql, style]
    report = prepare_each(base, given, target, requantize="nearest").report()
    assert report.dry_run
    assert list(report.reports) == ["sql"]
    assert "adapters.safetensors" in report.failed["broken"]
    assert "add --overwrite" in report.failed["style"]
    assert names(target) == ["style"]
    with pytest.raises(ConfigurationError, match="--dtype"):
        prepare_each(base, given, target, dtype="float16")
    dense = make_model(tmp_path / "dense", bits=None)
    with pytest.raises(ConfigurationError, match="the base is not quantized"):
        prepare_each(dense, [sql, style], tmp_path / "T", bits=8)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"upload_repo": "me/it"}, "--upload-repo me/it: a repository holds one model"),
        ({"combine": "ties"}, "--combine ties: --each fuses every adapter by itself"),
        ({"scale": 3.0}, "--scale 3: goes with one --adapter-path"),
        ({"export_gguf": True, "gguf_path": "../m.gguf"}, "give a name without folders"),
        ({"export_gguf": True, "gguf_path": "/m.gguf"}, "give a name without folders"),
        ({"ignore": ["vision*"]}, "matches no module"),
    ],
)
def test_options_that_make_no_sense_of_each(
    base: Path, sql: Path, style: Path, tmp_path: Path, options: dict[str, Any], line: str
) -> None:
    with pytest.raises(ConfigurationError, match=line):
        fuse_each(base, [sql, style], tmp_path / "S", **options)
    assert names(tmp_path) == []


def test_options_that_concern_each_by_itself(
    base: Path, sql: Path, style: Path, tmp_path: Path
) -> None:
    """One adapter has a scale, and a pattern need not match in all of them."""
    fuse_each(base, [sql], tmp_path / "S", scale=3.0, requantize="nearest")
    fuse(base, sql, tmp_path / "single", scale=3.0, requantize="nearest")
    assert content(tmp_path / "S" / "sql") == content(tmp_path / "single")
    report = prepare_each(base, [sql, style], tmp_path / "T", ignore=["*mlp*"]).report()
    assert report.failed == {}


def local(*paths: str) -> list[LocalFolder]:
    return [LocalFolder(Path(path)) for path in paths]


def test_names_are_those_of_the_folders() -> None:
    hub = LocalFolder(Path("/cache/snapshots/abc"), "me/sql-lora", "abc")
    assert saved_names([*local("runs/style", "../poems/"), hub]) == ["style", "poems", "sql-lora"]
    alike = [*local("a/adapters", "b/Adapters"), LocalFolder(Path("x"), "me/sql")]
    assert saved_names(alike) == ["a-adapters", "b-Adapters", "sql"]


@pytest.mark.parametrize(
    ("paths", "line"),
    [
        (["runs/sql", "runs/sql"], "both would be saved as runs-sql"),
        (["é", unicodedata.normalize("NFD", "é")], "both would be saved"),
        (["a/x", "b/x", "a-x"], "both would be saved as a-x"),
        ([".hidden"], "rename the adapter's folder"),
        (["/"], "rename the adapter's folder"),
    ],
)
def test_names_that_no_folders_can_have(paths: list[str], line: str) -> None:
    with pytest.raises(ConfigurationError, match=line):
        saved_names(local(*paths))


def test_an_interrupt_leaves_what_is_finished(
    base: Path, sql: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = PreparedFuse.complete

    def interrupted(self: PreparedFuse, *arguments: Any) -> None:
        if self.target.path.name == "style":
            raise KeyboardInterrupt
        complete(self, *arguments)

    monkeypatch.setattr(PreparedFuse, "complete", interrupted)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fuse_each(base, [sql, style], tmp_path / "S", requantize="nearest")
    assert stopped.value.__notes__ == [
        f"sql in {tmp_path / 'S'} finished before; nothing half-made was left behind"
    ]
    assert names(tmp_path / "S") == ["sql"]


def test_a_base_that_cannot_be_read_is_an_error_for_all(
    base: Path, sql: Path, style: Path, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(base, tmp_path / "base"))
    prepared = prepare_each(broken, [sql, style], tmp_path / "S", requantize="nearest")
    os.truncate(broken / "model.safetensors", (broken / "model.safetensors").stat().st_size // 2)
    with pytest.raises(CheckpointError, match=r"changed while|shorter while"):
        prepared.run(clone=False)
    assert names(tmp_path) == ["base"]


def test_a_gguf_file_in_each_folder(tmp_path: Path) -> None:
    base = make_exportable(tmp_path / "base", LLAMA | {"attention_bias": False})
    given = [make_adapter(tmp_path / name, base, keys=QV) for name in ("first", "second")]
    how: dict[str, Any] = {"requantize": "nearest", "export_gguf": True, "gguf_path": "it.gguf"}
    fuse_each(base, given, tmp_path / "S", **how)
    # Its metadata has the folder's name.
    fuse(base, given[1], tmp_path / "single" / "second", **how)
    assert content(tmp_path / "S" / "second") == content(tmp_path / "single" / "second")
    assert "it.gguf" in names(tmp_path / "S" / "first")


def test_the_command_tells_of_each(
    base: Path,
    sql: Path,
    style: Path,
    loud: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def command(*more: str, given: tuple[Path, ...] = (sql, style)) -> int:
        paths = [part for path in given for part in ("--adapter-path", str(path))]
        asked = ["fuse", "--each", "--model", str(base), *paths, "--save-path", str(tmp_path / "S")]
        return exit_code(monkeypatch, *asked, *more)

    assert command("--requantize", "nearest", "--json", given=(sql, loud)) == 1
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert [one["name"] for one in report["each"]] == ["sql"]
    assert report["each"][0]["save_path"] == str(tmp_path / "S" / "sql")
    assert [one["adapter"] for one in report["failed"]] == ["loud"]
    assert "too large" in report["failed"][0]["error"]
    assert "error: 1 of 2 adapters failed" in printed.err
    # Nothing is measured, and so the bound does not count as kept.
    assert command("--dequantize", "--max-kl", "0.1", "--overwrite") == 3
    printed = capsys.readouterr()
    assert "Fused 2 of 2 adapters" in printed.out
    assert "style" in printed.out
    assert printed.err.count("measures no KL") == 1
    assert command("--requantize", "nearest", "--overwrite", "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out


def test_a_failure_is_not_one_of_ours(
    base: Path, sql: Path, style: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug stops all, and is not told as what an adapter did wrong."""
    written: Callable[..., int] = one_pass.WrittenWeight.write

    def wrong(self: Any, rows: Any) -> int:
        if "self_attn.v_proj" in self._step.module:
            raise AssertionError("a bug")
        return written(self, rows)

    monkeypatch.setattr(one_pass.WrittenWeight, "write", wrong)
    with pytest.raises(AssertionError, match="a bug"):
        fuse_each(base, [sql, style], tmp_path / "S", requantize="nearest")
    assert names(tmp_path) == []
