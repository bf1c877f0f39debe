"""From any exception to one line and an exit code; a bug of ours leaves a traceback in a file."""

import errno
import io
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from typing import NoReturn

import click

from mlx_fusekit import __version__, signals
from mlx_fusekit.cli.streams import StdoutError, give_up, guarded, one_line, styled
from mlx_fusekit.errors import FusekitError
from mlx_fusekit.launched import FailedElsewhereError, first

FAILED = 1
#: What a command returns when it has done its work, but the result is not as good as was asked for.
BELOW_THRESHOLD = 3
#: What a command returns that made the best of an interrupt.
INTERRUPTED = 130

#: What a system, its disks or its user's rights can do to any of our calls, and the cure.
_OF_THE_SYSTEM = {
    errno.ENAMETOOLONG: "the name is too long for a file; give a shorter one",
    errno.ELOOP: "links that lead in a circle; name what they should lead to",
    errno.EACCES: "permission denied; check the rights of the file and its folders",
    errno.EPERM: "not permitted; check the rights of the file and its folders",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.ENOSPC: "no space left on the disk; make room, or choose another place",
    errno.EDQUOT: "your share of the disk is used up; make room, or choose another place",
    errno.EIO: "the disk failed; check it",
    errno.ESTALE: "the network disk has gone; connect it again",
    errno.EMFILE: "too many open files; raise the limit (ulimit -n)",
    errno.ENFILE: "too many open files on this machine; close some programs",
}
_SECRETS = re.compile(r"hf_\w+|(?<=\?)[^\s'\"]+|(?i:(?<=bearer )\S+)")
_LONGEST = 200
#: How long a further rank lets the first one speak.
_LISTEN_SECONDS = 2.0


def run(command: click.Command) -> NoReturn:
    """Run a command and exit: 0 done, 1 failed with a line, 2 usage, 128 + n ended by signal n.

    A command's function may return another code, such as ``BELOW_THRESHOLD``.
    """
    signals.install()
    with guarded():
        try:
            status = _status(command)
            sys.stdout.flush()
        except BaseException as error:  # noqa: BLE001 - nothing else will tell of it
            status = _told(error)
            signals.ignore()
            give_up(sys.stdout)
        signals.ignore()
        sys.stderr.flush()
    sys.exit(status)


def _status(command: click.Command) -> int:
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        found = command.main(standalone_mode=False)
    except SystemExit as ended:  # completion, and what mlx-lm's modules do
        found = ended.code
        if isinstance(found, str):
            raise FusekitError(found) from ended
    status = found if isinstance(found, int) else 0
    ended_by = signals.received()
    return ended_by.status if status == INTERRUPTED and ended_by else status


def _told(error: BaseException) -> int:
    """Say on one line what went wrong; the exit code."""
    signal = signals.received()
    if signal is not None or isinstance(error, click.exceptions.Abort | KeyboardInterrupt):
        # What was left behind on purpose is noted on the way.
        notes = _notes(error)
        if notes or first():  # the first speaks for others that leave nothing
            note = notes[0] if notes else "nothing half-made was left behind"
            say(f"{signal or 'interrupted'}; {note}", after_echo=True)
        return signal.status if signal else INTERRUPTED
    if isinstance(error, FailedElsewhereError):
        return FAILED
    if isinstance(error, click.ClickException):
        if not first():  # all ranks have the same arguments
            # The launcher ends the others with the first that ends, and that one has to speak.
            signals.ignore()
            time.sleep(_LISTEN_SECONDS)
            return error.exit_code
        error.show(shown := io.StringIO())
        usage, label, _ = shown.getvalue().partition("Error: ")
        sys.stderr.write(f"{usage}{label}{one_line(error.format_message())}\n")
        return error.exit_code
    if isinstance(error, StdoutError):
        if not error.reader_gone:
            say(f"standard output: cannot be written to ({error}); send it elsewhere")
        return FAILED
    if os.environ.get("FUSEKIT_DEBUG") == "1":
        sys.stderr.write(_without_secrets("".join(traceback.format_exception(error))))
    elif isinstance(error, FusekitError):
        say(str(error))
    else:
        say(_of_the_system(error) or _bug(error))
    return FAILED


def say(message: str, *, after_echo: bool = False) -> None:
    """An error, on one line.

    Args:
        message: what is wrong, and the cure.
        after_echo: begin a new line on a terminal, which shows ^C.
    """
    stream = styled(sys.stderr)
    if stream.isatty():
        # Unlike rich, click does not know of https://no-color.org
        label = "error:" if os.environ.get("NO_COLOR") else click.style("error:", "red", bold=True)
        stream.write("\n" * after_echo + label)
    else:
        stream.write("error:")
    stream.write(f" {one_line(message)}\n")


def _notes(error: BaseException) -> list[str]:
    """Notes of an interrupt, of which click makes an error of its own."""
    return [*getattr(error, "__notes__", ()), *getattr(error.__context__, "__notes__", ())]


def _of_the_system(error: BaseException) -> str | None:
    """What is no bug of ours, though nobody foresaw it just there."""
    if isinstance(error, MemoryError):
        return "not enough memory; close other programs, or use a smaller model"
    if not isinstance(error, OSError) or error.errno not in _OF_THE_SYSTEM:
        return None
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
    return where + _OF_THE_SYSTEM[error.errno]


def _bug(error: BaseException) -> str:
    """What to report, and the file with what else the report needs."""
    text = _without_secrets("".join(traceback.format_exception(error)))
    what = _without_secrets(str(error)).strip() or "no message"
    name = type(error).__name__
    about = f"mlx-fusekit {__version__}, Python {platform.python_version()}, {platform.platform()}"
    try:
        # Which only its owner can read.
        descriptor, path = tempfile.mkstemp(prefix="mlx-fusekit-", suffix=".txt")
        with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{about}\n\n{text}")
    except OSError:
        where = "run it again with FUSEKIT_DEBUG=1, and please report what it prints"
    else:
        where = f"please report it with this file: {path}"
    return f"a bug of mlx-fusekit ({name}: {what[:_LONGEST]}); {where}"


def _without_secrets(text: str) -> str:
    """Without tokens and signed addresses."""
    token = os.environ.get("HF_TOKEN")
    return _SECRETS.sub("...", text.replace(token, "...") if token else text)
