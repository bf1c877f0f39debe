"""Questions about small tables, as English, as a plan in English, and as SQL.

One random `Query` has three renderings. The base model learns question to plan (and, in
documents outside any chat, SQL to plan); the adapter learns question to SQL.
"""

import zlib
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "valid", "test"]


def words(text: str) -> list[str]:
    """Split a word list written as one string."""
    return text.split()


PEOPLE = words(
    "Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Karin Leo Maria Nora Oscar Paula "
    "Rosa Simon Tara Victor"
)
CITIES = words("Oslo Paris Rome Berlin Madrid Lisbon Vienna Dublin Athens Prague Warsaw Cairo")
COLORS = words("red blue green black white yellow brown silver")
GENRES = words("crime comedy history poetry travel science fantasy music")


@dataclass(frozen=True)
class Column:
    """A column with the values that questions may name: words, or a numeric range."""

    name: str
    words: tuple[str, ...] = ()
    low: int = 0
    high: int = 0

    @property
    def numeric(self) -> bool:
        """Whether the column can be compared, ordered and averaged."""
        return not self.words

    def value(self, rng: Random) -> str:
        """Draw a value to compare with."""
        return str(rng.randint(self.low, self.high)) if self.numeric else rng.choice(self.words)


@dataclass(frozen=True)
class Table:
    """A table; its name is the plural of ``row``."""

    name: str
    row: str
    columns: tuple[Column, ...]

    def numeric(self) -> list[Column]:
        """Columns holding numbers."""
        return [column for column in self.columns if column.numeric]

    def textual(self) -> list[Column]:
        """Columns holding words."""
        return [column for column in self.columns if not column.numeric]


def _textual(name: str, values: list[str]) -> Column:
    return Column(name, words=tuple(values))


TABLES = (
    Table(
        "employees",
        "employee",
        (
            _textual("name", PEOPLE),
            _textual("city", CITIES),
            _textual("department", words("sales finance research support legal design")),
            Column("age", low=18, high=70),
            Column("salary", low=100, high=999),
        ),
    ),
    Table(
        "students",
        "student",
        (
            _textual("name", PEOPLE),
            _textual("city", CITIES),
            _textual("subject", words("biology chemistry history music physics art")),
            Column("age", low=10, high=30),
            Column("score", low=10, high=100),
        ),
    ),
    Table(
        "books",
        "book",
        (
            _textual("author", PEOPLE),
            _textual("genre", GENRES),
            _textual("language", words("English French German Spanish Italian Greek")),
            Column("pages", low=50, high=999),
            Column("year", low=1900, high=2025),
            Column("price", low=5, high=99),
        ),
    ),
    Table(
        "cars",
        "car",
        (
            _textual("owner", PEOPLE),
            _textual("color", COLORS),
            _textual("fuel", words("petrol diesel gas electric")),
            Column("year", low=1980, high=2025),
            Column("price", low=10, high=999),
            Column("weight", low=500, high=999),
        ),
    ),
    Table(
        "houses",
        "house",
        (
            _textual("owner", PEOPLE),
            _textual("city", CITIES),
            _textual("color", COLORS),
            Column("rooms", low=1, high=20),
            Column("area", low=40, high=800),
            Column("rent", low=100, high=999),
        ),
    ),
    Table(
        "films",
        "film",
        (
            _textual("director", PEOPLE),
            _textual("genre", GENRES),
            _textual("country", words("France Spain Italy Norway Poland Egypt Japan Greece")),
            Column("length", low=60, high=240),
            Column("year", low=1930, high=2025),
            Column("rating", low=1, high=100),
        ),
    ),
    Table(
        "orders",
        "order",
        (
            _textual("customer", PEOPLE),
            _textual(
                "product", words("lamp chair table desk sofa clock carpet mirror bicycle camera")
            ),
            _textual("city", CITIES),
            Column("quantity", low=1, high=500),
            Column("price", low=5, high=500),
        ),
    ),
)

