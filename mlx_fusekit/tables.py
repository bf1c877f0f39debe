"""Tables of text: built once, drawn on a terminal by rich or written as Markdown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ENDS_OF_CELLS = str.maketrans({"\n": " ", "\r": " ", "|": "\\|"})


@dataclass(frozen=True)
class Table:
    """Rows of text.

    Attributes:
        title: above it, where it is drawn; Markdown leaves it to the text around.
        header: names of the columns; none of a table of facts.
        rows: as many cells each as there are columns.
        text_columns: how many of the first columns are text; the others are numbers.
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1

    @classmethod
    def of_facts(cls, title: str, facts: Iterable[tuple[str, str]]) -> "Table":
        """Names and values."""
        return cls(title, (), tuple(facts), text_columns=2)

    def markdown(self) -> str:
        """The table as Markdown, which its cells may hold: only what would end a cell is escaped.

        Text that others wrote needs more: see :mod:`mlx_fusekit.publishing.foreign_text`.
        """
        header = self.header or ("", "")
        rule = ["---" if place < self.text_columns else "---:" for place in range(len(header))]
        rows = [[cell.translate(_ENDS_OF_CELLS) for cell in row] for row in (header, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
