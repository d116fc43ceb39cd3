"""The envelope around every value in the shared tier. Whatever comes back from there is untrusted bytes.

    2 magic "hr" | 1 version | 1 flags | 4 check | 8 created_ms | 8 fresh_ms | 8 stale_ms | 4 load_us | 8 version |
    2 tags length | body: tags, payload

`check` is a CRC-32 over the key, the flags and everything after it: a flipped bit, a cut tail or an entry copied to
another key is noticed. With keys configured a seal is put around the body, which keeps out those who can write to the
server, and `check` covers the entry's place alone: over what is encrypted it would confirm a guess. Whether a seal is
required, and which, is decided by the configuration, never by the bytes. Anything odd is a `Rejected` with its reason,
not an exception: it becomes a miss.
"""

import struct
import sys
import zlib
from typing import Any

import msgspec

from headrace.cache.seal import ENCRYPTED, SIGNED, Seal
from headrace.cache.seal import Rejected as Rejected  # what `open` answers with belongs to its door
from headrace.errors import UnencodableValue

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"hr"
VERSION = 1
FOREVER_MS = 2**64 - 1
LIFE_MAX_S = 100 * 365 * 24 * 3600.0
"""What lives longer lives for ever: Redis refuses times that its clock cannot hold."""
_HEADER = struct.Struct("<2sBBIQQQIQH")
HEAD_BYTES = _HEADER.size
"""How much of an entry `version_in` needs."""
_CHECKED_FROM = 8
_SERIALIZER_MASK = 0x03
_TYPED = 0x08
_COMPRESSED = 0x10
_SEALED = SIGNED | ENCRYPTED
_KINDS = {0: "plain", SIGNED: "signed", ENCRYPTED: "encrypted"}
_SERIALIZER_IDS = {"msgpack": 0, "json": 1, "raw": 2}
_SERIALIZERS = {number: name for name, number in _SERIALIZER_IDS.items()}
_KNOWN_FLAGS = _TYPED | _COMPRESSED | _SEALED | 0x03
_SELF_EVIDENT = frozenset({Any, None, type(None), bool, int, float, str, bytes, list, dict})
"""What a value is taken for without a type, too."""
_LOAD_US_MAX = 2**32 - 1

Tags = tuple[tuple[str, bytes], ...]


class Envelope(msgspec.Struct, frozen=True):
    """A value with what must be known about it to judge its age. Times in milliseconds; `created_ms` is wall time."""

    value: Any
    created_ms: int
    fresh_ms: int
    """From `created_ms`; FOREVER_MS: no end."""
    stale_ms: int
    """From the end of freshness."""
    load_us: int = 0
    version: int = 0
    """Random, one a write: tells two writes of equal values apart."""
    tags: Tags = ()
    is_typed: bool = False
    """It was written as a type; who reads it without one sees the parts alone."""


class Sealed:
    """An entry ready to be written."""

    __slots__ = ("data", "generation", "key", "life_ms", "version")

    def __init__(self, key: str, data: bytes, life_ms: int | None, version: int, generation: bytes) -> None:
        self.key = key
        self.data = data
        self.life_ms = life_ms
        self.version = version
        self.generation = generation


