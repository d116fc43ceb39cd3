"""Rows: tuples whose fields also answer by their column names."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any


class Row(tuple[Any, ...]):
    """A row of a result: `row[0]`, `row.name`, `a, b = row`, `row.asdict()`.

    Of columns with the same name the first answers by it. A column named like a tuple's method, `count` or `index`,
    hides the method.
    """

    __slots__ = ()

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    columns: tuple[str, ...] = ()
    """The names of the columns."""

    def asdict(self) -> dict[str, Any]:
        """The row by column name; of columns with the same name the first."""
        return dict(zip(reversed(self.columns), reversed(self), strict=True))


@dataclass(frozen=True, slots=True)
class Partial:
    """An answer that may lack the rows of some shards; no list, so that nobody takes it for a whole one."""

    rows: list[Row]
    """What the other shards answered."""
    missing: Mapping[str, str]
    """Why each shard that is missing did not answer."""


@lru_cache(maxsize=1024)
def row_of(columns: tuple[str, ...]) -> Callable[[Sequence[Any]], Row]:
    """The kind of row that has these columns; one for all results that have them."""
    fields: dict[str, Any] = {}
    for index, name in enumerate(columns):
        if name not in {"columns", "asdict"} and not name.startswith("__"):
            fields.setdefault(name, property(itemgetter(index)))
    return type("Row", (Row,), {"__slots__": (), "columns": columns, **fields})
