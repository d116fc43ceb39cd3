"""What a statement says about a shard key: a constant, a parameter, each element of an array parameter. Pure."""

import datetime
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from typing import Any, Final

import msgspec

from headrace.database.placement.postgres_hash import Key
from headrace.errors import CallerError

Coercion = Callable[[Any], Any]


def _integer(value: Any) -> Any:
    if type(value) is int:
        return value
    if isinstance(value, str):
        try:
            return int(value.strip())
        except ValueError:
            return msgspec.UNSET
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return msgspec.UNSET


def _text(value: Any) -> Any:
    # str(value) of a subclass (an enum) may be something else than what the driver sends
    return value if type(value) is str else str.__str__(value) if isinstance(value, str) else msgspec.UNSET


def _uuid(value: Any) -> Any:
    if isinstance(value, uuid.UUID):
        return value
    try:
        return uuid.UUID(value) if isinstance(value, str) else msgspec.UNSET
    except ValueError:
        return msgspec.UNSET


def _bytes(value: Any) -> Any:
    return bytes(value) if isinstance(value, bytes | bytearray | memoryview) else msgspec.UNSET


def _numeric(value: Any) -> Any:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    try:
        return Decimal(value.strip()) if isinstance(value, str) else msgspec.UNSET
    except InvalidOperation:
        return msgspec.UNSET


def _boolean(value: Any) -> Any:
    return value if isinstance(value, bool) else msgspec.UNSET


def _date(value: Any) -> Any:
    return value if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime) else msgspec.UNSET


def _timestamp(value: Any) -> Any:
    return value if isinstance(value, datetime.datetime) and value.tzinfo is None else msgspec.UNSET


def _timestamptz(value: Any) -> Any:
    return value if isinstance(value, datetime.datetime) and value.tzinfo is not None else msgspec.UNSET


def _as_given(value: Any) -> Any:
    return value


COERCIONS: Final[dict[str, Coercion]] = {
    "smallint": _integer,
    "integer": _integer,
    "bigint": _integer,
    "text": _text,
    "character varying": _text,
    "uuid": _uuid,
    "bytea": _bytes,
    "numeric": _numeric,
    "boolean": _boolean,
    "date": _date,
    "timestamp without time zone": _timestamp,
    "timestamp with time zone": _timestamptz,
}
"""By the column's type as Postgres names it: the value as that type holds it, UNSET if that cannot be said. The hash
of `'5'` as text is not the hash of 5, so a key must be hashed as what its column holds, however it was written."""


_MODIFIERS = re.compile(r"\(([-\d, ]+)\)")


def _base(type_name: str) -> str:
    return _MODIFIERS.sub("", type_name)


def hashes_alike(one: str, other: str) -> bool:
    """Whether equal values of two column types have one hash."""
    return COERCIONS.get(_base(one)) is COERCIONS.get(_base(other))


@lru_cache(maxsize=256)
def coercion(type_name: str) -> Coercion:
    """How values become keys of this column type; other types are left as they are, for `hash_key` to judge.

    UNSET too for what the column would round or cut, as numeric(10, 2) does with 1.005: stored, it is another key.
    """
    base = _base(type_name)
    plain, keeps = COERCIONS.get(base, _as_given), _KEEPS.get(base)
    found = _MODIFIERS.search(type_name)
    if found is None or keeps is None:
        return plain
    numbers = [int(number) for number in found[1].split(",")]

    def coerce(value: Any) -> Any:
        key = plain(value)
        return key if key is msgspec.UNSET or keeps(key, numbers[-1]) else msgspec.UNSET

    return coerce


def _keeps_digits(key: Decimal, scale: int) -> bool:
    _, digits, exponent = key.as_tuple()
    if not isinstance(exponent, int):
        return True
    text = "".join(map(str, digits))
    kept = exponent + len(text) - len(text.rstrip("0")) >= -scale or not key
    return bool(kept)


def _keeps_fraction(key: datetime.datetime, digits: int) -> bool:
    return bool(key.microsecond % 10 ** (6 - digits) == 0)


_KEEPS: Final[dict[str, Callable[[Any, int], bool]]] = {
    "character varying": lambda key, length: len(key) <= length,
    "numeric": _keeps_digits,
    "timestamp without time zone": _keeps_fraction,
    "timestamp with time zone": _keeps_fraction,
}
"""Whether a column with the last of its modifiers keeps a value as it is."""


@dataclass(frozen=True, slots=True)
class Constant:
    """A literal of the statement."""

    value: Any


@dataclass(frozen=True, slots=True)
class Parameter:
    """`$n`, counted from 0."""

    index: int


@dataclass(frozen=True, slots=True)
class Elements:
    """Every element of the array `$n`: `key = ANY($n)`."""

    index: int


Term = Constant | Parameter | Elements


def known_keys(terms: Iterable[Term], coerce: Coercion, params: Sequence[Any]) -> list[Key] | None:
    """The keys that the terms stand for; None if one of them cannot be known. NULL equals nothing and is left out."""
    keys: list[Key] = []
    for term in terms:
        for value in _values(term, params):
            if value is None:
                continue
            key = coerce(value)
            if key is msgspec.UNSET:
                return None
            keys.append(key)
    return keys


def _values(term: Term, params: Sequence[Any]) -> Sequence[Any]:
    if isinstance(term, Constant):
        return (term.value,)
    if term.index >= len(params):
        raise CallerError(
            f"The statement uses ${term.index + 1}, but {len(params)} parameters were given.",
            fix="Pass a value for every parameter, in order.",
        )
    value = params[term.index]
    if isinstance(term, Parameter):
        return (value,)
    # An array written as text ('{1,2}') has elements that only the server's parser knows.
    return value if isinstance(value, list | tuple) else (msgspec.UNSET,)
