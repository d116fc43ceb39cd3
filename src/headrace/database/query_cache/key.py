"""The name of a cached result: one for each answer that Postgres might give. Pure.

    query:<shard>:<digest of context, structure of what is read, normalised text, parameters with their types>

Two calls share a name only if nothing that Postgres looks at differs: `1`, `1.0`, `True`, `'1'` and `Decimal(1)` are
five parameters, and the same text under another search_path, role, database or setting is another query.
"""

import datetime
import decimal
import hashlib
import ipaddress
import uuid
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import msgspec

SETTINGS: Final = (
    "search_path",
    "standard_conforming_strings",
    "DateStyle",
    "IntervalStyle",
    "TimeZone",
    "extra_float_digits",
    "bytea_output",
    "xmloption",
    "xmlbinary",
    "lc_monetary",
    "lc_numeric",
    "lc_time",
    "default_text_search_config",
    "row_security",
    "array_nulls",
    "transform_null_equals",
    "client_encoding",
)
"""What a session can set and a result can depend on."""


class Context(NamedTuple):
    """In whose eyes a text is read."""

    database: str
    role: str
    settings: tuple[str, ...]
    """The values of SETTINGS, in their order."""

    @property
    def digest(self) -> bytes:
        """Sixteen bytes that stand for it."""
        return hashlib.blake2b(msgspec.msgpack.encode(self), digest_size=16).digest()


_PLAIN: Final = frozenset({int, float, bool, str, bytes, type(None)})
_SHOWN: Final = frozenset(
    {decimal.Decimal, datetime.date, datetime.datetime, datetime.time, datetime.timedelta, uuid.UUID}
    | {ipaddress.IPv4Address, ipaddress.IPv6Address, ipaddress.IPv4Network, ipaddress.IPv6Network}
)
_encode: Final = msgspec.msgpack.Encoder().encode


def parameters(params: Sequence[Any]) -> bytes | None:
    """Bytes that are the same for the same values of the same types only; None: one is of a type without such a form.

    A type of the user's own may be sent to Postgres in a way that its equality or text does not show.
    """
    for value in params:
        if value.__class__ not in _PLAIN:
            break
    else:
        try:
            # msgpack has its own form for each of the plain types; a number beyond 64 bits has none there.
            return b"p" + _encode(params)
        except OverflowError:
            pass
    shown = [_shown(value) for value in params]
    return None if None in shown else b"s" + _encode(shown)


def _shown(value: Any) -> tuple[Any, ...] | None:
    kind = value.__class__
    if kind in _SHOWN or kind is int:
        return (kind.__name__, repr(value))
    if kind in _PLAIN:
        return (kind.__name__, value)
    if kind in {list, tuple}:
        items = [_shown(item) for item in value]
        return None if None in items else (kind.__name__, *items)
    return None


class Namer:
    """Names the results of one text under one context."""

    __slots__ = ("_begun", "_prefix")

    def __init__(self, shard: str, context: Context, text: str, structure: bytes) -> None:
        self._prefix = f"query:{shard}:"
        self._begun = hashlib.blake2b(context.digest + _encode(structure) + text.encode(), digest_size=20)

    def name(self, params: Sequence[Any]) -> str | None:
        """The name of the result for these parameters; None: a parameter cannot be part of a name."""
        encoded = parameters(params)
        if encoded is None:
            return None
        begun = self._begun.copy()
        # A byte that no text in UTF-8 holds parts the text from what follows.
        begun.update(b"\xff")
        begun.update(encoded)
        return self._prefix + begun.hexdigest()
