"""What lies in a file's place instead of it: a pointer, an error page, a file of another kind.

Without Git LFS a clone has pointers, and without a login or the right name, what was downloaded is
a page or a text that says so.
"""

from collections.abc import Callable
from pathlib import Path

from mlx_fusekit.reading import exists, not_regular, open_file

#: What is read of a file to tell what it is.
BEGINNING = 64

_LFS_POINTER = b"version https://git-lfs."
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<error")
_DOWNLOAD = "as a failed download leaves it; download it again"


def lfs_pointer(first: bytes) -> str | None:
    """That a file with these first bytes is a pointer, and the cure; None where it is not."""
    if not first.startswith(_LFS_POINTER):
        return None
    return "is a Git LFS pointer, not the file itself; run `git lfs pull`, or download it again"


def not_json(first: bytes) -> str | None:
    """What a file is that must be JSON, and the cure; None where its first bytes do not tell."""
    if (told := lfs_pointer(first)) is not None:
        return told
    if first.lstrip().lower().startswith(_PAGES):
        return f"is a web page (HTML or XML), {_DOWNLOAD}"
    return None


def not_safetensors(first: bytes) -> str | None:
    """What a file is that must be safetensors, and the cure; None where it cannot be told."""
    if (told := not_json(first)) is not None:
        return told
    if first.startswith(b"GGUF"):
        return "is a GGUF file under another name; use the model in safetensors format"
    if first and not first.strip(b"\0"):
        return "begins with zeros: the download did not finish; download it again"
    text = first[:BEGINNING].strip()
    if text.startswith((b"{", b"[")):
        return f"is JSON, {_DOWNLOAD}"
    if text and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in text):
        return f"is a text that begins with {text.decode().splitlines()[0]!r}, {_DOWNLOAD}"
    return None


def mistaken_file(path: Path, told_by: Callable[[bytes], str | None] = not_json) -> str | None:
    """As one of the functions above, of a file that is not open; or what else it is."""
    if (what := not_regular(path)) is not None:
        return f"{what}, where a file is expected; put the file itself there"
    if path.is_symlink() and not exists(path):
        return "is a link to a file that is not there; download it again, or remove the link"
    try:
        with open_file(path) as file:
            return told_by(file.read(BEGINNING))
    except OSError:
        return None  # whoever reads all of it says why it cannot be read
