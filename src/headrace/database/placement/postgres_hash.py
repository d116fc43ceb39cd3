"""Postgres' own extended hash functions, so that the database can evaluate the slot of a key itself.

Bob Jenkins' lookup3 as Postgres has it in `src/common/hashfn.c` (`hash_bytes_extended`) and `hashfunc.c`
(`hashint8extended`, `hashtextextended`), little-endian. The results are 64 bits, here unsigned.
"""

import uuid

from headrace.errors import CallerError

_MASK = 0xFFFFFFFF
_START = 0x9E3779B9 + 3923095

Key = str | int | bytes | uuid.UUID


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


def hash_key(key: Key) -> int:
    """The hash of a key by its Python type: int as bigint, str as text, UUID as uuid, bytes as bytea."""
    if isinstance(key, bool):
        raise CallerError(f"The key {key} is a boolean.", fix="Shard by an integer, text, UUID or bytes column.")
    if isinstance(key, int):
        return hash_integer(key)
    if isinstance(key, str):
        return hash_bytes(key.encode())
    if isinstance(key, uuid.UUID):
        return hash_bytes(key.bytes)
    if isinstance(key, bytes):
        return hash_bytes(key)
    raise CallerError(
        f"The key {key!r} is a {type(key).__name__}.", fix="Shard by an integer, text, UUID or bytes column."
    )
