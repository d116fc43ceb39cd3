"""Signed records in a directory of one's own: nothing is looked into before its signature is verified.

    8 magic and format | 8 key id | 4 length of meta | 4 length of body | meta | body | 32 HMAC-SHA256 of all before

The owner of the process owns the directory (mode 0700) and each file (0600), no link is followed, and a record is
replaced whole or not at all. What cannot be trusted is moved to `quarantine/`, for somebody to look at. The directory
is bounded: the records that were used longest ago go first.

A directory that is full, read-only, gone or not ours is never the caller's problem: reads miss, writes do not happen,
and the observer is told once for each change of that.

Writing waits for the disk (7 ms in the median where this was made), so it happens in a thread behind; the lock of a
record is held from before it is made until it is in place, so that of several processes only one makes it. Locks are
the kernel's: whoever dies frees what it held. Everything here blocks and belongs into a thread.
"""

import errno
import fcntl
import os
import queue
import stat
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from headrace.agents.code.keys import KEY_ID_BYTES, MAC_BYTES, SigningKeys
from headrace.clock import Clock
from headrace.errors import ConfigError
from headrace.events import CodeStoreRecovered, CodeStoreUnavailable, Observer

MAGIC = b"HRCODE01"
RECORD_BYTES_MAX = 32 << 20
QUARANTINE = "quarantine"
QUARANTINE_MAX = 16
"""Files in quarantine; together an eighth of the directory's bound at most."""
WRITES_MAX = 64
"""Records that wait for the disk; what comes while they do is not written."""
FRESH_MAX_S = 600.0
"""A file that is still being written after this was left behind by a process that died."""
_HEAD = struct.Struct(f"<8s{KEY_ID_BYTES}sII")
_SUFFIX = ".code"
_FRESH = ".new"
_LOCK = ".lock"
_BYTE_LOCK = struct.Struct("hhqqi4x")
"""`struct flock`: type, whence, start, length, process."""
_LOCK_PAUSE_S = 0.002
_SCAN_AFTER_WRITES = 32
_KEEP = 0.9
_OPEN = os.O_NOFOLLOW | os.O_CLOEXEC


class BadRecord(Exception):
    """A record that is not what one of our keys signed, and why. Never leaves this room."""


class Record(NamedTuple):
    """What was signed, unchanged."""

    meta: bytes
    body: bytes


