"""Parameters for a statement whose own nobody noted: typical values from Postgres' statistics. Pure.

pg_stat_statements keeps `x = $1`, not the value. A plan depends on it, so three sets are made: a value from the middle
of the column, its most common one, another from the middle. A range that is bound on both sides gets a tenth of the
values, one that is bound on one side a third, which is also what Postgres assumes where it knows nothing.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sqlglot import exp

from headrace.database.indexes.candidates import read_statement
from headrace.database.indexes.index import ColumnFacts, Schema
from headrace.database.indexes.workload import Sample
from headrace.database.planning.select_shape import folded
from headrace.database.query_cache.text import Token, normalised, tokens

_TYPED: Final = frozenset({"date", "time", "timestamp", "timestamptz", "interval", "numeric", "uuid", "bytea"})
_NEUTRAL: Final[Mapping[str, str]] = {
    "interval": "1 month",
    "date": "2000-01-01",
    "timestamp": "2000-01-01",
    "boolean": "true",
    "uuid": "00000000-0000-0000-0000-000000000000",
    "json": "{}",
    "text": "x",
    "character": "x",
}
_QUANTILES: Final = (0.5, 0.25, 0.75)
_LIMIT: Final = "10"
_HALF_OPEN: Final = 1 / 3
_CLOSED: Final = 0.1


def repaired(text: str) -> str:
    """The text of pg_stat_statements as Postgres can read it again.

    It puts `$1` where a literal stood, also where none may stand: `date $1`, `extract($1 FROM day)`.
    """
    found = list(tokens(text))
    parts: list[Token] = []
    for number, token in enumerate(found):
        before = parts[-1] if parts else None
        following = found[number + 1].text if number + 1 < len(found) else ""
        if not token.text.startswith("$") or before is None:
            parts.append(token)
        elif before.text in _TYPED:
            parts[-1] = token._replace(text=f"{token.text}::{before.text}", gap=before.gap)
        elif before.text == "(" and following == "from" and len(parts) > 1 and parts[-2].text == "extract":
            parts.append(token._replace(text="year"))
        else:
            parts.append(token)
    return normalised(parts)


def parameters(text: str) -> int:
    """The highest `$n` of a text."""
    return max((int(each.text[1:]) for each in tokens(text) if re.fullmatch(r"\$\d+", each.text)), default=0)


@dataclass(frozen=True, slots=True)
class _Place:
    """What is known of one parameter."""

    column: ColumnFacts | None = None
    bound: str = "="
    """How the column is compared: `=`, `<`, `>`, or `~` for a pattern."""
    is_closed: bool = False
    """Its range has another end."""
    number: int = 0
    """Of several that are compared with the same column."""
    literal: str | None = None
    """The value, whatever the statistics say."""


def sampled(text: str, schema: Schema, types: Sequence[str]) -> tuple[Sample, ...]:
    """The statement with parameters from the statistics; `types` are those that the server gives to them."""
    tree = read_statement(text)
    places = _places(tree, schema)
    if not types:
        return (Sample(text),)
    return tuple(
        dict.fromkeys(
            Sample(text, tuple(_value(places.get(n + 1, _Place()), name, attempt) for n, name in enumerate(types)))
            for attempt in range(len(_QUANTILES))
        )
    )


def _places(tree: exp.Expr, schema: Schema) -> dict[int, _Place]:
    columns = _columns(tree, schema)
    found: dict[int, _Place] = {}
    ends: dict[str, set[str]] = {}
    counts: dict[str, int] = {}
    for parameter in tree.find_all(exp.Parameter):
        number = int(parameter.name) if parameter.name.isdigit() else 0
        if parameter.find_ancestor(exp.Limit, exp.Offset):
            found[number] = _Place(literal=_LIMIT if parameter.find_ancestor(exp.Limit) else "0")
            continue
        node, bound = _comparison(parameter)
        names = [] if node is None else [folded(each.this) for each in _bare_columns(node, parameter)]
        facts = columns.get(names[0]) if names else None
        if node is None or facts is None:
            continue
        sum_above = parameter.find_ancestor(exp.Add, exp.Sub)
        if sum_above is not None and next(sum_above.find_all(exp.Parameter)) is not parameter:
            continue  # `$1 - $2` against a column: the first is the value, the second a little more or less
        counts[names[0]] = counts.get(names[0], -1) + 1
        ends.setdefault(names[0], set()).add(bound)
        found[number] = _Place(facts, bound, number=counts[names[0]])
    closed = {columns[name].sql for name, bounds in ends.items() if {"<", ">"} <= bounds}
    return {
        number: place
        if place.column is None or place.column.sql not in closed
        else _Place(place.column, place.bound, is_closed=True, number=place.number)
        for number, place in found.items()
    }


def _columns(tree: exp.Expr, schema: Schema) -> dict[str, ColumnFacts]:
    """The columns of all its tables by name; of two with one name either."""
    found: dict[str, ColumnFacts] = {}
    for table in tree.find_all(exp.Table):
        facts = schema.table(folded(table.args.get("db")), folded(table.this))
        found |= {} if facts is None else facts.columns
    return found


def _comparison(parameter: exp.Expr) -> tuple[exp.Expr | None, str]:
    """The comparison that a parameter stands in, and which end of a range it is."""
    child, node = parameter, parameter.parent
    while node is not None and not isinstance(node, exp.Select | exp.Where):
        match node:
            case exp.Between():
                return node, ">" if child is node.args.get("low") else "<"
            case exp.LT() | exp.LTE():
                return node, "<" if child is node.expression else ">"
            case exp.GT() | exp.GTE():
                return node, ">" if child is node.expression else "<"
            case exp.Like():
                return node, "~"
            case exp.EQ() | exp.In() | exp.NullSafeEQ() | exp.NEQ():
                return node, "="
        child, node = node, node.parent
    return None, "="


def _bare_columns(node: exp.Expr, parameter: exp.Expr) -> list[exp.Column]:
    sides = [node.this, node.args.get("expression")]
    return [side for side in sides if isinstance(side, exp.Column) and side is not parameter]


def _value(place: _Place, type_name: str, attempt: int) -> str:
    facts = place.column
    if place.literal is not None:
        return place.literal
    if facts is None:
        name = type_name.removesuffix("[]")
        neutral = next((value for start, value in _NEUTRAL.items() if name.startswith(start)), "1")
        return f"{{{neutral}}}" if type_name.endswith("[]") else neutral
    values = [value for value, _ in facts.common]
    if type_name.endswith("[]"):
        return "{" + ",".join(_escaped(_typical(facts, values, attempt + step)) for step in range(3)) + "}"
    if place.bound == "~":
        return re.sub(r"[\\%_]", "", _typical(facts, values, attempt))[:3] + "%"
    if place.bound in "<>" and facts.bounds:
        share = _CLOSED if place.is_closed else _HALF_OPEN
        middle = _QUANTILES[attempt] if place.is_closed else 0.5
        start = middle - share / 2 if place.is_closed else (1 - share if place.bound == ">" else 0.0)
        return _quantile(facts.bounds, start if place.bound == ">" else start + share)
    return _typical(facts, values, attempt + place.number)


def _typical(facts: ColumnFacts, values: Sequence[str], attempt: int) -> str:
    if values and (attempt % 3 == 1 or not facts.bounds):
        return values[attempt // 3 % len(values)] if facts.bounds else values[attempt % len(values)]
    if facts.bounds:
        return _quantile(facts.bounds, (_QUANTILES[attempt % 3] + 0.07 * (attempt // 3)) % 1)
    return next((value for start, value in _NEUTRAL.items() if facts.type_name.startswith(start)), "1")


def _quantile(bounds: Sequence[str], share: float) -> str:
    return bounds[min(len(bounds) - 1, max(0, round(share * (len(bounds) - 1))))]


def _escaped(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
