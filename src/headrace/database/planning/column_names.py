"""What Postgres calls the columns of a result that have no name of their own. Pure."""

from typing import Final

from sqlglot import exp

from headrace.database.planning.select_shape import folded
from headrace.database.planning.statement import DIALECT


def column_name(node: exp.Expr) -> str:
    """What Postgres calls a column of the result (`FigureColname` in parse_target.c)."""
    return _strong_name(node) or "?column?"


_NAMED_LIKE: Final[tuple[tuple[type[exp.Expr], str], ...]] = (
    (exp.GroupConcat, "string_agg"),
    (exp.TimestampTrunc, "date_trunc"),
    (exp.TimeToStr, "to_char"),
    (exp.LogicalAnd, "bool_and"),
    (exp.LogicalOr, "bool_or"),
)


_WRAPPERS: Final = (exp.Filter, exp.Window, exp.WithinGroup, exp.Collate, exp.Bracket)


def _strong_name(node: exp.Expr) -> str | None:
    node = node.unnest()
    match node:
        case exp.Alias():
            return str(node.alias)
        case exp.Column():
            return folded(node.this)
        case exp.Cast():
            return _strong_name(node.this) or _type_name(node)
        case exp.Dot():
            return _strong_name(node.expression)
        case exp.AtTimeZone():
            return "timezone"
        case exp.Case():
            default = node.args.get("default")
            return (_strong_name(default) if isinstance(default, exp.Column | exp.Func) else None) or "case"
        case exp.Subquery():
            return _strong_name(node.this.expressions[0]) if isinstance(node.this, exp.Select) else None
        case exp.Anonymous():
            return str(node.this).lower()
    return _strong_name(node.this) if isinstance(node, _WRAPPERS) else _function_name(node)


def _function_name(node: exp.Expr) -> str | None:
    for kind, name in _NAMED_LIKE:
        if isinstance(node, kind):
            return name
    if isinstance(node, exp.Binary | exp.Literal | exp.Parameter) or not isinstance(node, exp.Func):
        return None
    return node.sql_name().lower()


_TYPE_NAMES: Final = {
    "int": "int4", "bigint": "int8", "smallint": "int2", "decimal": "numeric", "double": "float8", "double precision":
    "float8", "real": "float4", "boolean": "bool", "timestamp with time zone": "timestamptz", "char": "bpchar",
}  # fmt: skip


def _type_name(node: exp.Cast) -> str:
    name: str = node.args["to"].sql(dialect=DIALECT).lower().split("(")[0]
    return _TYPE_NAMES.get(name, name)
