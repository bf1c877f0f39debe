"""From exceptions to one line and an exit code; everything unexpected is left to crash loudly."""

import errno
import os
import signal
import sys
from types import FrameType

import click

from mlx_fusekit.errors import FusekitError

FAILED = 1
#: What a command returns when it has done its work, but the result is not as good as was asked for.
BELOW_THRESHOLD = 3
INTERRUPTED = 130


def run(command: click.Command) -> None:
    """Run a command and exit: 0 done, 1 failed with a line, 2 usage, 130 interrupted.

    A command's function may return another code, such as ``BELOW_THRESHOLD``.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        status = command.main(standalone_mode=False)
    except (click.exceptions.Abort, KeyboardInterrupt) as error:
        # What was left behind on purpose is noted on the way.
        notes = _notes(error) or ["nothing was left behind"]
        _say(f"interrupted; {notes[0]}")
        status = INTERRUPTED
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except FusekitError as error:
        if os.environ.get("FUSEKIT_DEBUG") == "1":
            raise
        _say(str(error))
        status = FAILED
    except BrokenPipeError:
        # The reader of a pipe (head, say) has gone; Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = FAILED
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        _say(f"{error.filename}: the name is too long for a file; give a shorter one")
        status = FAILED
    sys.exit(status if isinstance(status, int) else 0)


def _notes(error: BaseException) -> list[str]:
    """Notes of an interrupt, of which click makes an error of its own."""
    return [*getattr(error, "__notes__", ()), *getattr(error.__context__, "__notes__", ())]


def _say(message: str) -> None:
    # Unlike rich, click does not know of https://no-color.org
    color = False if os.environ.get("NO_COLOR") else None
    click.secho("error: ", fg="red", bold=True, nl=False, err=True, color=color)
    click.echo(" ".join(message.split()), err=True)


def _terminate(signum: int, _frame: FrameType | None) -> None:
    """Let ``finally`` blocks clean up before the process ends."""
    sys.exit(128 + signum)
