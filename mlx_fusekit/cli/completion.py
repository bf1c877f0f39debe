"""What a shell offers where an option takes a path; click does the rest of its completion."""

import click
from click.shell_completion import CompletionItem


class _PathName(click.types.StringParamType):
    """A path as the user wrote it, for which a shell offers file names.

    Unlike ``click.Path`` it checks and converts nothing: a Hub id, ``NAME=PATH`` or ``PATH:WEIGHT``
    may stand in its place, and the functions tell better what is wrong with one.
    """

    name = "path"

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


PATH = _PathName()