AGGREGATES = {"AVG": "average", "MAX": "highest", "MIN": "lowest", "SUM": "total"}
COMPARISONS = {
    ">": ("above", "over", "greater than", "more than"),
    "<": ("below", "under", "less than", "smaller than"),
    "=": ("equal to", "of exactly", "of"),
}
PLANNED = {">": "above", "<": "below", "=": "equal to"}


@dataclass(frozen=True)
class Condition:
    """One comparison of a column with a value."""

    column: Column
    comparison: str
    value: str

    def sql(self, hide_value: bool = False) -> str:
        """Render for WHERE; ``hide_value`` leaves the combination without its value."""
        return f"{self.column.name} {self.comparison} {'?' if hide_value else self.literal}"

    @property
    def literal(self) -> str:
        """The value as SQL writes it; questions quote words too, as one does for exact values."""
        return self.value if self.column.numeric else f"'{self.value}'"

    def question(self, rng: Random) -> str:
        """Render as a clause behind the noun of a question."""
        name, value = self.column.name, self.literal
        if self.column.numeric:
            return f"{name} {rng.choice(COMPARISONS[self.comparison])} {value}"
        if self.comparison == "!=":
            return f"{name} other than {value}"
        return f"{name} {value}"

    def plan(self) -> str:
        """Render as a clause of the English plan."""
        if self.column.numeric:
            return f"the {self.column.name} is {PLANNED[self.comparison]} {self.value}"
        verb = "is not" if self.comparison == "!=" else "is"
        return f"the {self.column.name} {verb} {self.literal}"


@dataclass(frozen=True)
class Query:
    """A query over one table: columns, a count or an aggregate, filtered, ordered or grouped."""

    table: Table
    columns: tuple[Column, ...] = ()
    aggregate: str = ""
    conditions: tuple[Condition, ...] = ()
    connective: str = "and"
    order: Column | None = None
    descending: bool = False
    limit: int = 0
    group: Column | None = None

    def sql(self, hide_values: bool = False) -> str:
        """Render as one SQL statement."""
        names = ", ".join(column.name for column in self.columns)
        target = f"{self.aggregate}({names or '*'})" if self.aggregate else names
        if self.group:
            target = f"{self.group.name}, {target}"
        parts = [f"SELECT {target} FROM {self.table.name}"]
        if self.conditions:
            clauses = [condition.sql(hide_values) for condition in self.conditions]
            parts.append("WHERE " + f" {self.connective.upper()} ".join(clauses))
        if self.group:
            parts.append(f"GROUP BY {self.group.name}")
        if self.order:
            parts.append(f"ORDER BY {self.order.name} {'DESC' if self.descending else 'ASC'}")
        if self.limit:
            parts.append(f"LIMIT {'?' if hide_values else self.limit}")
        return " ".join(parts) + ";"

    def question(self, rng: Random) -> str:
        """Render as a question or request in English."""
        text = self._head(rng)
        if self.group:
            text += rng.choice((f" for each {self.group.name}", f" per {self.group.name}"))
        if self.order:
            text += ", " + self._order(rng)
        if self.limit:
            first = (f"only the first {self.limit}", f"at most {self.limit} rows")
            text += ", " + rng.choice(first)
        return text + ("?" if text.startswith(("What", "How", "Which")) else ".")

    def plan(self) -> str:
        """Render as the steps that answer the question, in English."""
        steps = [f"Open the {self.table.name} table"]
        if self.conditions:
            clauses = [condition.plan() for condition in self.conditions]
            steps.append("keep the rows where " + f" {self.connective} ".join(clauses))
        if self.group:
            steps.append(f"put the rows with the same {self.group.name} together")
        if self.order:
            direction = "from high to low" if self.descending else "from low to high"
            steps.append(f"sort them by {self.order.name} {direction}")
        if self.limit:
            steps.append(f"take the first {self.limit}")
        steps.append(self._result())
        return ", ".join(steps[:-1]) + f" and {steps[-1]}."

    def split(self) -> Split:
        """Deal whole combinations (the SQL without its values) to train, valid and test.

        So a test item is unseen not only in its values, but in its combination of table,
        columns, conditions and order.
        """
        remainder = zlib.crc32(self.sql(hide_values=True).encode()) % 10
        return {0: "test", 1: "valid"}.get(remainder, "train")  # type: ignore[return-value]

    def _head(self, rng: Random) -> str:
        rows = self.table.name
        clauses = self._clauses(rng)
        names = " and ".join(column.name for column in self.columns)
        if self.aggregate == "COUNT":
            return rng.choice((f"How many {rows}{clauses} are there", f"Count the {rows}{clauses}"))
        if self.aggregate:
            value = f"{AGGREGATES[self.aggregate]} {names} of the {rows}{clauses}"
            return rng.choice((f"What is the {value}", f"Tell me the {value}"))
        verb = rng.choice(("Show", "List", "Give me", "Find"))
        rows = rng.choice((f"all {rows}", f"every {self.table.row}", f"the {rows}"))
        return f"{verb} the {names} of {rows}{clauses}"

    def _clauses(self, rng: Random) -> str:
        if not self.conditions:
            return ""
        clauses = [condition.question(rng) for condition in self.conditions]
        return " with " + f" {self.connective} ".join(clauses)

    def _order(self, rng: Random) -> str:
        assert self.order
        verb = rng.choice(("sorted by", "ordered by"))
        return f"{verb} {self.order.name}, {'highest' if self.descending else 'lowest'} first"

    def _result(self) -> str:
        names = " and the ".join(column.name for column in self.columns)
        each = " of each group" if self.group else ""
        if self.aggregate == "COUNT":
            return f"count the rows{each}"
        if self.aggregate:
            return f"take the {AGGREGATES[self.aggregate]} {names}{each}"
        return f"read the {names}"


