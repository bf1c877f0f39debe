"""The errors this package raises on purpose.

Every one has a message of one line that names the file, the tensor or the flag, and the cure. The
command line prints that line; of what is neither a :class:`FusekitError` nor a failure of the
system it says that it is a bug of ours, with a traceback to report. Each kind also inherits the
standard class a caller would expect to catch.
"""


class FusekitError(Exception):
    """Root of all errors that mlx-fusekit raises on purpose."""

    def __str__(self) -> str:
        # A name that a file gives may hold a line break.
        return "\\n".join(super().__str__().splitlines())


class CheckpointError(FusekitError, ValueError):
    """A model folder, its weights, its index or its configuration cannot be used."""


class AdapterError(FusekitError, ValueError):
    """An adapter is malformed, or does not fit the base model."""


class ConfigurationError(FusekitError, ValueError):
    """The options asked for contradict each other or the model."""


class ResourceError(FusekitError, RuntimeError):
    """What a stranger's file asks for, in time or memory, is more than its kind ever needs."""


class OutputError(FusekitError, OSError):
    """The target cannot be written: it exists, is unsafe to write to, or the disk is full."""


class HubError(FusekitError, OSError):
    """A repository cannot be had from the Hugging Face Hub or its local cache."""
