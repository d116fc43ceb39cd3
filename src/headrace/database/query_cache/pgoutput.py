"""The messages of Postgres' decoding plug-in pgoutput, protocol 1: which transaction changed which tables. Pure.

Nothing of the rows is looked at. Source: the manual's chapter "Logical Replication Message Formats".
"""

import struct
from typing import Final, NamedTuple

_BEGIN: Final = struct.Struct(">xqqI")
_COMMIT: Final = struct.Struct(">xBqqq")
_TRUNCATE: Final = struct.Struct(">xIB")
_MESSAGE: Final = struct.Struct(">xBq")
_OID: Final = struct.Struct(">I")
_ROW_CHANGES: Final = frozenset(b"IUD")


class Changed(NamedTuple):
    """A committed transaction changed tables."""

    xid: int
    tables: frozenset[int]
    """Their OIDs; of a partition that of the published root."""


class Told(NamedTuple):
    """Somebody wrote a message into the log."""

    prefix: str
    content: bytes


class Decoder:
    """Puts the messages of a stream together to facts."""

    def __init__(self) -> None:
        self._xid = 0
        self._tables: set[int] = set()

    def read(self, message: bytes) -> Changed | Told | None:
        """What a message completes; None: nothing yet."""
        kind = message[0]
        if kind in _ROW_CHANGES:
            self._tables.add(_OID.unpack_from(message, 1)[0])
        elif kind == ord("B"):
            _, _, self._xid = _BEGIN.unpack_from(message)
            self._tables = set()
        elif kind == ord("T"):
            count, _ = _TRUNCATE.unpack_from(message)
            self._tables.update(_OID.unpack_from(message, 6 + 4 * number)[0] for number in range(count))
        elif kind == ord("C"):
            changed = Changed(self._xid, frozenset(self._tables))
            self._tables = set()
            return changed if changed.tables else None
        elif kind == ord("M"):
            return _told(message)
        return None


def _told(message: bytes) -> Told:
    start = _MESSAGE.size
    end = message.index(b"\0", start)
    length = _OID.unpack_from(message, end + 1)[0]
    return Told(message[start:end].decode(), message[end + 5 : end + 5 + length])