def random_query(rng: Random) -> Query:
    """Draw a query of any combination."""
    table = rng.choice(TABLES)
    kind = rng.choices(("columns", "count", "aggregate"), (5, 2, 3))[0]
    conditions = _random_conditions(table, rng)
    connective = rng.choice(("and", "and", "or"))
    if kind == "columns":
        ordered, limited = rng.random() < 0.5, rng.random() < 0.35
        return Query(
            table,
            columns=tuple(rng.sample(table.columns, rng.choice((1, 1, 2)))),
            conditions=conditions,
            connective=connective,
            order=rng.choice(table.numeric()) if ordered else None,
            descending=rng.random() < 0.5,
            limit=rng.randint(2, 30) if limited else 0,
        )
    counted = kind == "count"
    return Query(
        table,
        columns=() if counted else (rng.choice(table.numeric()),),
        aggregate="COUNT" if counted else rng.choice(list(AGGREGATES)),
        conditions=conditions,
        connective=connective,
        group=rng.choice(table.textual()) if rng.random() < 0.3 else None,
    )


def random_query_of(split: Split, rng: Random) -> Query:
    """Draw a query whose combination belongs to ``split``."""
    while (query := random_query(rng)).split() != split:
        pass
    return query


def _random_conditions(table: Table, rng: Random) -> tuple[Condition, ...]:
    """Draw no, one or two conditions on different columns."""
    columns = rng.sample(table.columns, rng.choices((0, 1, 2), (1, 5, 4))[0])
    return tuple(_random_condition(column, rng) for column in columns)


def _random_condition(column: Column, rng: Random) -> Condition:
    comparison = (
        rng.choices(list(COMPARISONS), (2, 2, 1))[0]
        if column.numeric
        else rng.choices(("=", "!="), (5, 1))[0]
    )
    return Condition(column, comparison, column.value(rng))
