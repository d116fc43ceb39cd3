"""Python's own value types as bytes, and back: what cached objects are made of, without pickle.

msgpack has numbers, strings, bytes, lists and maps; everything else here is one of its extension types, whose payload
is msgpack again. Types are matched exactly, so that nothing comes back as something else: what is not known is refused
when it is packed. Reading runs no code that the bytes could choose.
"""

import datetime
import decimal
import uuid
import zoneinfo
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from headrace.errors import UnencodableValue

ATOMS = frozenset({type(None), bool, int, float, str, bytes})
ATOMS_BUT_INT = ATOMS - {int}
INT_MIN, INT_MAX = -(2**63), 2**64 - 1
_STRINGS = frozenset({str})
_UNREADABLE = (
    *(msgspec.MsgspecError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, RecursionError, OSError),
)


class Unreadable(ValueError):
    """Bytes that were not packed here, or by another version."""


class Kind(NamedTuple):
    """A type that msgpack does not have."""

    code: int
    """0 to 63: this module's; 64 to 127: those of whoever adds kinds."""
    type: Any
    fold: Callable[[Any], Any]
    """The value in terms of other packable ones. May raise UnencodableValue for one that cannot be."""
    unfold: Callable[[Any], Any]
    """The value again. What it is given is not to be trusted."""
    is_family: bool = False
    """Whether instances of subclasses are packed too, and come back as the type itself."""


def _fold_zone(zone: datetime.tzinfo | None) -> Any:
    if zone is None:
        return None
    if isinstance(zone, datetime.timezone):
        return zone.utcoffset(None).total_seconds()
    if isinstance(zone, zoneinfo.ZoneInfo) and zone.key:
        return zone.key
    raise UnencodableValue(
        f"A time has the zone {zone!r}, which has no name to find it by.",
        fix="Use datetime.timezone or zoneinfo.ZoneInfo.",
    )


def _unfold_zone(folded: Any) -> datetime.tzinfo | None:
    if folded is None:
        return None
    if isinstance(folded, str):
        return zoneinfo.ZoneInfo(folded)
    return datetime.UTC if folded == 0 else datetime.timezone(datetime.timedelta(seconds=folded))


def _fold_datetime(moment: datetime.datetime) -> list[Any]:
    return [moment.replace(tzinfo=None, fold=0).isoformat(), _fold_zone(moment.tzinfo), moment.fold]


def _unfold_datetime(folded: list[Any]) -> datetime.datetime:
    text, zone, fold = folded
    return datetime.datetime.fromisoformat(text).replace(tzinfo=_unfold_zone(zone), fold=fold)


def _fold_time(moment: datetime.time) -> list[Any]:
    return [moment.replace(tzinfo=None, fold=0).isoformat(), _fold_zone(moment.tzinfo), moment.fold]


def _unfold_time(folded: list[Any]) -> datetime.time:
    text, zone, fold = folded
    return datetime.time.fromisoformat(text).replace(tzinfo=_unfold_zone(zone), fold=fold)


def _unfold_duration(folded: list[int]) -> datetime.timedelta:
    return datetime.timedelta(*folded)


KINDS = (
    Kind(1, tuple, list, tuple),
    Kind(2, set, list, set),
    Kind(3, frozenset, list, frozenset),
    Kind(4, int, str, int),  # those that 64 bits do not hold
    Kind(5, complex, lambda number: [number.real, number.imag], lambda folded: complex(*folded)),
    Kind(6, decimal.Decimal, str, decimal.Decimal),
    Kind(7, uuid.UUID, lambda value: value.bytes, lambda folded: uuid.UUID(bytes=folded)),
    Kind(8, datetime.datetime, _fold_datetime, _unfold_datetime),
    Kind(9, datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    Kind(10, datetime.time, _fold_time, _unfold_time),
    Kind(11, datetime.timedelta, lambda span: [span.days, span.seconds, span.microseconds], _unfold_duration),
    Kind(12, bytearray, bytes, bytearray),
    # A map's keys are atoms in msgpack; a dict with others travels as its items.
    Kind(13, dict, lambda mapping: [list(item) for item in mapping.items()], dict),
)


class Packer:
    """Packs values of plain types, those of `KINDS` and those of `more`, and unpacks them."""

    def __init__(self, more: Iterable[Kind] = ()) -> None:
        kinds = (*KINDS, *more)
        self._by_class = {kind.type: kind for kind in kinds}
        self._families = [kind for kind in kinds if kind.is_family]
        self._by_code = {kind.code: kind.unfold for kind in kinds}
        self._decode = msgspec.msgpack.Decoder(ext_hook=self._revive).decode

    def pack(self, value: Any) -> bytes:
        """The value as bytes. Raises UnencodableValue for one that holds anything unknown, or itself."""
        try:
            try:
                return msgspec.msgpack.encode(self._dress(value, ATOMS))
            except OverflowError:  # an integer beyond 64 bits is somewhere: so seldom that others do not look for it
                return msgspec.msgpack.encode(self._dress(value, ATOMS_BUT_INT))
        except RecursionError as error:
            raise UnencodableValue(f"A {value.__class__.__name__} is nested too deeply, or in itself.") from error
        except UnicodeEncodeError as error:
            raise UnencodableValue(f"A string in a {value.__class__.__name__} is not Unicode: {error}.") from error

    def unpack(self, data: bytes) -> Any:
        """The value. Raises Unreadable for bytes that are none."""
        try:
            return self._decode(data)
        except _UNREADABLE as error:
            raise Unreadable(f"{error.__class__.__name__}: {error}") from error

    def _dress(self, value: Any, atoms: frozenset[type]) -> Any:
        """The value with everything that msgpack does not have in extensions."""
        kind = value.__class__
        if kind in atoms:
            return value
        if kind is list:
            # Asked of all at once, a flat list or dict costs next to nothing.
            if atoms.issuperset(map(type, value)):
                return value
            return [part if part.__class__ in atoms else self._dress(part, atoms) for part in value]
        if kind is dict and _STRINGS.issuperset(map(type, value)):
            if atoms.issuperset(map(type, value.values())):
                return value
            return {key: part if part.__class__ in atoms else self._dress(part, atoms) for key, part in value.items()}
        if kind is int and INT_MIN <= value <= INT_MAX:
            return value
        known = self._by_class.get(kind)
        if known is None:
            known = next((family for family in self._families if isinstance(value, family.type)), None)
        if known is None:
            raise UnencodableValue(
                f"A value holds a {kind.__module__}.{kind.__qualname__}, which is not stored.",
                fix="Cache what it is made of: numbers, strings, bytes, dates, UUIDs, lists, dicts, tuples and sets.",
            )
        return msgspec.msgpack.Ext(known.code, msgspec.msgpack.encode(self._dress(known.fold(value), atoms)))

    def _revive(self, code: int, data: memoryview) -> Any:
        return self._by_code[code](self._decode(data))
