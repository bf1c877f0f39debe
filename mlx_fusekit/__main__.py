"""The ``mlx-fusekit`` command, and ``python -m mlx_fusekit``."""

import sys
from pathlib import Path

from mlx_fusekit import signals


def main() -> None:
    """Run the command line; Ctrl-C has its exit code from the first import on."""
    signals.install()
    try:
        from mlx_fusekit import cli

        cli.main()
    except SystemExit:
        raise
    except BaseException:
        # Outside of the command line's own guard: while it was imported, or as it ended.
        ended = signals.received()
        if ended is None:
            raise
        signals.ignore()
        if sys.stderr is not None:
            sys.stderr.write(f"error: {ended}; nothing half-made was left behind\n")
        sys.exit(ended.status)


def _leave_current_folder() -> None:
    """Import no module that lies in the current folder, which ``python -m`` looks through first."""
    try:
        if not sys.flags.safe_path and sys.path[0] in ("", str(Path.cwd())):
            del sys.path[0]
    except OSError:  # the folder has gone
        pass


if __name__ == "__main__":
    _leave_current_folder()
    main()