class Codec:
    """Seals values into envelopes and opens them again, for one configuration of size, compression and seal."""

    __slots__ = ("_compress_min", "_decode_any", "_decoders", "_seal", "_tags_decoder", "_value_bytes_max")

    def __init__(
        self,
        *,
        compress_min: int | None = 1024,
        value_bytes_max: int = 16 * 1024 * 1024,
        seal: Seal | None = None,
    ) -> None:
        self._compress_min = value_bytes_max + 1 if compress_min is None else compress_min
        self._value_bytes_max = value_bytes_max
        self._seal = seal
        self._decoders: dict[tuple[int, Any], Any] = {}
        self._decode_any = msgspec.msgpack.Decoder().decode
        self._tags_decoder = msgspec.msgpack.Decoder(Tags)

    def seal(self, key: str, envelope: Envelope, *, serializer: str = "msgpack", type: Any = Any) -> bytes:
        """The bytes to store under `key`.

        Raises UnencodableValue when the value cannot be written, is too large, or would come back as something else.
        """
        payload = self._encode(key, envelope.value, serializer, type)
        flags = _SERIALIZER_IDS[serializer] | (0 if _is_self_evident(type) else _TYPED)
        if len(payload) >= self._compress_min:
            packed = zstd.compress(payload, level=1)
            if len(packed) < len(payload):
                payload, flags = packed, flags | _COMPRESSED
        tags = msgspec.msgpack.encode(envelope.tags) if envelope.tags else b""
        if len(tags) > 0xFFFF:
            raise UnencodableValue(
                f"The tags of {key!r} take {len(tags)} bytes; at most 65535 fit.", fix="Use fewer tags."
            )
        if self._seal is not None:
            place = self._seal.place(key)
            head = _head(envelope, flags | self._seal.flag, zlib.crc32(place), len(tags))
            return self._seal.close(place, head, tags + payload)
        header = _head(envelope, flags, 0, len(tags))
        checked = b"".join((header[_CHECKED_FROM:], tags, payload))
        check = zlib.crc32(checked, zlib.crc32(key.encode(), flags))
        return b"".join((header[:4], check.to_bytes(4, "little"), checked))

    def open(self, key: str, data: bytes, type: Any = Any) -> Envelope | Rejected:
        """The envelope in `data`, or why it is none that `key` may have. Never raises for what the bytes are."""
        size = len(data)
        if size < HEAD_BYTES:
            return Rejected("shorter than a header")
        magic, version, flags, check, created, fresh, stale, load_us, number, tags_len = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION or flags & ~_KNOWN_FLAGS:
            return Rejected("not written by this version of headrace")
        start = HEAD_BYTES
        if self._seal is not None or flags & _SEALED:
            body = self._unsealed(key, data, flags, check)
            if isinstance(body, Rejected):
                return body
            data, start = body, 0
        elif zlib.crc32(data[_CHECKED_FROM:], zlib.crc32(key.encode(), flags)) != check:
            return Rejected("altered, cut, or written for another key")
        tags_end = start + tags_len
        try:
            tags = self._tags_decoder.decode(data[start:tags_end]) if tags_len else ()
            payload = self._payload(data[tags_end:], flags)
            # The commonest entry by far, msgpack without a type, is not looked up.
            value = (
                self._decode_any(payload)
                if type is Any and not flags & _SERIALIZER_MASK
                else self._decode(payload, flags & _SERIALIZER_MASK, type)
            )
        except (msgspec.MsgspecError, zstd.ZstdError, UnicodeDecodeError, RecursionError) as error:
            # The message may quote the value, and reasons are logged.
            return Rejected(f"not readable: {error.__class__.__name__ if flags & ENCRYPTED else error}")
        return Envelope(value, created, fresh, stale, load_us, number, tags, bool(flags & _TYPED))

    def _payload(self, payload: bytes, flags: int) -> bytes:
        """The payload as it was before compression; raises DecodeError if it is larger than allowed."""
        if flags & _COMPRESSED:
            decompressor = zstd.ZstdDecompressor()
            unpacked: bytes = decompressor.decompress(payload, max_length=self._value_bytes_max + 1)
            if len(unpacked) <= self._value_bytes_max and (not decompressor.eof or decompressor.unused_data):
                raise msgspec.DecodeError("the packed payload is cut, or more follows it")
            payload = unpacked
        if len(payload) > self._value_bytes_max:
            raise msgspec.DecodeError("larger than value_bytes_max")
        return payload

    def _unsealed(self, key: str, data: bytes, flags: int, check: int) -> bytes | Rejected:
        """The body, if it has the seal that is required here, whatever the entry says of itself."""
        seal = self._seal
        if seal is None or flags & _SEALED != seal.flag:
            found = _KINDS.get(flags & _SEALED, "of no known kind")
            return Rejected(f"{found}, where only {seal.kind if seal else 'plain'} entries are accepted")
        place = seal.place(key)
        if zlib.crc32(place) != check:
            return Rejected("written for another key or namespace")
        return seal.open(place, data, HEAD_BYTES)

    def _decoder(self, number: int, type: Any) -> Any:
        """A decoder for the format and type; kept, because making one costs more than using it."""
        try:
            decoder = self._decoders.get((number, type))
        except TypeError:  # an unhashable annotation: rare enough to be built each time
            return _new_decoder(number, type)
        if decoder is None:
            decoder = _new_decoder(number, type)
            self._decoders[number, type] = decoder
        return decoder

    def _decode(self, payload: bytes, number: int, type: Any) -> Any:
        if number == _SERIALIZER_IDS["raw"]:
            return payload
        if number not in _SERIALIZERS:
            raise msgspec.DecodeError(f"serializer {number} is unknown")
        return self._decoder(number, type).decode(payload)

    def _encode(self, key: str, value: Any, serializer: str, type: Any) -> bytes:
        if serializer == "raw":
            if not isinstance(value, (bytes, bytearray, memoryview)):
                raise UnencodableValue(
                    f"{key!r} has a value of {value.__class__.__name__}; serializer raw takes bytes."
                )
            payload = bytes(value)
        else:
            payload = self._encode_checked(key, value, serializer, type)
        if len(payload) > self._value_bytes_max:
            raise UnencodableValue(
                f"The value of {key!r} takes {len(payload)} bytes; at most {self._value_bytes_max} are allowed.",
                fix="Cache less under one key, or raise RemoteConfig.value_bytes_max.",
            )
        return payload

    def _encode_checked(self, key: str, value: Any, serializer: str, type: Any) -> bytes:
        """Encode and read back: what another process would get must be what this one has."""
        encoder = msgspec.msgpack if serializer == "msgpack" else msgspec.json
        payload: bytes
        try:
            payload = encoder.encode(value)
            again = self._decoder(_SERIALIZER_IDS[serializer], type).decode(payload)
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError) as error:
            raise UnencodableValue(f"{key!r} has a value of {value.__class__.__name__}: {error}.") from error
        is_subclass = type is Any and again.__class__ is not value.__class__
        if not is_subclass and (again == value or _is_same(again, value)):
            return payload
        raise UnencodableValue(
            f"{key!r} has a value of {value.__class__.__name__} that would come back as {again.__class__.__name__}"
            " or unequal to itself.",
            fix="Pass `type=` (or annotate the return type of the cached function), or cache plain containers.",
        )


