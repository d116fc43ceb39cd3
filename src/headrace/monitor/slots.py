"""One process's slot: its series and their cells, in memory that others may read while it writes.

A slot has exactly one writing process, so counting needs no lock. It describes itself: its directory says which series
begins at which cell. Entries are only ever appended, and the published length is stored after the entry, so a reader
sees a directory that is whole, if perhaps a moment old; a checksum guards against machines that show two stores of
another core in the wrong order. Every cell is one aligned store of 8 bytes, which a reader sees before or after, never
half.

What a reader may see between two cells: the bucket of a request and not yet its sum, or its duration and not yet its
status. That is at most one request a process at the instant of reading, it is whole at the next, and no number is
derived in a way that would make it negative: counts are sums of buckets.
"""

import zlib
from collections.abc import Mapping
from typing import Final, NamedTuple, Self

import msgspec

from headrace.monitor.histogram import CELLS, Distribution

# Cells of a slot's header.
_GENERATION, _DIRECTORY, _USED, _REFUSED, _PROCESSES = range(5)
_HEADER_CELLS: Final = 8

COUNTER: Final = 0
GAUGE: Final = 1
HISTOGRAM: Final = 2
WIDTH: Final = (1, 1, CELLS)
"""How many cells each kind takes."""

SLOT_BYTES: Final = 2_097_152
"""Room for 250 histograms beside some thousand counters and gauges."""
SLOT_BYTES_MIN: Final = 65_536
PAYLOAD_MAX: Final = 4_000
"""Bytes of a series' name and labels together; longer ones overflow."""


class Series(NamedTuple):
    """A name and its labels, sorted by label."""

    name: str
    labels: tuple[tuple[str, str], ...] = ()

    def label(self, key: str, default: str = "") -> str:
        """The value of one label."""
        for name, value in self.labels:
            if name == key:
                return value
        return default


_OVERFLOWED: Final = (("overflow", "true"),)


class Entry(NamedTuple):
    """One line of a slot's directory: `series`, a `kind` of three, begins at cell `at`."""

    kind: int
    at: int
    series: Series


class Contents:
    """What slots add up to."""

    __slots__ = ("counters", "histograms")

    def __init__(self) -> None:
        self.counters: dict[Series, int] = {}
        self.histograms: dict[Series, Distribution] = {}

    def add(self, other: "Contents") -> None:
        """Merge, exactly."""
        counters, histograms = self.counters, self.histograms
        for series, value in other.counters.items():
            counters[series] = counters.get(series, 0) + value
        for series, distribution in other.histograms.items():
            known = histograms.get(series)
            histograms[series] = distribution if known is None else known + distribution


class SlotReading(NamedTuple):
    """One living process, as its slot shows it."""

    slot: int
    pid: int
    generation: int
    contents: Contents
    gauges: dict[Series, float]
    refused: int


class Folded:
    """Totals over all processes at one instant, and each living process by itself."""

    __slots__ = ("counters", "histograms", "identity", "refused", "retired", "slots")

    def __init__(
        self, identity: int, totals: Contents, slots: tuple[SlotReading, ...], *, retired: int = 0, refused: int = 0
    ) -> None:
        self.identity = identity
        """Differs when the file was made anew: totals of two identities cannot be compared."""
        self.counters: Mapping[Series, int] = totals.counters
        self.histograms: Mapping[Series, Distribution] = totals.histograms
        self.slots = slots
        """The living, with their own counters and gauges. Slot -1 counts in private memory."""
        self.retired = retired
        """Processes that are gone and whose counts are in the totals."""
        self.refused = refused
        """Declarations that found no room; their counts are in their name's series with overflow="true"."""


