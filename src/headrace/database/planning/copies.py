"""What a write may give to one copy of a reference table and not to the others. Pure."""

import re
from collections.abc import Container, Iterator
from typing import Final

from sqlglot import exp

from headrace.database.planning.select_shape import folded

_SYSTEM_COLUMNS: Final = frozenset({"ctid", "xmin", "xmax", "cmin", "cmax", "tableoid"})
_CLOCK_TEXT = re.compile(r"\s*(now|today|tomorrow|yesterday)\s*", re.IGNORECASE)


def is_default(cell: exp.Expr) -> bool:
    """Whether a value is the word DEFAULT."""
    return isinstance(cell, exp.Column | exp.Var) and cell.name.upper() == "DEFAULT"


def difference(tree: exp.Expr, computed: Container[str]) -> str | None:
    """Why the copies would differ; None: each is changed alike. `computed`: columns whose default is no constant."""
    for name, cell in _assigned(tree):
        if name in computed and is_default(cell):
            return f"Every shard would compute the default of {name!r} for itself"
    for cast in tree.find_all(exp.Cast):
        if isinstance(cast.this, exp.Literal) and cast.this.is_string and _CLOCK_TEXT.fullmatch(cast.this.this):
            return f"Every shard would read {cast.this.this!r} by its own clock"
    for column in tree.find_all(exp.Column):
        if folded(column.this) in _SYSTEM_COLUMNS:
            return f"{column.name} is another on every shard"
    return _disorder(tree)


def _disorder(tree: exp.Expr) -> str | None:
    """What depends on how rows happen to lie on disk."""
    for select in tree.find_all(exp.Select, exp.SetOperation):
        if (select.args.get("limit") or select.args.get("offset")) and not select.args.get("order"):
            return "LIMIT and OFFSET without ORDER BY may take other rows on every shard"
    for window in tree.find_all(exp.Window):
        if not window.args.get("alias") and not window.args.get("order"):
            return "A window without ORDER BY may number the rows in another order on every shard"
    return None


def _assigned(tree: exp.Expr) -> Iterator[tuple[str, exp.Expr]]:
    """What SET gives to which column."""
    for node in tree.find_all(exp.Update, exp.OnConflict):
        for item in node.expressions:
            if isinstance(item, exp.EQ):
                left, right = item.this.unnest(), item.expression
                names = left.expressions if isinstance(left, exp.Tuple) else [left]
                cells = right.expressions if isinstance(left, exp.Tuple) else [right]
                yield from ((folded(name.this), cell) for name, cell in zip(names, cells, strict=False))
