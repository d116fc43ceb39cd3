"""What a condition says of a column: the values that it equals, as far as the text and the parameters tell. Pure."""

from typing import Final

from sqlglot import exp

from headrace.database.planning.key_terms import Constant, Elements, Parameter, Term

_SAFE_CASTS: Final = frozenset(
    {
        exp.DType.SMALLINT,
        exp.DType.INT,
        exp.DType.BIGINT,
        exp.DType.TEXT,
        exp.DType.VARCHAR,
        exp.DType.UUID,
    }
)


def term_of(node: exp.Expr | None) -> Term | None:
    """The value that an expression stands for, if it can be known before the statement runs."""
    while isinstance(node, exp.Paren):
        node = node.this
    if isinstance(node, exp.Cast):
        kind = node.args["to"]
        if kind.this not in _SAFE_CASTS or kind.expressions:
            return None
        node = node.this
    if isinstance(node, exp.Parameter):
        return Parameter(int(node.name) - 1)
    negative = isinstance(node, exp.Neg)
    if negative and node is not None:
        node = node.this
    if isinstance(node, exp.Null):
        return Constant(None)
    if isinstance(node, exp.Literal):
        if node.is_string:
            return None if negative else Constant(node.this)
        text = str(node.this)
        return Constant(-int(text) if negative else int(text)) if text.isdigit() else None
    return None


def _terms_of_set(node: exp.Expr) -> tuple[Term, ...] | None:
    """The values of `ANY(...)`: an array parameter or an array of known values."""
    while isinstance(node, exp.Paren):
        node = node.this
    if isinstance(node, exp.Cast) and isinstance(node.this, exp.Parameter):
        kind = node.args["to"]
        inner = kind.expressions[0] if kind.this is exp.DType.ARRAY and kind.expressions else None
        if inner is None or inner.this not in _SAFE_CASTS or inner.expressions:
            return None
        node = node.this
    if isinstance(node, exp.Parameter):
        return (Elements(int(node.name) - 1),)
    if isinstance(node, exp.Array):
        return _all_known(node.expressions)
    return None


def _all_known(nodes: list[exp.Expr]) -> tuple[Term, ...] | None:
    terms = tuple(term_of(node) for node in nodes)
    return None if any(term is None for term in terms) else terms  # type: ignore[return-value]


def comparison(condition: exp.Expr) -> tuple[exp.Column, tuple[Term, ...]] | None:
    """A column and the values that it is compared with, if the condition is such."""
    if isinstance(condition, exp.In):
        column = condition.this.unnest()
        if not condition.expressions or not isinstance(column, exp.Column):
            return None
        terms = _all_known(condition.expressions)
        return (column, terms) if terms is not None else None
    if not isinstance(condition, exp.EQ):
        return None
    for one, other in ((condition.this, condition.expression), (condition.expression, condition.this)):
        column = one.unnest()
        if not isinstance(column, exp.Column):
            continue
        if isinstance(other, exp.Any):
            found = _terms_of_set(other.this)
            return (column, found) if found is not None else None
        term = term_of(other)
        if term is not None:
            return column, (term,)
    return None