class Slot:
    """One slot's memory, shared or private: a header, a directory, and cells seen as integers and as doubles."""

    __slots__ = (
        "_bytes",
        "_directory_end",
        "_known",
        "_parsed",
        "_parsed_generation",
        "_places",
        "cells",
        "floats",
    )

    def __init__(self, memory: memoryview) -> None:
        self._bytes = memory
        self.cells: memoryview[int] = memory.cast("Q")
        self.floats: memoryview[float] = memory.cast("d")
        self._directory_end = _HEADER_CELLS * 8 + len(memory) // 32 * 8
        self._places: dict[tuple[int, Series], int] = {}
        self._known: list[Entry] = []
        self._parsed = 0
        self._parsed_generation = -1

    @classmethod
    def private(cls, slot_bytes: int) -> Self:
        """A slot that no other process sees."""
        slot = cls(memoryview(bytearray(slot_bytes)))
        slot.reset()
        return slot

    def release(self) -> None:
        """Give the memory back to whoever maps it."""
        self.cells.release()
        self.floats.release()
        self._bytes.release()

    def reset(self, generation: int = 0) -> None:
        """Empty it, for a new owner. The marks go last: whoever is killed on the way leaves nothing half empty."""
        self._places.clear()
        cells = self.cells
        # The directory's mark is of entries already published; one that was being written lies less than a page
        # behind.
        self._zero(
            _HEADER_CELLS * 8, min(self._directory_end, _HEADER_CELLS * 8 + cells[_DIRECTORY] + PAYLOAD_MAX + 16)
        )
        self._zero(self._directory_end, cells[_USED] * 8)
        cells[_REFUSED] = cells[_PROCESSES] = 0
        cells[_DIRECTORY] = 0
        cells[_USED] = self._directory_end // 8
        cells[_GENERATION] = generation

    def _zero(self, begin: int, end: int) -> None:
        if end > begin:
            self._bytes[begin:end] = bytes(end - begin)

    @property
    def refused(self) -> int:
        """How many series found no room."""
        return self.cells[_REFUSED]

    @property
    def processes(self) -> int:
        """Of how many processes that are gone it holds the totals."""
        return self.cells[_PROCESSES]

    def place(self, kind: int, series: Series) -> int | None:
        """The first cell of a series: its own, without room for it that of its name's overflow, else none.

        For the writer only. Every series that found no room of its own is counted.
        """
        at = self._declare(kind, series)
        if at is None:
            self.cells[_REFUSED] += 1
            at = self._declare(kind, overflow(series))
        return at

    def has(self, kind: int, series: Series) -> bool:
        """Whether a series has a place of its own; for the writer only."""
        return (kind, series) in self._places

    def _declare(self, kind: int, series: Series) -> int | None:
        """Append a series to the directory. The last eighth of both areas is kept for overflow series."""
        known = self._places.get((kind, series))
        if known is not None:
            return known
        cells = self.cells
        at = cells[_USED]
        payload = msgspec.msgpack.encode((kind, at, series.name, series.labels))
        begin = _HEADER_CELLS * 8 + cells[_DIRECTORY]
        length = _padded(len(payload))
        share = 8 if series.labels == _OVERFLOWED else 7
        directory_max = self._directory_end * share // 8
        cells_max = len(cells) * share // 8
        if len(payload) > PAYLOAD_MAX or begin + length > directory_max or at + WIDTH[kind] > cells_max:
            return None
        head = len(payload).to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little")
        self._bytes[begin : begin + 8 + len(payload)] = head + payload
        cells[_USED] = at + WIDTH[kind]
        cells[_DIRECTORY] += length
        self._places[kind, series] = at
        return at

    def entries(self) -> list[Entry]:
        """The directory; what was read before is not read again."""
        generation, published = self.cells[_GENERATION], self.cells[_DIRECTORY]
        if generation != self._parsed_generation or published < self._parsed:
            self._known, self._parsed, self._parsed_generation = [], 0, generation
        while self._parsed < published:
            begin = _HEADER_CELLS * 8 + self._parsed
            length = int.from_bytes(self._bytes[begin : begin + 4], "little")
            checksum = int.from_bytes(self._bytes[begin + 4 : begin + 8], "little")
            payload = bytes(self._bytes[begin + 8 : begin + 8 + length])
            if not payload or zlib.crc32(payload) != checksum:
                break  # published, but not yet visible here: it will be at the next reading
            kind, at, name, labels = msgspec.msgpack.decode(
                payload, type=tuple[int, int, str, tuple[tuple[str, str], ...]]
            )
            self._known.append(Entry(kind, at, Series(name, labels)))
            self._parsed += _padded(length)
        return self._known

    def contents(self) -> Contents:
        """Its counters and histograms as they stand."""
        contents, cells = Contents(), self.cells
        for kind, at, series in self.entries():
            if kind == COUNTER:
                contents.counters[series] = cells[at]
            elif kind == HISTOGRAM:
                contents.histograms[series] = Distribution.read(cells, at)
        return contents

    def gauges(self) -> dict[Series, float]:
        """Its gauges as they stand."""
        return {series: self.floats[at] for kind, at, series in self.entries() if kind == GAUGE}

    def reading(self, index: int, pid: int, generation: int) -> SlotReading:
        """Everything that it says, as the slot number `index`."""
        return SlotReading(index, pid, generation, self.contents(), self.gauges(), self.refused)

    def store(self, contents: Contents, *, processes: int, refused: int) -> None:
        """Fill an empty slot with totals; what finds no room is added to its name's overflow series."""
        self.cells[_PROCESSES] = processes
        self.cells[_REFUSED] = refused
        for series, value in contents.counters.items():
            at = self.place(COUNTER, series)
            if at is not None:
                self.cells[at] += value
        for series, distribution in contents.histograms.items():
            at = self.place(HISTOGRAM, series)
            if at is not None:
                (Distribution.read(self.cells, at) + distribution).write(self.cells, at)


def _padded(payload_bytes: int) -> int:
    """The length of a directory entry: 8 bytes of head, and so much that the next one is aligned."""
    return -(-(payload_bytes + 8) // 8) * 8


def overflow(series: Series) -> Series:
    """The series that takes in what has no place of its own."""
    return Series(series.name, _OVERFLOWED)
