"""Postgres' own extended hash functions, so that the database can evaluate the slot of a key itself.

Bob Jenkins' lookup3 as Postgres has it in `src/common/hashfn.c` (`hash_bytes_extended`) and `hashfunc.c`
(`hashint8extended`, `hashtextextended`), little-endian; `hash_numeric_extended` of `numeric.c`; dates and timestamps
as the integers that they are. The results are 64 bits, here unsigned. What Postgres itself says of a value of any type
is `hash_record_extended(ROW(value), 0)`.

Text hashes as its UTF-8 bytes: that is so in a UTF8 database under a deterministic collation, and only there.
"""

import datetime
from collections.abc import Callable
from decimal import Decimal
from functools import lru_cache
from typing import Any, Final

from headrace.database.placement.keys import Key, kind_of
from headrace.errors import CallerError

__all__ = ["Key", "hash_bytes", "hash_integer", "hash_key", "hash_numeric"]

_MASK = 0xFFFFFFFF
_MASK_64 = 0xFFFFFFFFFFFFFFFF
_START = 0x9E3779B9 + 3923095

_REMEMBERED = 16_384
"""Keys whose hash is kept: a text of 36 characters takes microseconds to hash in Python, and tenants come again."""
_DIGITS = 4
"""Decimal digits in one digit of Postgres' numeric, whose base is 10,000."""
_DAY_0: Final = datetime.date(2000, 1, 1)
_INSTANT_0: Final = datetime.datetime(2000, 1, 1)  # noqa: DTZ001 - Postgres' timestamp has no time zone either
_UTC_0: Final = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND: Final = datetime.timedelta(microseconds=1)


def _rotate(value: int, bits: int) -> int:
    return ((value << bits) | (value >> (32 - bits))) & _MASK


def _mix(a: int, b: int, c: int) -> tuple[int, int, int]:
    for first, second, third in ((4, 6, 8), (16, 19, 4)):
        a = ((a - c) & _MASK) ^ _rotate(c, first)
        c = (c + b) & _MASK
        b = ((b - a) & _MASK) ^ _rotate(a, second)
        a = (a + c) & _MASK
        c = ((c - b) & _MASK) ^ _rotate(b, third)
        b = (b + a) & _MASK
    return a, b, c


def _final(a: int, b: int, c: int) -> int:
    c = ((c ^ b) - _rotate(b, 14)) & _MASK
    a = ((a ^ c) - _rotate(c, 11)) & _MASK
    b = ((b ^ a) - _rotate(a, 25)) & _MASK
    c = ((c ^ b) - _rotate(b, 16)) & _MASK
    a = ((a ^ c) - _rotate(c, 4)) & _MASK
    b = ((b ^ a) - _rotate(a, 14)) & _MASK
    c = ((c ^ b) - _rotate(b, 24)) & _MASK
    return (b << 32) | c


def _seeded(length: int, seed: int) -> tuple[int, int, int]:
    a = b = c = (_START + length) & _MASK
    if seed:
        return _mix((a + (seed >> 32)) & _MASK, (b + seed) & _MASK, c)
    return a, b, c


def hash_bytes(data: bytes, seed: int = 0) -> int:
    """`hash_bytes_extended`: what text, varchar, bytea and uuid keys hash to (deterministic collations only)."""
    a, b, c = _seeded(len(data), seed)
    whole = len(data) - len(data) % 12
    for at in range(0, whole, 12):
        a = (a + int.from_bytes(data[at : at + 4], "little")) & _MASK
        b = (b + int.from_bytes(data[at + 4 : at + 8], "little")) & _MASK
        c = (c + int.from_bytes(data[at + 8 : at + 12], "little")) & _MASK
        a, b, c = _mix(a, b, c)
    tail = data[whole:]
    a = (a + int.from_bytes(tail[:4], "little")) & _MASK
    b = (b + int.from_bytes(tail[4:8], "little")) & _MASK
    # The lowest byte of c is reserved for the length, which is why the last word is shifted.
    c = (c + (int.from_bytes(tail[8:11], "little") << 8)) & _MASK
    return _final(a, b, c)


def hash_integer(value: int, seed: int = 0) -> int:
    """`hashint8extended`; equal to `hashint4extended` and `hashint2extended` for values that fit those types."""
    if not -(2**63) <= value < 2**63:
        raise CallerError(
            f"The key {value} does not fit a Postgres bigint.", fix="Use a key within 64 bits, or a text key."
        )
    low, high = value & _MASK, (value >> 32) & _MASK
    low ^= high if value >= 0 else ~high & _MASK
    a, b, c = _seeded(4, seed)
    return _final((a + low) & _MASK, b, c)


def hash_numeric(value: Decimal, seed: int = 0) -> int:
    """`hash_numeric_extended`: equal numbers have one hash, whatever their scale (1.0 and 1.00)."""
    if not value.is_finite():
        return seed
    _, decimals, exponent = value.as_tuple()
    assert isinstance(exponent, int), "a finite Decimal has a number as its exponent"
    text = "".join(map(str, decimals)).lstrip("0")
    if not text:
        return (seed - 1) & _MASK_64
    # Cut into digits of base 10,000 left and right of the decimal point, as numeric stores them.
    whole = len(text) + exponent
    text = "0" * (-whole % _DIGITS) + text
    text += "0" * (-len(text) % _DIGITS)
    digits = [int(text[at : at + _DIGITS]) for at in range(0, len(text), _DIGITS)]
    weight = -(-whole // _DIGITS) - 1
    while digits[-1] == 0:
        digits.pop()
    return hash_bytes(b"".join(digit.to_bytes(2, "little") for digit in digits), seed) ^ (weight & _MASK_64)


def _hash_text(key: str) -> int:
    try:
        return hash_bytes(key.encode())
    except UnicodeEncodeError as error:
        raise CallerError(f"The key {key!r} is no Unicode text.", fix="Use bytes for what is not text.") from error


def _hash_instant(key: datetime.datetime) -> int:
    since = key - (_INSTANT_0 if key.tzinfo is None else _UTC_0)
    return hash_integer(since // _MICROSECOND)


_HASHES: Final[dict[str, Callable[[Any], int]]] = {
    "boolean": hash_integer,
    "integer": hash_integer,
    "numeric": hash_numeric,
    "text": _hash_text,
    "uuid": lambda key: hash_bytes(key.bytes),
    "bytes": hash_bytes,
    "date": lambda key: hash_integer((key - _DAY_0).days),
    "timestamp": _hash_instant,
    "timestamptz": _hash_instant,
}


@lru_cache(maxsize=_REMEMBERED, typed=True)
def hash_key(key: Key) -> int:
    """The hash of a key by its Python type: int as bigint, str as text, Decimal as numeric, an aware datetime as
    timestamptz ..., so it must be of the type of its column: 5 and "5" have different homes.
    """
    return _HASHES[kind_of(key)](key)
