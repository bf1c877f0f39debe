"""What is no file, or no file of the model's, in the place of every file that is read."""

import os
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.tiny import make_adapter, make_model

from mlx_fusekit.checkpoint.folder import read_json
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.exercise.check import check_report
from mlx_fusekit.fusing.fuse import prepare_fuse
from mlx_fusekit.gguf.file.header import read_gguf_header
from mlx_fusekit.publishing.files import PublishedModel
from mlx_fusekit.texts.data import check_text

HUGE = 1 << 41


def pipe(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        here = Path.cwd()
        os.chdir(path.parent)  # a long name does not fit into an address
        try:
            end.bind(path.name)
        finally:
            os.chdir(here)


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def secret(path: Path) -> Path:
    """A file of the user's beside the folder, with what the one in the folder had."""
    outside = path.parent.parent / f"secret-{path.name}"
    shutil.copy(path.parent / f"{path.name}.kept", outside)
    return outside


def link_out(path: Path) -> None:
    path.symlink_to(secret(path))


def chain_out(path: Path) -> None:
    (path.parent / "inside").symlink_to(secret(path))
    path.symlink_to("inside")


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.parent / "the-pipe")
    path.symlink_to("the-pipe")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, HUGE)


#: What lies there, by name. No file is read through the links: they lead out of the model's folder.
ODD: dict[str, Callable[[Path], None]] = {
    "pipe": pipe,
    "socket": bound_socket,
    "folder": Path.mkdir,
    "link to a pipe": link_to_a_pipe,
    "link to a folder": link_to("."),
    "link to /dev/zero": link_to("/dev/zero"),
    "link to /dev/full": link_to("/dev/full"),
    "link to nothing": link_to("gone"),
    "link to itself": link_to("itself"),
    "link to what a process has": link_to("/proc/self/environ"),
    "link to a file of the user's": link_out,
    "link to a link to one": chain_out,
    "link with a NUL's neighbour": link_to("a" * 255),
    "link to a name that is too long": link_to("a" * 300),
    "two terabytes of nothing": huge,
}
OUT = ("link to a file of the user's", "link to a link to one")
MODEL = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "vocab.txt",
    "chat_template.jinja",
    "fusekit.json",
    "LICENSE",
)
ADAPTER = ("adapter_config.json", "adapters.safetensors")
#: Files that a user names, and their readers.
NAMED: dict[str, Callable[[Path], object]] = {
    "data.jsonl": check_text,
    "notes.txt": check_text,
    "bench.json": read_json,
    "report.md": lambda path: check_report(path, any_machine=True),
    "model.gguf": read_gguf_header,
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    make_adapter(folder / "adapter", make_model(folder / "base"))
    for name in MODEL:
        path = folder / "base" / name
        if not path.exists():
            path.write_text("{}" if path.suffix == ".json" else "text")
    index = folder / "base" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"x": "model.safetensors"}}')
    return folder


@pytest.fixture
def in_time() -> Iterator[None]:
    """What waits without end fails; each refusal takes a second at the most."""

    def too_long(*_: object) -> None:
        raise AssertionError("it waits without end")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    start = time.process_time()
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < 1


def put(path: Path, kind: str) -> None:
    """Put what is odd in the place of a file."""
    if path.exists():
        path.rename(f"{path}.kept")
    else:
        Path(f"{path}.kept").write_text("text")
    if kind == "link to itself":
        path.symlink_to(path.name)
    else:
        ODD[kind](path)


def is_one_line(error: FusekitError, path: Path) -> None:
    assert "\n" not in str(error)
    assert path.name in str(error)
    assert len(str(error)) < 1000


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", [*MODEL, *ADAPTER])
def test_in_the_place_of_a_file_of_a_model(
    name: str, kind: str, sources: Path, tmp_path: Path, in_time: None
) -> None:
    folder = "adapter" if name in ADAPTER else "base"
    for copied in ("base", "adapter"):
        shutil.copytree(sources / copied, tmp_path / copied)
    put(tmp_path / folder / name, kind)
    with pytest.raises(FusekitError) as refused:
        prepare_fuse(tmp_path / "base", tmp_path / "adapter", tmp_path / "fused")
    is_one_line(refused.value, tmp_path / folder / name)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", NAMED)
def test_in_the_place_of_a_file_that_is_named(
    name: str, kind: str, tmp_path: Path, in_time: None
) -> None:
    (tmp_path / "here").mkdir()
    path = tmp_path / "here" / name
    put(path, kind)
    if kind in OUT and name in ("data.jsonl", "notes.txt"):
        assert NAMED[name](path) is None  # whoever names a link means what it leads to
        return
    with pytest.raises(FusekitError) as refused:
        NAMED[name](path)
    is_one_line(refused.value, path)


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.parametrize("name", ["LICENSE", "README.md", "Modelfile"])
def test_in_the_place_of_what_is_published(
    name: str, kind: str, sources: Path, tmp_path: Path, in_time: None
) -> None:
    shutil.copytree(sources / "base", tmp_path / "base")
    put(tmp_path / "base" / name, kind)
    try:
        model = PublishedModel.open(tmp_path / "base")
        assert name not in model.names
        assert model.card is None
    except FusekitError as error:
        is_one_line(error, tmp_path / "base" / name)
