"""What is owed to the shared tier, on disk: what was acknowledged survives a kill -9 of the process.

One append-only file a process in a shared directory, under an exclusive lock for as long as the process lives. A
record is written before its `set` or `delete` returns, so the kernel has it; power loss is outlived only with `sync`.
Whoever opens the directory next for the same namespace adopts the files whose lock nobody holds. A file that is cut in
the middle of its last record is good up to there: the call that wrote it never returned.

    4 length | 4 CRC-32 | msgpack [key, data or nil, good until (wall ms, or nil), generation, kind]

Nothing is lost in silence. A record that cannot be read with the keys of the configuration is put aside in a file that
ends in `.aside`: rename it to `.spool`, with the key back in the keyring, and it is delivered. A file that is damaged
in the middle is kept whole as `.damaged`.

Every method blocks and belongs into a thread; only `Spool` objects of one process at a time touch one file.
"""

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from headrace.cache.config import VALUE_BYTES_LIMIT
from headrace.errors import DirectoryUnusable

SUFFIX = ".spool"
ASIDE = ".aside"
DAMAGED = ".damaged"
WRITE = "write"
"""The kind of a record that holds an entry; the others are the kinds of invalidations."""
_PREFIX = struct.Struct("<II")
_RECORD_BYTES_MAX = VALUE_BYTES_LIMIT + 1024 * 1024
"""More than the largest entry takes with its key, tags and seal; what says that it is longer is damaged."""


class Record(msgspec.Struct, array_like=True, frozen=True):
    """What is owed to the shared tier: a write or an invalidation. `data` None: it is not owed any more."""

    key: str
    """Or the tag or the pattern, by `kind`."""
    data: bytes | None
    until_ms: int | None
    generation: bytes
    kind: str = WRITE


_decoder = msgspec.msgpack.Decoder(Record)


class Spool:
    """The file of this process, and the adoption of those that were left behind."""

    def __init__(self, directory: Path, *, sync: bool, namespace: str = "headrace") -> None:
        self._directory = directory
        self._sync = sync
        # Entries know their key but not their namespace, and a namespace may hold what no file name can.
        self._label = hashlib.blake2b(namespace.encode(), digest_size=6).hexdigest()
        self._file: int | None = None
        self._path = directory
        self.size = 0
        self.damaged: list[Path] = []
        """Where files are kept that were found damaged."""

    def open(self) -> list[Record]:
        """Begin a file; the last record of each write and invalidation that dead processes left, oldest first."""
        left: list[_Left] = []
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            left.extend(self._left_behind())
            owed = _last_records(left)
            # A file under a fresh name that is locked before anybody can find it under its final one.
            name = f"{self._label}-{os.getpid()}-{os.urandom(4).hex()}"
            fresh = self._directory / f".{name}"
            self._file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._path = fresh.rename(self._directory / f"{name}{SUFFIX}")
            self.append(owed)
            for one in left:
                if one.is_whole:
                    one.path.unlink()
                else:
                    self.damaged.append(one.path.rename(one.path.with_suffix(DAMAGED)))
        except OSError as error:
            raise DirectoryUnusable(
                f"The spool directory {self._directory} cannot be used: {error.strerror}.",
                fix="Give RemoteConfig.spool_directory a writable directory on a local disk.",
            ) from error
        finally:
            for one in left:
                os.close(one.file)
        return owed

    def append(self, records: Iterable[Record]) -> None:
        """Add records; on return the kernel has them. If it cannot take them all, it has none."""
        assert self._file is not None
        try:
            self.size += _write(self._file, records, sync=self._sync)
        except OSError:
            # What follows half a record could not be read again.
            os.ftruncate(self._file, self.size)
            raise

    def restart(self, owed: Iterable[Record]) -> None:
        """Forget everything but what is still owed."""
        assert self._file is not None
        fresh = self._path.with_name(f".{self._path.name}")
        file = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = _write(file, owed, sync=self._sync)
            fresh.rename(self._path)
        except OSError:
            os.close(file)
            fresh.unlink(missing_ok=True)
            raise
        old, self._file, self.size = self._file, file, size
        os.close(old)

    def put_aside(self, records: Iterable[Record]) -> Path:
        """Keep records that cannot be delivered where nobody adopts them; the path of the file."""
        path = self._path.with_suffix(ASIDE)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            _write(file, records, sync=True)
        finally:
            os.close(file)
        return path

    def close(self, *, done: bool) -> None:
        """Let the file go; it is removed if nothing in it is owed."""
        if self._file is not None:
            if done:
                self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _left_behind(self) -> Iterator["_Left"]:
        """The files of dead processes, which are ours for as long as they are open."""
        for path in sorted(self._directory.glob(f"{self._label}-*{SUFFIX}"), key=_modified):
            try:
                file = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue  # another process has just adopted it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Its process may live and have begun another file under this name.
                is_left = path.stat().st_ino == os.fstat(file).st_ino
            except (BlockingIOError, FileNotFoundError):
                is_left = False
            if not is_left:
                os.close(file)
                continue
            with open(file, "rb", closefd=False) as data:
                yield _Left(path, file, *read(data.read()))


class _Left(NamedTuple):
    """What a dead process left."""

    path: Path
    file: int
    records: list[Record]
    is_whole: bool


def _last_records(left: Iterable[_Left]) -> list[Record]:
    owed: dict[tuple[str, str], Record] = {}
    for one in left:
        for record in one.records:
            # Taken out first, so that the order is that of the last records.
            owed.pop((record.kind, record.key), None)
            owed[record.kind, record.key] = record
    return [record for record in owed.values() if record.data is not None]


def read(data: bytes) -> tuple[list[Record], bool]:
    """The records up to the first that is cut or damaged, and whether no more than the end of the last is missing."""
    records: list[Record] = []
    at = 0
    while at + _PREFIX.size <= len(data):
        length, check = _PREFIX.unpack_from(data, at)
        payload = data[at + _PREFIX.size : at + _PREFIX.size + length]
        if length > _RECORD_BYTES_MAX:
            return records, False
        if len(payload) < length:
            break
        try:
            if zlib.crc32(payload) != check:
                return records, False
            records.append(_decoder.decode(payload))
        except msgspec.MsgspecError:
            return records, False
        at += _PREFIX.size + length
    return records, True


def _write(file: int, records: Iterable[Record], *, sync: bool) -> int:
    """Append records; how many bytes they took."""
    chunks: list[bytes] = []
    for record in records:
        payload = msgspec.msgpack.encode(record)
        chunks.append(_PREFIX.pack(len(payload), zlib.crc32(payload)) + payload)
    data = memoryview(b"".join(chunks))
    size = len(data)
    while data:
        data = data[os.write(file, data) :]
    if sync:
        os.fsync(file)
    return size


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has just adopted it
        return 0.0
