"""Files that are not what their names say, files for folders and folders for files."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.command import run
from support.exportable import copy_sample
from support.models import run_model
from support.tiny import make_model

from mlx_fusekit import export_gguf, fuse, samples, verify
from mlx_fusekit.checkpoint.folder import Checkpoint
from mlx_fusekit.errors import CheckpointError, ConfigurationError, FusekitError
from mlx_fusekit.fusing.fuse import prepare_fuse

WEIGHTS = "model.safetensors"
ADAPTER = "adapters.safetensors"

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 2471645608\n"
)
PAGE = "<!DOCTYPE html>\n<html><head><title>Log in</title></head></html>\n"
ANSWER = '{"error":"Repository not found"}'
REFUSAL = "Access to model owner/name is restricted.\nYou must have access to it."

IS_POINTER = "is a Git LFS pointer, not the file itself; run `git lfs pull`"
IS_PAGE = r"is a web page \(HTML or XML\), .*; download it again"
IS_FOLDER = "is a folder, where a file is expected; put the file itself there"


def holding(text: str) -> Callable[[Path], object]:
    """The file as something left it that wrote this instead."""
    return lambda path: path.write_text(text)


def as_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def renamed_gguf(path: Path) -> None:
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(56))


CASES: dict[str, tuple[str, str, Callable[[Path], object], str]] = {
    "weights, pointer": ("base", WEIGHTS, holding(POINTER), IS_POINTER),
    "weights, page": ("base", WEIGHTS, holding(PAGE), IS_PAGE),
    "weights, JSON": ("base", WEIGHTS, holding(ANSWER), "is JSON, .*; download it again"),
    "weights, text": (
        "base",
        WEIGHTS,
        holding(REFUSAL),
        r"is a text that begins with 'Access to model owner/name is restricted\.'",
    ),
    "weights, GGUF": ("base", WEIGHTS, renamed_gguf, "is a GGUF file under another name"),
    "weights, folder": ("base", WEIGHTS, as_a_folder, IS_FOLDER),
    "config, pointer": ("base", "config.json", holding(POINTER), IS_POINTER),
    "config, page": ("base", "config.json", holding(PAGE), IS_PAGE),
    "config, folder": ("base", "config.json", as_a_folder, IS_FOLDER),
    "tokenizer, pointer": ("base", "tokenizer.json", holding(POINTER), IS_POINTER),
    "tokenizer, page": ("base", "tokenizer.json", holding(PAGE), IS_PAGE),
    "tokenizer, folder": ("base", "tokenizer.json", as_a_folder, IS_FOLDER),
    "pieces, pointer": ("base", "tokenizer.model", holding(POINTER), IS_POINTER),
    "template, pointer": ("base", "chat_template.jinja", holding(POINTER), IS_POINTER),
    "adapter, pointer": ("adapter", ADAPTER, holding(POINTER), IS_POINTER),
    "adapter, page": ("adapter", ADAPTER, holding(PAGE), IS_PAGE),
    "adapter, JSON": ("adapter", ADAPTER, holding("{}"), "is JSON, .*; download it again"),
    "adapter, folder": ("adapter", ADAPTER, as_a_folder, IS_FOLDER),
    "settings, pointer": ("adapter", "adapter_config.json", holding(POINTER), IS_POINTER),
    "settings, folder": ("adapter", "adapter_config.json", as_a_folder, IS_FOLDER),
}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A base with a tokenizer, and its adapter."""
    shutil.copytree(samples.adapter_path(), tmp_path / "adapter")
    return copy_sample(tmp_path / "base"), tmp_path / "adapter"


@pytest.mark.parametrize("case", CASES)
def test_what_a_file_is_instead(folders: tuple[Path, Path], tmp_path: Path, case: str) -> None:
    place, name, spoil, told = CASES[case]
    spoil(tmp_path / place / name)
    with pytest.raises(FusekitError, match=rf"{tmp_path / place / name}: {told}") as caught:
        fuse(*folders, tmp_path / "fused")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "fused").exists()


