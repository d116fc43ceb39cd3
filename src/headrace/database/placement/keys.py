"""The kinds of shard keys: which Python values they are, and how they are written as text."""

import datetime
import uuid
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from typing import Any, Final, NamedTuple

from headrace.errors import CallerError

Key = bool | int | str | bytes | uuid.UUID | Decimal | datetime.date

KINDS: Final = {
    "boolean": "boolean",
    "integer": "bigint",
    "numeric": "numeric",
    "text": "text",
    "uuid": "uuid",
    "bytes": "bytea",
    "date": "date",
    "timestamp": "timestamp",
    "timestamptz": "timestamptz",
}
"""The Postgres type of each kind; smallint and integer are as bigint, varchar is as text."""

_TYPES: Final[tuple[tuple[type, str], ...]] = (
    (bool, "boolean"),
    (int, "integer"),
    (str, "text"),
    (uuid.UUID, "uuid"),
    (bytes, "bytes"),
    (Decimal, "numeric"),
    (datetime.datetime, "timestamp"),
    (datetime.date, "date"),
)
_EXACT: Final = {python_type: kind for python_type, kind in _TYPES if kind != "timestamp"}
"""Of values that are no instance of a subclass; a datetime's kind depends on its zone."""
_READERS: Final[dict[str, Callable[[str], Any]]] = {
    "boolean": lambda text: {"true": True, "false": False}[text],
    "integer": int,
    "numeric": Decimal,
    "text": str,
    "uuid": uuid.UUID,
    "bytes": bytes.fromhex,
    "date": datetime.date.fromisoformat,
    "timestamp": datetime.datetime.fromisoformat,
    "timestamptz": datetime.datetime.fromisoformat,
}


class KindedText(NamedTuple):
    """A key as text, with what it takes to read it again."""

    kind: str
    text: str


def kind_of(key: object) -> str:
    """The kind of a key; refuses a value that cannot be one."""
    if exact := _EXACT.get(type(key)):
        return exact
    for python_type, kind in _TYPES:
        if isinstance(key, python_type):
            return "timestamptz" if isinstance(key, datetime.datetime) and key.tzinfo is not None else kind
    raise CallerError(f"The key {key!r} is a {type(key).__name__}.", fix=f"Shard by one of: {', '.join(KINDS)}.")


def in_utc(key: Key) -> Key:
    """The key; an instant as UTC has it.

    In an hour that comes twice a year, when clocks are set back, Python calls no instant equal to one of another zone.
    """
    if isinstance(key, datetime.datetime) and key.tzinfo is not None:
        try:
            return key.astimezone(datetime.UTC)
        except OverflowError:
            return key  # in UTC it is before the year 1 or after 9999
    return key


def written(key: Key) -> KindedText:
    """A key as text that `read` takes back."""
    key = in_utc(key)
    if isinstance(key, bytes):
        text = key.hex()
    elif isinstance(key, bool):
        text = "true" if key else "false"
    else:
        text = key.isoformat() if isinstance(key, datetime.date) else str(key)
    return KindedText(kind_of(key), text)


def read(kind: str, text: str) -> Key:
    """The key that a text stands for; refuses what does not name a value of the kind."""
    if kind not in _READERS:
        raise CallerError(f"{kind!r} is no kind of key.", fix=f"Use one of: {', '.join(KINDS)}.")
    try:
        key: Key = _READERS[kind](text)
    except (ValueError, KeyError, InvalidOperation) as error:
        raise CallerError(f"{text!r} is no {kind} key.", fix=f"Write it as Postgres' {KINDS[kind]}.") from error
    if kind_of(key) != kind:
        wanted = "needs an offset from UTC" if kind == "timestamptz" else "takes no offset from UTC"
        raise CallerError(f"{text!r} is no {kind} key: it {wanted}.", fix="Compare with 2026-01-31T12:00+00:00.")
    return key
