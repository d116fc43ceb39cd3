"""How one process's picture reaches the others: a file that is replaced whole, and read only when it changed."""

import os
from pathlib import Path

import msgspec

from headrace.monitor.snapshot import Point, Snapshot, Summary

_MAGIC = b"headrace snapshot 1\n"


class Publication(msgspec.Struct, frozen=True):
    """What the folding process tells the others."""

    snapshot: Snapshot
    points: tuple[Point, ...]
    """The last hour."""
    summaries: tuple[Summary, ...] = ()
    """Of the spans in `MonitorConfig.summary_minutes`."""


class SnapshotFile:
    """One writer, any number of readers. Both touch the disk: a thread's work, not an event loop's."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Publication)
        self._seen: tuple[int, int, int] | None = None
        self._known: Publication | None = None

    @property
    def path(self) -> Path:
        """Where it is."""
        return self._path

    def write(self, snapshot: Snapshot, points: tuple[Point, ...], summaries: tuple[Summary, ...] = ()) -> None:
        """Replace what readers see, all at once. OSError when the disk is full or the directory is gone."""
        payload = _MAGIC + self._encoder.encode(Publication(snapshot, points, summaries))
        unfinished = self._path.with_name(f"{self._path.name}.{os.getpid()}.new")
        try:
            unfinished.write_bytes(payload)
            unfinished.replace(self._path)
        finally:
            unfinished.unlink(missing_ok=True)

    def read(self) -> tuple[Snapshot, tuple[Point, ...]] | None:
        """The snapshot and the points; None when there are none, or what is there is torn or not ours."""
        publication = self.publication()
        return None if publication is None else (publication.snapshot, publication.points)

    def publication(self) -> Publication | None:
        """Everything that was published. An unchanged file costs one `stat`."""
        try:
            status = self._path.stat()
            seen = (status.st_ino, status.st_mtime_ns, status.st_size)
            if seen != self._seen:
                self._known, self._seen = self._parse(self._path.read_bytes()), seen
        except OSError:
            self._known, self._seen = None, None
        return self._known

    def _parse(self, payload: bytes) -> Publication | None:
        if not payload.startswith(_MAGIC):
            return None
        try:
            return self._decoder.decode(memoryview(payload)[len(_MAGIC) :])
        except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError):
            return None