def test_a_license_may_be_a_page(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (folders[0] / "LICENSE.html").write_text(PAGE)
    fuse(*folders, tmp_path / "fused", requantize="nearest")
    assert (tmp_path / "fused" / "LICENSE.html").read_text() == PAGE


@pytest.mark.parametrize(
    ("model", "adapter", "told"),
    [
        (f"base/{WEIGHTS}", "adapter", "--model {}: is a file; give the folder that it lies in"),
        ("base/model.gguf", "adapter", "--model {}: is a file; a GGUF file cannot be used here"),
        ("base", f"adapter/{ADAPTER}", "--adapter-path {}: is a file; give the folder that it"),
    ],
)
def test_a_file_in_the_place_of_a_folder(
    folders: tuple[Path, Path], tmp_path: Path, model: str, adapter: str, told: str
) -> None:
    renamed_gguf(folders[0] / "model.gguf")
    named = tmp_path / model, tmp_path / adapter
    wrong = next(path for path in named if path.is_file())
    with pytest.raises(FusekitError, match=told.format(wrong)):
        fuse(*named, tmp_path / "fused")


def test_commands_that_take_one_folder(folders: tuple[Path, Path], tmp_path: Path) -> None:
    file = folders[0] / WEIGHTS
    with pytest.raises(FusekitError, match=f"--fused {file}: is a file; give the folder"):
        verify(None, None, file, reference=folders[0])
    with pytest.raises(FusekitError, match=f"--model {file}: is a file; give the folder"):
        export_gguf(file, tmp_path / "model.gguf")
    assert f"PATH {file}: is a file; give the folder" in run("inspect", str(file)).stderr


def test_a_file_in_the_place_of_the_target(folders: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "fused").write_text("mine")
    with pytest.raises(FusekitError, match="fused: is a file; choose another --save-path"):
        fuse(*folders, tmp_path / "fused", overwrite=True)
    assert (tmp_path / "fused").read_text() == "mine"


def tokenizer_that_is_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(settings))
    (folder / "own.py").write_text("raise SystemExit('it ran')\n")


def model_that_is_code(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_file": "own.py"}))
    (folder / "own.py").write_text("raise SystemExit('it ran')\n")


def tokenizer_of_a_library_to_come(folder: Path) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps({**tokenizer, "model": {"type": "Nope"}}))


UNUSABLE: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokenizer is code": (
        tokenizer_that_is_code,
        "its tokenizer is code of its own, which needs --trust-remote-code",
    ),
    "model is code": (
        model_that_is_code,
        "the model is code of its own, which needs --trust-remote-code",
    ),
    "unknown to tokenizers": (
        tokenizer_of_a_library_to_come,
        r"its tokenizer cannot be loaded \(.*\); update transformers, or .*",
    ),
}


@pytest.mark.parametrize("requantize", ["auto", "calibrated"])
@pytest.mark.parametrize("case", UNUSABLE)
def test_a_fine_tune_is_not_lost_without_a_word(
    folders: tuple[Path, Path], tmp_path: Path, case: str, requantize: str
) -> None:
    """Said while planning, so before anything is loaded or written."""
    spoil, told = UNUSABLE[case]
    spoil(folders[0])
    line = f"--requantize {requantize}: {folders[0]}: {told}; --requantize nearest works without"
    with pytest.raises(ConfigurationError, match=line) as caught:
        prepare_fuse(*folders, tmp_path / "fused", requantize=requantize)
    assert "\n" not in str(caught.value)
    report = fuse(*folders, tmp_path / "fused", requantize="nearest")
    assert report.requantize == "nearest"


def test_a_name_that_mlx_lm_does_not_look_for(tmp_path: Path) -> None:
    for name, words in (
        ("weights.00.safetensors", "has a name that mlx-lm does not look for"),
        ("weights.npz", "is of an old mlx-lm"),
        ("pytorch_model.bin", "is pickled"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / name).write_bytes(b"")
        (folder / f"._{name}").write_bytes(b"")
        with pytest.raises(CheckpointError, match=f"; {name} {words}; download the original"):
            Checkpoint.open(folder)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "config.json").write_text("{}", encoding)
    with pytest.raises(CheckpointError, match="begins with a byte order mark"):
        Checkpoint.open(tmp_path)


def test_a_download_that_did_not_finish(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(4096))
    with pytest.raises(CheckpointError, match=r"begins with zeros: the download did not finish"):
        Checkpoint.open(tmp_path)


def test_a_link_to_nothing(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="is a link to a file that is not there"):
        Checkpoint.open(tmp_path)


def test_brackets_in_the_path_of_a_base(tmp_path: Path) -> None:
    """mlx-lm looks for ``model*.safetensors`` with the whole path as a pattern."""
    folder = make_model(tmp_path / "Tiny [4bit]")
    with pytest.raises(CheckpointError, match="takes the brackets in this path for a pattern"):
        run_model(folder)


def test_a_number_of_too_many_digits(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Checkpoint.open(tmp_path)
