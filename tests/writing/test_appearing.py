"""What lies at a target at the end of a run, and what killed runs left, is the user's."""

import ast
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_fusekit.errors import OutputError
from mlx_fusekit.writing import calls, held
from mlx_fusekit.writing.staging import staged, temporary_folder, write_file
from mlx_fusekit.writing.targets import FileTarget, FolderTarget


def refusal(folder: Path) -> str | None:
    """Only folders with a marker in them are replaced."""
    return None if (folder / "marker").exists() else "has no marker"


def folder_target(path: Path, **how: Any) -> FolderTarget:
    return FolderTarget(path, "--flag", refusal, **how)


def make_folder(path: Path, content: str, name: str = "marker") -> Path:
    path.mkdir(parents=True)
    (path / name).write_text(content)
    return path


def a_folder_with_notes(path: Path) -> None:
    make_folder(path, "mine", "notes.txt")


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_link_to_a_folder(path: Path) -> None:
    make_folder(path.with_name("elsewhere"), "mine")
    path.symlink_to("elsewhere")


def a_link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


APPEARANCES = [a_folder_with_notes, a_file, a_link_to_a_folder, a_link_to_nothing, a_pipe]


def looks(folder: Path) -> dict[str, Any]:
    """All that lies in a folder: kinds, where links lead, and contents."""
    return {
        str(path.relative_to(folder)): (
            stat.S_IFMT(path.lstat().st_mode),
            path.is_symlink() and path.readlink(),
            path.read_text() if path.is_file() else None,
        )
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("appear", APPEARANCES)
@pytest.mark.parametrize("unseen", [False, True])
def test_what_appears_where_a_folder_goes_is_left(
    tmp_path: Path,
    appear: Callable[[Path], None],
    overwrite: bool,
    unseen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Even when it appears behind the last look."""
    target = tmp_path / "target"
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "target"
    appear(other)
    expected = looks(tmp_path / "other")
    staging = staged(folder_target(target, overwrite=overwrite))
    with pytest.raises(OutputError), staging as folder:
        (folder / "marker").write_text("ours")
        shutil.rmtree(tmp_path / "other")
        appear(target)
        if unseen:
            monkeypatch.setattr(FolderTarget, "check", lambda self: None)
    assert looks(tmp_path) == expected


@pytest.mark.parametrize("appear", APPEARANCES)
@pytest.mark.parametrize("unseen", [False, True])
def test_what_appears_where_a_file_goes_is_left(
    tmp_path: Path,
    appear: Callable[[Path], None],
    unseen: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "other").mkdir()
    appear(tmp_path / "other" / "target")
    expected = looks(tmp_path / "other")
    staging = staged(FileTarget(tmp_path / "target", "--flag"))
    with pytest.raises(OutputError), staging as file:
        file.write_text("ours")
        shutil.rmtree(tmp_path / "other")
        appear(tmp_path / "target")
        if unseen:
            monkeypatch.setattr(FileTarget, "check", lambda self: None)
    assert looks(tmp_path) == expected


@pytest.mark.parametrize("flagged", [True, False])
def test_a_name_that_is_taken_is_not_replaced(
    tmp_path: Path, flagged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the system's flag for it, and without."""
    if not flagged:
        monkeypatch.setattr(calls, "_rename_flagged", unsupported)
    for name in ("ours", "free"):
        (tmp_path / name).write_text(name)
    (tmp_path / "theirs").write_text("theirs")
    with pytest.raises(calls.WriteError, match="exists"):
        calls.rename_new(tmp_path / "ours", tmp_path / "theirs")
    calls.rename_new(tmp_path / "free", tmp_path / "new")
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names == {"ours": "ours", "theirs": "theirs", "new": "free"}


def unsupported(*_: object) -> None:
    raise OSError(calls.errno.ENOSYS, "no such call")


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    with staged(folder_target(tmp_path / "target")) as folder:
        (folder / "marker").write_text("ours")
    assert (tmp_path / "target" / "marker").read_text() == "ours"


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_is_replaced(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(calls, "_rename_flagged", unsupported)
    make_folder(tmp_path / "target", "old")
    (tmp_path / "target" / "more").mkdir()
    with staged(folder_target(tmp_path / "target", overwrite=True)) as folder:
        (folder / "marker").write_text("new")
        assert (tmp_path / "target" / "marker").read_text() == "old"
    assert (tmp_path / "target" / "marker").read_text() == "new"
    assert looks(tmp_path).keys() == {"target", "target/marker"}


def test_a_folder_that_became_another_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last look and the exchange."""
    make_folder(tmp_path / "target", "old")
    with (
        pytest.raises(OutputError, match="has no marker"),
        staged(folder_target(tmp_path / "target", overwrite=True)) as folder,
    ):
        (folder / "marker").write_text("new")
        (tmp_path / "target" / "marker").rename(tmp_path / "target" / "notes")
        monkeypatch.setattr(FolderTarget, "check", lambda self: None)
    assert looks(tmp_path).keys() == {"target", "target/notes"}
    assert (tmp_path / "target" / "notes").read_text() == "old"


def test_a_second_rename_that_fails_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "exchange", lambda first, second: False)
    make_folder(tmp_path / "target", "old")
    real, seen = calls.rename, []

    def rename(source: Path, target: Path) -> None:
        seen.append(source.name)
        if len(seen) == 3:  # after the attempt without replacing, and moving the old one away
            raise calls.WriteError(calls.errno.EIO, "broken")
        real(source, target)

    monkeypatch.setattr(calls, "rename", rename)
    with (
        pytest.raises(OutputError, match="its disk failed; nothing was left behind"),
        staged(folder_target(tmp_path / "target", overwrite=True)) as folder,
    ):
        (folder / "marker").write_text("new")
    assert len(seen) == 4
    assert (tmp_path / "target" / "marker").read_text() == "old"
    assert looks(tmp_path).keys() == {"target", "target/marker"}


def test_what_was_being_replaced_when_a_run_was_killed_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "target"
    make_folder(tmp_path / ".target.fusekit-old-1234", "old")
    with pytest.raises(OutputError, match="exists already"), staged(folder_target(target)):
        pass
    assert (target / "marker").read_text() == "old"
    assert looks(tmp_path).keys() == {"target", "target/marker"}


def test_what_was_replaced_when_a_run_was_killed_goes(tmp_path: Path) -> None:
    new = make_folder(tmp_path / "target", "new")
    make_folder(held.old_name(new, new), "old")
    held.put_in_order(new)
    assert looks(tmp_path).keys() == {"target", "target/marker"}
    assert (new / "marker").read_text() == "new"


def test_the_only_copy_of_a_replaced_folder_stays(tmp_path: Path) -> None:
    """Its place was taken by something that no run of ours put there."""
    target = make_folder(tmp_path / "target", "somebody's")
    old = make_folder(tmp_path / f".target.fusekit-old-{target.stat().st_ino + 1:x}", "old")
    held.put_in_order(target)
    assert (old / "marker").read_text() == "old"
    assert (target / "marker").read_text() == "somebody's"


def test_a_run_that_lives_is_not_disturbed(tmp_path: Path) -> None:
    with staged(folder_target(tmp_path / "target")) as folder:
        old = make_folder(tmp_path / ".target.fusekit-old-1", "old")
        held.put_in_order(tmp_path / "target")
        assert old.exists()
        assert folder.exists()
        shutil.rmtree(old)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_staging_that_something_removes_is_told(tmp_path: Path, kind: str) -> None:
    target: FolderTarget | FileTarget = folder_target(tmp_path / "target")
    if kind == "file":
        target = FileTarget(tmp_path / "target", "--flag")
    told = r"target: something removed \.target\.fusekit-new-.*run it again"
    with pytest.raises(OutputError, match=told), staged(target) as path:
        shutil.rmtree(path) if kind == "folder" else path.unlink()
        (path / "file" if kind == "folder" else path).stat()  # as whoever goes on writing
    with pytest.raises(OutputError, match=told), staged(target) as path:
        shutil.rmtree(path) if kind == "folder" else path.unlink()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("number", [calls.errno.ENOLCK, calls.errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_written_to(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a run lives cannot be known there, so nothing is taken for a killed one's."""
    real = calls._once

    def once(call: Callable[..., Any], *arguments: Any) -> Any:
        if call is calls.fcntl.flock:
            raise OSError(number, os.strerror(number))
        return real(call, *arguments)

    monkeypatch.setattr(calls, "_once", once)
    other = make_folder(tmp_path / ".target.fusekit-new-01234567", "somebody's")
    with staged(folder_target(tmp_path / "target")) as folder:
        (folder / "marker").write_text("ours")
    assert (tmp_path / "target" / "marker").read_text() == "ours"
    assert other.exists()


def test_a_link_is_replaced_by_no_file(tmp_path: Path) -> None:
    """As of a report into the Hub's cache, through a link."""
    (tmp_path / "blob").write_text("theirs")
    (tmp_path / "link").symlink_to("blob")
    target = FileTarget(tmp_path / "link", "--json", overwrite=True)
    with pytest.raises(OutputError, match="link: is a link; give the file itself as --json"):
        write_file(target, b"ours")
    assert (tmp_path / "blob").read_text() == "theirs"


@pytest.mark.parametrize("kind", ["pipe", "socket", "device", "folder"])
def test_only_a_file_is_replaced_by_a_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = Path("/dev/null")
    else:
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.close()
    before = path.stat().st_mode
    with pytest.raises(OutputError, match=r"is a device or pipe|is a folder"):
        write_file(FileTarget(path, "--json", overwrite=True), b"ours")
    assert path.stat().st_mode == before


@pytest.mark.parametrize("where", [".", "..", "../..", "/"])
def test_the_current_folder_is_not_replaced(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "a" / "b", "old")
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(OutputError, match=r"is the current folder, or holds it|is a mount point"):
        folder_target(Path(where), overwrite=True).check()


def test_a_mount_point_is_found_before_the_work() -> None:
    with pytest.raises(OutputError, match="is a mount point"):
        FolderTarget(Path("/proc"), "--save-path", lambda _: None, overwrite=True).check()


def test_links_in_a_circle_are_told(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OutputError, match="--flag"):
        folder_target(tmp_path / "a" / "target").check()
    with pytest.raises(OutputError, match="is a link"):
        FileTarget(tmp_path / "a", "--json").check()


def test_temporary_folders_of_killed_runs_go_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held.tempfile, "tempdir", str(tmp_path))
    ours = ".mlx-fusekit-tmp-0123456789abcdef"
    make_folder(tmp_path / ours, "left")
    kept = {"mlx-fusekit-notes", ".mlx-fusekit-tmp-notes", "other"}
    for name in kept:
        make_folder(tmp_path / name, "the user's")
    with temporary_folder() as running, temporary_folder() as second:
        assert running.stat().st_mode & 0o777 == 0o700
        assert running.exists()
        assert second.exists()
        make_folder(second / "more", "x")
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_removing_follows_no_link(tmp_path: Path) -> None:
    outside = make_folder(tmp_path / "outside", "theirs")
    inside = make_folder(tmp_path / "inside", "ours")
    (inside / "link").symlink_to(outside)
    held.remove(inside)
    assert looks(tmp_path).keys() == {"outside", "outside/marker"}


#: Of paths.
METHODS = {
    *("write_text", "write_bytes", "touch", "mkdir", "rmdir", "unlink", "rename", "symlink_to"),
    *("hardlink_to", "chmod", "tofile"),
}
#: Of modules.
WRITING = {
    "os": {
        *("write", "pwrite", "rename", "replace", "remove", "unlink", "rmdir", "mkdir", "makedirs"),
        *(
            "link",
            "symlink",
            "truncate",
            "ftruncate",
            "fsync",
            "chmod",
            "copy_file_range",
        ),
    },
    "shutil": {"copy", "copy2", "copyfile", "copytree", "move", "rmtree", "make_archive"},
    "tempfile": {
        *("mkstemp", "mkdtemp", "NamedTemporaryFile", "TemporaryDirectory", "TemporaryFile"),
    },
}


def writing_calls(source: str) -> set[str]:
    """Calls in a module that write to the disk by themselves."""
    return {
        ast.unparse(node)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and _writes(node)
    }


def _writes(node: ast.Call) -> bool:
    owner, _, name = ast.unparse(node.func).rpartition(".")
    modes = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "mode")]
    mode = ast.unparse(modes[0]) if modes else ""
    if name == "open" and owner == "os":
        return "O_CREAT" in mode or "O_TRUNC" in mode
    if name == "open" and not owner:
        return any(letter in mode for letter in "wxa+")
    if owner in WRITING:
        return name in WRITING[owner]
    return name in METHODS and owner != "calls"


def test_only_one_module_makes_calls_that_write() -> None:
    """Whatever else wrote could not be made to fail by the tests of faults."""
    package = Path(calls.__file__).parents[1]
    found = {
        str(path.relative_to(package)): made
        for path in package.rglob("*.py")
        if (made := writing_calls(path.read_text()))
    }
    # What stdout and stderr are where they are closed, the traceback of a bug of ours, and the last
    # words of a rank that cannot wait any longer.
    assert found.keys() == {"cli/streams.py", "cli/failures.py", "launched.py"}
    assert {made.partition("(")[0] for made in found["launched.py"]} == {"os.write"}
    assert found["cli/streams.py"] == {"open(os.devnull, 'w', encoding='utf-8')"}
    assert {made.partition("(")[0] for made in found["cli/failures.py"]} == {
        "tempfile.mkstemp",
        "open",
    }


@pytest.mark.parametrize(
    "line",
    ["path.write_text('')", "open(path, 'w')", "os.rename(a, b)", "open(p, mode='xb')"],
)
def test_a_call_that_writes_is_seen(line: str) -> None:
    assert writing_calls(line)