def _head(envelope: Envelope, flags: int, check: int, tags_len: int) -> bytes:
    return _HEADER.pack(
        MAGIC,
        VERSION,
        flags,
        check,
        envelope.created_ms,
        envelope.fresh_ms,
        envelope.stale_ms,
        min(envelope.load_us, _LOAD_US_MAX),
        envelope.version,
        tags_len,
    )


def milliseconds(seconds: float) -> int:
    """A life as an envelope holds it."""
    return int(seconds * 1000) if seconds < LIFE_MAX_S else FOREVER_MS


def version_in(head: bytes) -> int | None:
    """The version in the first HEAD_BYTES of an entry, unchecked: good for recognising a random number, not for
    trust."""
    if len(head) < HEAD_BYTES or not head.startswith(MAGIC):
        return None
    version: int = _HEADER.unpack_from(head)[8]
    return version


def _new_decoder(number: int, type: Any) -> Any:
    module = msgspec.json if _SERIALIZERS[number] == "json" else msgspec.msgpack
    try:
        return module.Decoder() if type is Any else module.Decoder(type)
    except TypeError as error:
        raise UnencodableValue(
            f"Values of type {type!r} cannot be read back: {error}.",
            fix="Use types that msgspec supports: Structs, dataclasses, TypedDicts, containers and standard scalars.",
        ) from error


def _is_self_evident(type: Any) -> bool:
    try:
        return type in _SELF_EVIDENT
    except TypeError:  # an unhashable annotation
        return False


def _is_same(one: Any, other: Any) -> bool:
    """Equality under which NaN, anywhere inside, is the same as NaN."""
    if one.__class__ is not other.__class__:
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(map(_is_same, one.items(), other.items()))
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other) or (isinstance(one, float) and one != one and other != other)
