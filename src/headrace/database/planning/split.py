"""A multi-row INSERT in pieces, from which one for the rows of each shard is put together. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlglot import exp

from headrace.database.planning.statement import DIALECT, Statement

_PLACE: Final = "headrace_parameter_"
_PLACES = re.compile(rf"{_PLACE}(\d+)")
_ROWS: Final = "headrace_rows"


@dataclass(frozen=True, slots=True)
class SplitText:
    """The text before, between and after the rows; parameters are written as marks that are numbered anew."""

    head: str
    rows: tuple[str, ...]
    tail: str

    def insert(self, rows: Sequence[int], params: Sequence[Any]) -> tuple[str, tuple[Any, ...]]:
        """The INSERT of these rows, with the parameters that it still uses."""
        numbers: dict[int, int] = {}
        text = f"{self.head}{', '.join(self.rows[row] for row in rows)}{self.tail}"
        sql = _PLACES.sub(lambda mark: f"${numbers.setdefault(int(mark[1]), len(numbers) + 1)}", text)
        return sql, tuple(params[index] for index in numbers)


def split_text(statement: Statement) -> SplitText:
    """The pieces of an INSERT ... VALUES."""
    tree = statement.tree.copy()
    for parameter in list(tree.find_all(exp.Parameter)):
        parameter.replace(exp.Var(this=f"{_PLACE}{int(parameter.name) - 1}"))
    values = tree.expression
    rows = tuple(row.sql(dialect=DIALECT) for row in values.expressions)
    values.set("expressions", [exp.Tuple(expressions=[exp.Var(this=_ROWS)])])
    head, tail = tree.sql(dialect=DIALECT).split(f"({_ROWS})")
    return SplitText(head, rows, tail)
