"""Queued writes on disk: what was acknowledged survives a kill -9 of the process.

One append-only file a process in a shared directory, under an exclusive lock for as long as the process lives. A
record is written before its `set` returns, so the kernel has it; power loss is outlived only with `sync`. Whoever
opens the directory next adopts the files whose lock nobody holds. A file that is cut in the middle of a record is good
up to there.

    4 length | 4 CRC-32 | msgpack [key, data or nil, good until (wall ms, or nil), generation]

Every method blocks and belongs into a thread; only `Spool` objects of one process at a time touch one file.
"""

import fcntl
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from headrace.errors import DirectoryUnusable

SUFFIX = ".spool"
_PREFIX = struct.Struct("<II")
_RECORD_BYTES_MAX = 64 * 1024 * 1024


class Record(msgspec.Struct, array_like=True, frozen=True):
    """A write that is owed to the shared tier; `data` None takes back what was owed for the key."""

    key: str
    data: bytes | None
    until_ms: int | None
    generation: bytes


_decoder = msgspec.msgpack.Decoder(Record)


class Spool:
    """The file of this process, and the adoption of those that were left behind."""

    def __init__(self, directory: Path, *, sync: bool) -> None:
        self._directory = directory
        self._sync = sync
        self._file: int | None = None
        self._path = directory
        self._adopted: list[Path] = []
        self.size = 0

    def open(self) -> list[Record]:
        """Begin a file; the last record of each key that dead processes left, oldest first."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            adopted = dict(self._adopt())
            # A file under a fresh name that is locked before anybody can find it under its final one.
            name = f"{os.getpid()}-{os.urandom(4).hex()}"
            fresh = self._directory / f".{name}"
            self._file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path = fresh.rename(self._directory / f"{name}{SUFFIX}")
            owed = [record for record in adopted.values() if record.data is not None]
            self.append(owed)
        except OSError as error:
            raise DirectoryUnusable(
                f"The spool directory {self._directory} cannot be used: {error.strerror}.",
                fix="Give RemoteConfig.spool_directory a writable directory on a local disk.",
            ) from error
        for path in self._adopted:
            path.unlink(missing_ok=True)
        self._adopted.clear()
        return owed

    def append(self, records: Iterable[Record]) -> None:
        """Add records; on return the kernel has them."""
        assert self._file is not None
        chunks: list[bytes] = []
        for record in records:
            payload = msgspec.msgpack.encode(record)
            chunks.append(_PREFIX.pack(len(payload), zlib.crc32(payload)) + payload)
        data = memoryview(b"".join(chunks))
        while data:
            written = os.write(self._file, data)
            self.size += written
            data = data[written:]
        if self._sync:
            os.fsync(self._file)

    def restart(self, owed: Iterable[Record]) -> None:
        """Forget everything but what is still owed."""
        assert self._file is not None
        fresh = self._path.with_name(f".{self._path.name}")
        file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        old, self._file, self.size = self._file, file, 0
        self.append(owed)
        fresh.rename(self._path)
        os.close(old)

    def close(self, *, done: bool) -> None:
        """Let the file go; it is removed if nothing in it is owed."""
        if self._file is not None:
            if done:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _adopt(self) -> Iterator[tuple[str, Record]]:
        self._adopted = []
        for path in sorted(self._directory.glob(f"*{SUFFIX}"), key=lambda path: path.stat().st_mtime):
            file = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._adopted.append(path)
                for record in read(path.read_bytes()):
                    yield record.key, record
            except BlockingIOError:
                continue  # its process lives
            finally:
                os.close(file)


def read(data: bytes) -> Iterator[Record]:
    """The records up to the first that is cut or damaged."""
    at = 0
    while at + _PREFIX.size <= len(data):
        length, check = _PREFIX.unpack_from(data, at)
        payload = data[at + _PREFIX.size : at + _PREFIX.size + length]
        if length > _RECORD_BYTES_MAX or len(payload) < length or zlib.crc32(payload) != check:
            return
        try:
            yield _decoder.decode(payload)
        except msgspec.MsgspecError:
            return
        at += _PREFIX.size + length