class Lock:
    """The right to make a record. Kept until `release`, or until the process ends."""

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Give it up; harmless when it was."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class CodeStore:
    """Records by name, which is 64 hexadecimal digits, within `bytes_max`. `keys` None: those of `<directory>.key`."""

    def __init__(
        self,
        directory: Path,
        *,
        keys: SigningKeys | None,
        bytes_max: int,
        lock_wait_s: float,
        observer: Observer,
        clock: Clock,
    ) -> None:
        if not directory.absolute().name:
            raise ConfigError(
                f"CodeCache.directory is {str(directory)!r}; it must have a name, for its key beside it."
            )
        self.directory = directory.absolute()
        self.evictions = 0
        """Records removed to keep the bound."""
        self.written = 0
        self.unwritten = 0
        """Records that could not be written, or did not find room in the queue."""
        self._keys = keys
        self._bytes_max = bytes_max
        self._lock_wait_s = lock_wait_s
        self._observer = observer
        self._clock = clock
        self._down: set[str] = set()
        self._never = threading.Event()
        self._bytes = 0
        self._writes_since_scan = _SCAN_AFTER_WRITES
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(WRITES_MAX)
        self._starting = threading.Lock()
        self._writer: threading.Thread | None = None

    # -- reading --------------------------------------------------------------------------------------------------

    def read(self, name: str) -> Record | None:
        """The record, or None where there is none. Raises BadRecord for one that must not be used."""
        try:
            with self._opened() as directory:
                data = _contents(name + _SUFFIX, directory)
                keys = self._signing_keys()
        except FileNotFoundError:
            self._works("read")
            return None
        except OSError as error:
            self._fails("read", error)
            return None
        self._works("read")
        return _verified(data, keys)

    def quarantine(self, name: str) -> None:
        """Move a record out of the way; a good one that was put in its place meanwhile is only made again."""
        try:
            with self._opened() as directory:
                with suppress(FileExistsError):
                    os.mkdir(QUARANTINE, 0o700, dir_fd=directory)
                inside = os.open(QUARANTINE, os.O_RDONLY | os.O_DIRECTORY | _OPEN, dir_fd=directory)
                try:
                    target = f"{name}.{os.urandom(4).hex()}"
                    os.replace(name + _SUFFIX, target, src_dir_fd=directory, dst_dir_fd=inside)
                    _keep_newest(inside, count=QUARANTINE_MAX, size=self._bytes_max // 8)
                finally:
                    os.close(inside)
        except FileNotFoundError:
            return  # another process was first
        except OSError as error:
            self._fails("write", error)

    # -- writing --------------------------------------------------------------------------------------------------

    def lock(self, name: str) -> Lock | None:
        """The lock of a record; None when nobody can have it, or somebody keeps it for longer than `lock_wait_s`."""
        give_up_at = self._clock.monotonic() + self._lock_wait_s
        try:
            with self._opened() as directory:
                descriptor = os.open(_LOCK, os.O_RDWR | os.O_CREAT | _OPEN, 0o600, dir_fd=directory)
        except OSError as error:
            self._fails("write", error)
            return None
        lock = Lock(descriptor)
        is_ours = False
        try:
            while not (is_ours := _locks(descriptor, name)) and self._clock.monotonic() < give_up_at:
                self._never.wait(_LOCK_PAUSE_S)
        except OSError as error:  # a file system without locks
            self._fails("write", error)
        finally:
            if not is_ours:
                lock.release()
        return lock if is_ours else None

    def write(self, name: str, meta: bytes, body: bytes, lock: Lock) -> None:
        """Put a record in its place behind the caller, and then release the lock."""
        size = _HEAD.size + len(meta) + len(body) + MAC_BYTES
        if size > min(RECORD_BYTES_MAX, self._bytes_max):
            self.unwritten += 1
            lock.release()
            return
        try:
            self._jobs.put_nowait(lambda: self._write(name, meta, body, lock))
        except queue.Full:
            self.unwritten += 1
            lock.release()
            return
        self._start_writer()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything handed to `write` so far is on disk or given up; False when that takes too long."""
        if self._writer is None:
            return True
        self._start_writer()
        reached = threading.Event()
        try:
            self._jobs.put(reached.set, timeout=timeout_s)
        except queue.Full:
            return False
        return reached.wait(timeout_s)

    def close(self, timeout_s: float) -> None:
        """Write what waits to be written, and end the thread."""
        if self.flush(timeout_s) and self._writer is not None:
            with suppress(queue.Full):
                self._jobs.put(None, timeout=timeout_s)
                self._writer.join(timeout_s)

    def _start_writer(self) -> None:
        with self._starting:
            # Also after a fork, which the thread does not survive.
            if self._writer is None or not self._writer.is_alive():
                self._writer = threading.Thread(target=self._work, name="headrace-code-writer", daemon=True)
                self._writer.start()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()

    def _write(self, name: str, meta: bytes, body: bytes, lock: Lock) -> None:
        try:
            with self._opened() as directory:
                keys = self._signing_keys()
                head = _HEAD.pack(MAGIC, keys.current, len(meta), len(body))
                signed = b"".join((head, meta, body))
                _place(signed + keys.sign(signed), name + _SUFFIX, directory)
                lock.release()
                os.fsync(directory)
                self._bytes += len(signed) + MAC_BYTES
                self._evict(directory)
        except OSError as error:
            self.unwritten += 1
            self._fails("write", error)
        else:
            self.written += 1
            self._works("write")
        finally:
            lock.release()

    def _evict(self, directory: int) -> None:
        """Keep the bound. Others write here too, so now and then the files themselves are counted."""
        self._writes_since_scan += 1
        if self._bytes <= self._bytes_max and self._writes_since_scan < _SCAN_AFTER_WRITES:
            return
        self._writes_since_scan = 0
        files = list(_files(directory))
        self._clear(files, directory)
        self._bytes = sum(status.st_size for name, status in files if name.endswith(_SUFFIX))
        if self._bytes <= self._bytes_max:
            return
        records = (pair for pair in files if pair[0].endswith(_SUFFIX))
        for name, status in sorted(records, key=lambda pair: pair[1].st_mtime_ns):
            if self._bytes <= self._bytes_max * _KEEP:
                return
            self._bytes -= _removed(name, status, directory)
            self.evictions += 1

    def _clear(self, files: Sequence[tuple[str, os.stat_result]], directory: int) -> None:
        """Remove what processes that died in the middle of something have left."""
        left_behind = self._clock.wall() - FRESH_MAX_S
        for name, status in files:
            if name.endswith(_FRESH) and status.st_mtime < left_behind:
                _removed(name, status, directory)

    # -- the directory --------------------------------------------------------------------------------------------

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """The directory, for as long as one operation takes: it may be removed and made again at any time."""
        flags = os.O_RDONLY | os.O_DIRECTORY | _OPEN
        try:
            descriptor = os.open(self.directory, flags)
        except FileNotFoundError:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self.directory, flags)
        try:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid():
                raise PermissionError(f"{self.directory} belongs to user {status.st_uid}, not to this process's")
            if status.st_mode & 0o077:
                # Somebody's directory that was named by mistake stays as it is.
                if strange := next((name for name, _ in _files(descriptor) if not _is_ours(name)), None):
                    raise PermissionError(f"{self.directory} is open to others, and {strange!r} in it is not ours")
                os.fchmod(descriptor, 0o700)
            yield descriptor
        finally:
            os.close(descriptor)

    def _signing_keys(self) -> SigningKeys:
        if self._keys is None:
            try:
                self._keys = SigningKeys.of_file(self.directory.with_name(f"{self.directory.name}.key"))
            except FileNotFoundError as error:  # which would look like a missing record
                raise PermissionError(str(error)) from error
        return self._keys

    def _fails(self, operation: str, error: OSError) -> None:
        if operation not in self._down:
            self._down.add(operation)
            self._observer.on(CodeStoreUnavailable(operation, str(self.directory), str(error)))

    def _works(self, operation: str) -> None:
        if operation in self._down:
            self._down.discard(operation)
            self._observer.on(CodeStoreRecovered(operation, str(self.directory)))


def _locks(descriptor: int, name: str) -> bool:
    """Lock a record's own byte of the lock file, which need not exist: nothing on disk changes for it.

    To make and remove a file for each lock would wait for the disk's journal, in the caller's time. Only Linux locks
    bytes for an open file (and not for a process) this way; elsewhere it is the whole file: one record at a time.
    """
    try:
        if sys.platform == "linux":
            byte = _BYTE_LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, int(name[-15:], 16), 1, 0)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, byte)
        else:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _contents(name: str, directory: int) -> bytes:
    """The bytes of a record's file. Raises BadRecord for what we cannot have put there."""
    try:
        # Not to be kept waiting by a pipe.
        descriptor = os.open(name, os.O_RDONLY | os.O_NONBLOCK | _OPEN, dir_fd=directory)
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENXIO}:
            raise BadRecord("a link or a socket") from error
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BadRecord("not a file")
        if status.st_uid != os.geteuid():
            raise BadRecord(f"belongs to user {status.st_uid}")
        if not _HEAD.size + MAC_BYTES < status.st_size <= RECORD_BYTES_MAX:
            raise BadRecord(f"{status.st_size} bytes is no record's length")
        chunks = []
        left = status.st_size
        while left and (chunk := os.read(descriptor, left)):
            chunks.append(chunk)
            left -= len(chunk)
        with suppress(OSError):
            os.utime(descriptor)  # eviction goes by it; where that cannot be written, nothing is evicted either
        return b"".join(chunks)
    finally:
        os.close(descriptor)


