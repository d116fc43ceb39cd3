"""Which columns an INSERT fills, and which it leaves to their defaults. Pure."""

from sqlglot import exp

from headrace.database.planning.copies import is_default
from headrace.database.planning.scope import TableFacts
from headrace.database.planning.select_shape import folded, is_star


def key_position(node: exp.Insert, facts: TableFacts | None) -> int | None:
    """Which of the values of a row is the shard key; None: none, or it cannot be told."""
    if facts is None or facts.key is None:
        return None
    names = _named(node)
    names = list(facts.columns or ()) if names is None else names
    return names.index(facts.key) if facts.key in names else None


def left_to_shards(node: exp.Insert, facts: TableFacts | None) -> tuple[str, ...]:
    """Columns that get a default which every shard computes for itself: now(), a sequence."""
    if facts is None or facts.key is not None or not facts.computed:
        return ()
    names = _named(node)
    names = list(facts.columns or ()) if names is None else names
    values = node.expression
    rows = values.expressions if isinstance(values, exp.Values) else [values]
    filled = set(facts.computed)
    for row in rows:
        cells = list(row.expressions) if isinstance(row, exp.Tuple | exp.Select) else []
        if any(is_star(cell) for cell in cells):
            continue
        filled &= {name for name, cell in zip(names, cells, strict=False) if not is_default(cell)}
    return tuple(sorted(facts.computed - filled))


def _named(node: exp.Insert) -> list[str] | None:
    if not isinstance(node.this, exp.Schema):
        return None
    return [folded(column if isinstance(column, exp.Identifier) else column.this) for column in node.this.expressions]
