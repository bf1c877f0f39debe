"""Weight files and their index as they lie on people's disks: mlx-lm loads what is there."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model
from support.command import run
from support.exportable import copy_sample
from support.folders import as_hugging_face, unstacked
from support.tiny import (
    EXPERTS,
    LINEARS,
    QWEN3_MOE,
    in_float32,
    logits,
    make_adapter,
    make_model,
    teacher_layers,
)

from mlx_fusekit import fuse, samples, verify
from mlx_fusekit.checkpoint.belongings import INDEX_NAME
from mlx_fusekit.checkpoint.folder import Checkpoint, index_fault
from mlx_fusekit.checkpoint.sanitized import SanitizedModel, open_base
from mlx_fusekit.errors import CheckpointError
from mlx_fusekit.inspecting import inspect
from mlx_fusekit.publishing.files import PublishedModel

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
WHOLE = "model.safetensors"


def stored(folder: Path) -> dict[str, mx.array]:
    """All tensors of a folder, as mlx-lm collects them."""
    tensors: dict[str, mx.array] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        tensors |= mx.load(str(path))
    mx.eval(tensors)
    return tensors


def set_index(folder: Path, weight_map: Any) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(content))


def in_two_files(folder: Path) -> dict[str, str]:
    """Cut the weights into two files with a true index; where each tensor is now."""
    tensors = stored(folder)
    placed = {name: SECOND if ".layers.1." in name else FIRST for name in tensors}
    for file in (FIRST, SECOND):
        part = {name: tensors[name] for name in tensors if placed[name] == file}
        mx.save_safetensors(str(folder / file), part, {"format": "mlx"})
    (folder / WHOLE).unlink()
    set_index(folder, placed)
    return placed


def requantized_into_one_file_beside_the_index_of_two(folder: Path) -> None:
    names = Checkpoint.open(folder).tensors
    set_index(folder, {name: (FIRST, SECOND)[n % 2] for n, name in enumerate(names)})


def indexed_with_a_tensor_that_loading_drops(folder: Path) -> None:
    """Old Llamas list their rotary frequencies, here in a file that nobody has any more."""
    placed = in_two_files(folder)
    lost = "model.layers.0.self_attn.rotary_emb.inv_freq"
    set_index(folder, {**placed, lost: "model-00003-of-00003.safetensors"})


def indexed_with_an_empty_map(folder: Path) -> None:
    set_index(folder, {})


def indexed_by_a_page_that_says_no(folder: Path) -> None:
    (folder / INDEX_NAME).write_text("<!DOCTYPE html><title>404</title>")


def indexed_for_other_files_of_the_same_names(folder: Path) -> None:
    other = {FIRST: SECOND, SECOND: FIRST}
    set_index(folder, {name: other[file] for name, file in in_two_files(folder).items()})


def indexed_before_a_file_was_added(folder: Path) -> None:
    placed = in_two_files(folder)
    set_index(folder, {name: file for name, file in placed.items() if file == FIRST})


STALE: dict[str, tuple[Callable[[Path], None], str]] = {
    "one file, index of two": (
        requantized_into_one_file_beside_the_index_of_two,
        rf"names {FIRST} \(and 1 more\), which is not there",
    ),
    "dropped tensor": (
        indexed_with_a_tensor_that_loading_drops,
        r"names model-00003-of-00003\.safetensors, which is not there",
    ),
    "empty map": (indexed_with_an_empty_map, "has no weight_map"),
    "a page": (indexed_by_a_page_that_says_no, "is no JSON object"),
    "swapped": (
        indexed_for_other_files_of_the_same_names,
        r"places .* \(and \d+ more\) in another file than the one that holds it",
    ),
    "file added": (indexed_before_a_file_was_added, f"leaves out {SECOND}"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sound")
    base = make_model(folder / "base")
    return base, make_adapter(folder / "adapter", base)


@pytest.mark.parametrize("case", STALE)
def test_a_stale_index_is_no_obstacle(sound: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    spoil, fault = STALE[case]
    base, adapter = tmp_path / "base", sound[1]
    shutil.copytree(sound[0], base)
    spoil(base)
    load_model(base)  # as mlx-lm does
    report = fuse(base, adapter, tmp_path / "fused", requantize="nearest")
    (warning,) = (line for line in report.warnings if INDEX_NAME in line)
    assert re.search(fault, warning)
    fused = Checkpoint.open(tmp_path / "fused")
    assert fused.warnings == ()
    written = json.loads((tmp_path / "fused" / INDEX_NAME).read_text())
    assert written["weight_map"] == fused.files
    assert written["metadata"]["total_size"] == sum(t.nbytes for t in fused.tensors.values())
    reference = teacher_layers(sound[0], "lora", LINEARS, 2, 4, 2.0)
    reference.load_weights(str(adapter / "adapters.safetensors"), strict=False)
    fuse(base, adapter, tmp_path / "exact", dequantize=True, dtype="float32")
    exact = load_model(tmp_path / "exact")[0]
    assert mx.abs(logits(exact) - logits(in_float32(reference))).max().item() < 1e-4
    assert index_fault(tmp_path / "exact", Checkpoint.open(tmp_path / "exact").files) is None


def test_a_true_index_stays_as_it_is(sound: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(sound[0], tmp_path / "base")
    in_two_files(tmp_path / "base")
    report = fuse(tmp_path / "base", sound[1], tmp_path / "fused", requantize="nearest")
    assert not any(INDEX_NAME in line for line in report.warnings)
    copied = (tmp_path / "fused" / INDEX_NAME).read_bytes()
    assert copied == (tmp_path / "base" / INDEX_NAME).read_bytes()


def test_a_raw_base_with_a_stale_index(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", QWEN3_MOE, bits=None)
    adapter = make_adapter(tmp_path / "adapter", base, keys=EXPERTS)
    shutil.copytree(base, tmp_path / "raw")
    raw = as_hugging_face(tmp_path / "raw", unstacked(stored(base)))
    set_index(raw, {"model.norm.weight": FIRST})
    opened = open_base(raw)
    assert isinstance(opened, SanitizedModel)
    assert len(opened.warnings) == 1
    report = fuse(raw, adapter, tmp_path / "fused")
    assert any(INDEX_NAME in line for line in report.warnings)
    fuse(base, adapter, tmp_path / "wanted")
    fused, wanted = stored(tmp_path / "fused"), stored(tmp_path / "wanted")
    assert set(fused) == set(wanted)
    assert all(mx.array_equal(fused[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_file_that_is_really_missing(
    sound: tuple[Path, Path], tmp_path: Path, indexed: bool
) -> None:
    """Without an index the numbers of the files tell; the adapter may need none of the missing."""
    base = tmp_path / "base"
    shutil.copytree(sound[0], base)
    in_two_files(base)
    (base / SECOND).unlink()
    if not indexed:
        (base / INDEX_NAME).unlink()
    with pytest.raises(ValueError, match="Missing") as theirs:
        load_model(base)
    count, *names = str(theirs.value).split("\n")
    with pytest.raises(CheckpointError, match=f"{SECOND}.*is not there") as caught:
        Checkpoint.open(base)
    line = str(caught.value)
    assert f"{count}{' '.join(names[:3]).rstrip(',')} and {len(names) - 3} more" in line
    assert line.endswith("download the model again, into an empty folder")
    assert "\n" not in line


def test_no_file_at_all_but_an_index(sound: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(sound[0], tmp_path / "base")
    (tmp_path / "base" / WHOLE).unlink()
    with pytest.raises(CheckpointError, match=rf"no model.*file \(.* names {WHOLE}, .*download"):
        Checkpoint.open(tmp_path / "base")


def test_odd_numbers_of_a_whole_model_are_nothing_to_tell(
    sound: tuple[Path, Path], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(sound[0], base)
    (base / INDEX_NAME).unlink()
    (base / WHOLE).rename(base / FIRST)
    assert Checkpoint.open(base).warnings == ()


def test_everyone_is_told(tmp_path: Path) -> None:
    model = copy_sample(tmp_path / "model")
    adapter = samples.adapter_path()
    fuse(model, adapter, tmp_path / "fused", requantize="nearest")
    for folder in (model, tmp_path / "fused"):
        set_index(folder, {"model.norm.weight": FIRST})
    text = tmp_path / "text.txt"
    text.write_text("select name from people where age = 3;\n" * 20)
    report = verify(model, adapter, tmp_path / "fused", data=text, max_tokens=64)
    told = [line for line in report.warnings if INDEX_NAME in line]
    assert [line.split(f"/{INDEX_NAME}")[0] for line in told] == [
        str(model),
        str(tmp_path / "fused"),
    ]
    assert len(inspect(model).warnings) == 1
    assert f"{INDEX_NAME}: names {FIRST}" in run("inspect", str(model)).stderr
    published = PublishedModel.open(tmp_path / "fused")
    assert INDEX_NAME not in published.names
    reasons = {item.name: item.reason for item in published.left_out}
    assert reasons[INDEX_NAME] == f"out of date: names {FIRST}, which is not there"
    assert any(INDEX_NAME in line for line in published.warnings)