def _verified(data: bytes, keys: SigningKeys) -> Record:
    """The parts of a record. Up to the comparison of signatures only fixed places of it are looked at."""
    if len(data) <= _HEAD.size + MAC_BYTES:
        raise BadRecord("cut")
    magic, key_id, meta_bytes, body_bytes = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise BadRecord("not a record of this format")
    if not keys.knows(key_id):
        raise BadRecord(f"signed with a key that is not here, {key_id.hex()}")
    if not keys.verifies(key_id, memoryview(data)[:-MAC_BYTES], data[-MAC_BYTES:]):
        raise BadRecord("signature does not match")
    if _HEAD.size + meta_bytes + body_bytes + MAC_BYTES != len(data):
        raise BadRecord("lengths do not match")
    body_at = _HEAD.size + meta_bytes
    return Record(data[_HEAD.size : body_at], data[body_at : body_at + body_bytes])


def _place(data: bytes, name: str, directory: int) -> None:
    """Whoever looks sees the file as it was before or as it is after, whenever this process dies."""
    fresh = f".{os.urandom(8).hex()}{_FRESH}"
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN, 0o600, dir_fd=directory)
    try:
        try:
            left = memoryview(data)
            while left:
                left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(fresh, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(OSError):
            os.unlink(fresh, dir_fd=directory)
        raise


def _files(directory: int) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # removed by another process meanwhile
                yield entry.name, entry.stat(follow_symlinks=False)


def _is_ours(name: str) -> bool:
    return name in {_LOCK, QUARANTINE} or name.endswith((_SUFFIX, _FRESH))


def _removed(name: str, status: os.stat_result, directory: int) -> int:
    """How many bytes are gone; a folder that somebody put there stays."""
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        return status.st_size
    except (IsADirectoryError, PermissionError):
        return 0
    return status.st_size


def _keep_newest(directory: int, *, count: int, size: int) -> None:
    for name, status in sorted(_files(directory), key=lambda pair: pair[1].st_ctime_ns, reverse=True):
        count -= 1
        size -= status.st_size
        if count < 0 or size < 0:
            _removed(name, status, directory)
