"""Being one of several processes that ``mlx.launch`` started: which one, and going in step.

Every process, a *rank*, runs the same command. What the launcher tells it lies in its environment,
so that a process which was started alone finds that out without touching MLX's communication.
"""

import contextlib
import functools
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_fusekit import signals
from mlx_fusekit.errors import ConfigurationError, FusekitError
from mlx_fusekit.reading import read_bytes

if TYPE_CHECKING:
    import mlx.core as mx

#: By backend, the variable that holds this rank, and the one with the number of ranks: a number,
#: or a file with a JSON list that has an entry for each.
_VARIABLES = {
    "ring": ("MLX_RANK", "MLX_HOSTFILE"),
    "jaccl": ("MLX_RANK", "MLX_IBV_DEVICES"),
    "nccl": ("MLX_RANK", "MLX_WORLD_SIZE"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
}
_FILES = ("MLX_HOSTFILE", "MLX_IBV_DEVICES")
_LARGEST_FILE = 1_000_000
#: With what MLX's messages about lost connections begin.
_PREFIXES = tuple(f"[{name}]" for name in _VARIABLES)
#: How long a rank that is asked to end may take where it waits for others.
GRACE_SECONDS = 10.0


class FailedElsewhereError(FusekitError, RuntimeError):
    """Another rank has failed, and says why: a command needs no second line."""


class LostRankError(FusekitError, ConnectionError):
    """Another rank has gone while this one waited for it."""


def backend() -> str | None:
    """The backend that the launcher chose, as ``mx.distributed.init`` has it; None without one."""
    for name, (rank, size) in _VARIABLES.items():
        if os.environ.get(rank) and os.environ.get(size):
            return name
    return None


def ranks() -> tuple[int, int]:
    """Which rank this process is, from 0, and how many there are; (0, 1) where it is alone.

    Reads the environment only, and leaves MLX alone.

    Raises:
        ConfigurationError: naming the variable that makes no sense.
    """
    name = backend()
    if name is None:
        return 0, 1
    rank, size = (_number(variable) for variable in _VARIABLES[name])
    if not 0 <= rank < max(size, 1):
        raise ConfigurationError(
            f"{_VARIABLES[name][0]}={rank}: is no rank of {size}; start the command with mlx.launch"
        )
    return rank, max(size, 1)


def first() -> bool:
    """Whether this process speaks and writes for all; where it is alone, it does."""
    return ranks()[0] == 0


@functools.cache
def group() -> "mx.distributed.Group | None":
    """All ranks as a group of MLX's, connected once; None where this process is alone.

    Waits until every rank calls it.

    Raises:
        FusekitError: when they cannot be connected.
    """
    _, size = ranks()
    name = backend()
    if name is None or size == 1:
        return None
    import mlx.core as mx

    try:
        with _ended_at_once():
            found = mx.distributed.init(strict=True, backend=name)
    except RuntimeError as error:
        raise FusekitError(
            f"mlx.launch: {_self()} cannot reach the others ({error}); check the addresses of "
            "--hostfile, or choose another --starting-port"
        ) from error
    if found.size() != size:
        raise FusekitError(
            f"mlx.launch: started {size} ranks, of which MLX connected {found.size()}; check "
            "--hostfile and --backend"
        )
    return found


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let all ranks finish a block, or none: where one fails, all raise, once all are at its end.

    The first of those that failed raises its own error; the others raise a
    :class:`FailedElsewhereError`. Inside the block no rank may wait for another.
    """
    own: BaseException | None = None
    try:
        yield
    except (Exception, SystemExit) as error:  # noqa: BLE001 - raised again, once all know
        own = error
    failed = _failed(own is not None and not isinstance(own, FailedElsewhereError))
    rank, size = ranks()
    if own is not None and (not failed or failed[0] == rank):
        raise own
    if failed:
        raise FailedElsewhereError(f"rank {failed[0]} of {size} failed, and says why") from own


def _failed(own: bool) -> list[int]:
    """The ranks that say so of themselves."""
    everyone = group()
    if everyone is None:
        return [0] if own else []
    import mlx.core as mx

    with in_contact():
        mine = mx.array([int(own)], mx.int32)
        # NCCL has GPUs' streams only; to the others a small number on the CPU is least to wait for.
        stream = mx.gpu if backend() == "nccl" else mx.cpu
        told = mx.distributed.all_gather(mine, group=everyone, stream=stream)
        mx.eval(told)
    return [rank for rank in range(everyone.size()) if told[rank].item()]


@contextlib.contextmanager
def in_contact() -> Iterator[None]:
    """Let a connection that breaks be one clear error; where a signal came too, that is the cause.

    Raises:
        LostRankError: when another rank has gone.
        KeyboardInterrupt: when this one was asked to end.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_PREFIXES):
            raise
        if (ended := signals.received()) is not None:
            raise ended from error
        raise LostRankError(
            f"{_self()} lost another rank ({error}); that one, or mlx.launch, says why it ended"
        ) from error


@contextlib.contextmanager
def bounded_end() -> Iterator[None]:
    """End this process within :data:`GRACE_SECONDS` of a signal, even where it waits for a rank.

    Python handles a signal when MLX returns, which it does not while it waits for a rank that has
    gone. For commands only: it ends the process. Nothing where this process is alone.
    """
    if ranks()[1] == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    done = threading.Event()
    threading.Thread(target=_watch, args=(reader, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(before)
        os.close(writer)


def _watch(reader: int, done: threading.Event) -> None:
    """Wait for a signal, then for the block to end; a closed pipe says that it has."""
    with open(reader, "rb", buffering=0) as pipe:
        number = pipe.read(1)
    if number and not done.wait(GRACE_SECONDS):
        words = f"error: {_self()} was asked to end while it waited for another rank\n"
        os.write(2, words.encode())
        os._exit(128 + number[0])


@contextlib.contextmanager
def _ended_at_once() -> Iterator[None]:
    """While MLX connects it lets no handler of Python's run: let signals end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {
        number: handler
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if (handler := signal.getsignal(number)) not in (signal.SIG_IGN, None)
    }
    for number in handlers:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _number(variable: str) -> int:
    """A number of the environment, or how many entries the file has that is named there."""
    value = os.environ[variable]
    try:
        if variable not in _FILES:
            return int(value)
        text = read_bytes(Path(value), _LARGEST_FILE).strip()
        return len(json.loads(text)) if text else 1
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(
            f"{variable}={value}: is not what mlx.launch sets; unset it, or start the command "
            "with mlx.launch"
        ) from error


def _self() -> str:
    rank, size = ranks()
    return f"rank {rank} of {size}"
