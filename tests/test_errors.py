"""The errors' own promise: a message of one line."""

import errno

import pytest

from mlx_fusekit import errors
from mlx_fusekit.errors import FusekitError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_line_break_out_of_a_file_does_not_break_the_line(kind: type[FusekitError]) -> None:
    assert str(kind("a\nb\r\nc\u2028d")) == r"a\nb\nc\nd"
    assert str(kind("a line")) == "a line"


def test_an_error_of_the_system_keeps_what_it_says() -> None:
    assert "No space" in str(errors.OutputError(errno.ENOSPC, "No space left"))
