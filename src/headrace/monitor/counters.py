"""Counters, gauges and histograms that all processes of one service share, without a lock on the path that counts.

    counters = Counters.open(path)                      # None: this process alone
    hits = counters.counter("headrace_cache_hits_total", tier="memory")
    hits.add()                                          # bind a series once, add often
    counters.fold().counters                            # the totals over all processes, living and dead

Each process writes into its own slot of one memory-mapped file (see `slot_file`). It claims the slot at its
first write, so a process that is forked later gets one of its own without asking for it, and one that never counts
takes none. Where no slot is to be had (all taken, disk full), it counts in private memory and moves what it has,
whole, as soon as a fold finds a free slot.

An addition is load, add, store on one cell. Threads of one process share its slot: CPython switches threads only at
calls and jumps back, none of which lies between load and store, so additions are whole under the GIL. Without the GIL
they are not; there, count in one thread.

The module is typed so that mypyc can compile it, and runs unchanged as plain Python.
"""

import os
import re
import threading
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Final

from headrace.errors import CallerError, ConfigError, NotOpen
from headrace.monitor.histogram import BYTES, Bound, Histogram
from headrace.monitor.slot_file import SlotFile
from headrace.monitor.slots import (
    COUNTER,
    GAUGE,
    HISTOGRAM,
    SLOT_BYTES,
    SLOT_BYTES_MIN,
    WIDTH,
    Contents,
    Folded,
    Series,
    Slot,
    SlotReading,
    overflow,
)

_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
KINDS: Final = ("counter", "gauge", "histogram")

# Where the series write for which not even their overflow series has room; they are counted as refused.
_NOWHERE: Final = memoryview(bytearray(BYTES)).cast("Q")
_NOWHERE_FLOATS: Final = memoryview(bytearray(BYTES)).cast("d")


class Counter(Bound):
    """A number that only grows."""

    __slots__ = ()

    def add(self, n: int = 1) -> None:
        """Count `n` more, n >= 0."""
        if n < 0:
            raise CallerError(
                f"A counter takes steps of 0 or more, not {n}.", fix="Use a gauge for what goes down too."
            )
        try:
            self._cells[self._at] += n
        except IndexError:
            if self._settled():
                self.add(n)


class Gauge(Bound):
    """A number that this process sets, and that is forgotten with the process."""

    __slots__ = ("_floats",)

    def __init__(self, settle: Callable[[], bool] | None = None) -> None:
        super().__init__(settle)
        self._floats: memoryview[float] = memoryview(array("d"))

    def move(self, cells: "memoryview[int]", floats: "memoryview[float]", at: int) -> None:
        """Write from now on at cell `at`, as a double."""
        super().move(cells, floats, at)
        self._floats = floats

    def withdraw(self) -> None:
        """Forget the place; the next write settles anew."""
        super().withdraw()
        self._floats = memoryview(array("d"))

    def set(self, value: float) -> None:
        """Say what it is now."""
        try:
            self._floats[self._at] = value
        except IndexError:
            if self._settled():
                self.set(value)


class Counters:
    """The door: declares series, folds all processes. Thread-safe, and safe to use on both sides of a fork."""

    def __init__(self, file: SlotFile | None, slot_bytes: int) -> None:
        """Use `Counters.open`."""
        self._file = file
        self._slot_bytes = slot_bytes
        self._identity = int.from_bytes(os.urandom(7), "little")
        self._slot: Slot | None = None
        self._is_private = True
        self._is_open = True
        self._bound: dict[Series, tuple[int, Bound]] = {}
        self._kinds: dict[str, int] = {}
        # Two locks, so that declaring a series never waits for a fold. Whoever takes both takes the fold's first.
        self._fold_lock = threading.Lock()
        self._lock = threading.RLock()
        _open[id(self)] = self

    @staticmethod
    def open(path: Path | None, *, slots: int = 64, slot_bytes: int = SLOT_BYTES) -> "Counters":
        """Count in the file at `path`, which is made if need be, or with None in this process alone.

        The file has its full size, header + (slots + 2) x slot_bytes, from the start, of which the disk holds only the
        slots that were ever claimed. The directory must exist. CountersUnusable when the file cannot be used.
        """
        if slots < 1 or slot_bytes < SLOT_BYTES_MIN or slot_bytes % 4096:
            raise ConfigError(
                f"slots={slots}, slot_bytes={slot_bytes}: there must be a slot, and its size must be a multiple of "
                f"4096 from {SLOT_BYTES_MIN} on.",
                fix=f"Take slots=64 and slot_bytes={SLOT_BYTES}.",
            )
        return Counters(None if path is None else SlotFile.open(path, slots=slots, slot_bytes=slot_bytes), slot_bytes)

    def counter(self, name: str, **labels: str) -> Counter:
        """The counter of this name and these labels. Declaring is slow: keep what it returns."""
        bound = self._declare(COUNTER, Series(name, tuple(sorted(labels.items()))))
        assert isinstance(bound, Counter)
        return bound

    def gauge(self, name: str, **labels: str) -> Gauge:
        """The gauge of this name and these labels, of this process."""
        bound = self._declare(GAUGE, Series(name, tuple(sorted(labels.items()))))
        assert isinstance(bound, Gauge)
        return bound

    def histogram(self, name: str, **labels: str) -> Histogram:
        """The histogram of durations of this name and these labels."""
        bound = self._declare(HISTOGRAM, Series(name, tuple(sorted(labels.items()))))
        assert isinstance(bound, Histogram)
        return bound

    def fold(self) -> Folded:
        """Totals over all processes, after retiring the dead if nobody else is at it.

        Takes some milliseconds, and reads files: a thread's work, not an event loop's.
        """
        with self._fold_lock:
            if not self._is_open:
                raise NotOpen("These counters are closed.", fix="Fold before closing.")
            if self._file is None:
                own = self._private_reading(0)
                totals = own[0].contents if own else Contents()
                return Folded(self._identity, totals, own, refused=sum(slot.refused for slot in own))
            with self._lock:
                self._move_in()
            self._file.retire()
            reading = self._file.read()
            slots = (*reading.slots, *self._private_reading(-1))
            totals = reading.retired
            for slot in slots:
                totals.add(slot.contents)
            refused = reading.refused + sum(slot.refused for slot in slots[len(reading.slots) :])
            return Folded(reading.identity, totals, slots, retired=reading.retired_processes, refused=refused)

    @property
    def is_settled(self) -> bool:
        """Whether there is a slot to write into; if not, the next write has to find one."""
        return self._slot is not None

    def settle(self) -> bool:
        """Claim a slot now instead of at the first write, or move out of private memory. True when the slot is shared.

        Touches files: a thread's work, not an event loop's.
        """
        with self._fold_lock, self._lock:
            if self._settle():
                self._move_in()
            return self._slot is not None and not self._is_private

    def close(self) -> None:
        """Leave the slot to be folded by others. Later writes are dropped. Can be called twice.

        What was counted in private moves into a slot first, if there is one now.
        """
        with self._fold_lock, self._lock:
            if not self._is_open:
                return
            self._move_in()
            self._is_open = False
            _open.pop(id(self), None)
            for _, bound in self._bound.values():
                bound.withdraw()
            slot, self._slot = self._slot, None
            if self._file is not None:
                if slot is not None and not self._is_private:
                    self._file.vacate(slot)
                self._file.close()

    # -- series -----------------------------------------------------------------------------------------------------

    def _declare(self, kind: int, series: Series) -> Bound:
        known = self._bound.get(series)
        if known is not None and known[0] == kind:
            return known[1]
        _check_names(series)
        with self._lock:
            if self._kinds.setdefault(series.name, kind) != kind:
                raise CallerError(
                    f"{series.name} is a {KINDS[self._kinds[series.name]]} already, not a {KINDS[kind]}.",
                    fix="Give one of the two another name.",
                )
            known = self._bound.get(series)
            return self._bind(kind, series) if known is None else known[1]

    def _bind(self, kind: int, series: Series) -> Bound:
        """Give a series its place, if there is a slot yet, and see that it gets another one with another slot."""
        bound = self._new(kind)
        if self._slot is not None:
            self._put(bound, kind, series, self._slot)
            if not self._slot.has(kind, series) and self._slot.has(kind, overflow(series)):
                # One bound series stands for all that overflow, so that unbounded labels do not become unbounded
                # memory.
                return self._declare(kind, overflow(series))
        self._bound[series] = (kind, bound)
        return bound

    def _put(self, bound: Bound, kind: int, series: Series, slot: Slot) -> None:
        at = slot.place(kind, series)
        if at is None:
            bound.move(_NOWHERE, _NOWHERE_FLOATS, 0)
        else:
            bound.move(slot.cells, slot.floats, at)

    def _new(self, kind: int) -> Bound:
        if kind == COUNTER:
            return Counter(self._settle)
        if kind == GAUGE:
            return Gauge(self._settle)
        return Histogram(self._settle)

    # -- the slot ---------------------------------------------------------------------------------------------------

    def _settle(self) -> bool:
        """Have a slot, shared if possible. False when these counters are closed."""
        with self._lock:
            if not self._is_open:
                return False
            if self._slot is None:
                shared = self._file.claim() if self._file is not None else None
                self._is_private = shared is None
                self._enter(shared if shared is not None else Slot.private(self._slot_bytes))
            return True

    def _move_in(self) -> None:
        """From private memory into a shared slot, if there is one now, with everything counted so far."""
        if self._file is None or self._slot is None or not self._is_private:
            return
        shared = self._file.claim()
        if shared is not None:
            private = self._slot
            self._is_private = False
            self._enter(shared)
            _carry_over(private, shared)

    def _enter(self, slot: Slot) -> None:
        """Let all known series write into an empty slot."""
        self._slot = slot
        for series, (kind, bound) in list(self._bound.items()):
            self._put(bound, kind, series, slot)

    def _private_reading(self, index: int) -> tuple[SlotReading, ...]:
        if self._slot is None or not self._is_private:
            return ()
        return (self._slot.reading(index, os.getpid(), 0),)

    def _forked(self) -> None:
        """In the child: the slot is the parent's, and so may be the locks."""
        self._fold_lock = threading.Lock()
        self._lock = threading.RLock()
        self._slot = None
        self._is_private = True
        for _, bound in self._bound.values():
            bound.withdraw()


def _check_names(series: Series) -> None:
    """Names that no exporter would have to bend."""
    labels = [label for label, _ in series.labels]
    if not _NAME.fullmatch(series.name) or not all(_NAME.fullmatch(label) for label in labels):
        raise CallerError(
            f"{series.name!r} with the labels {labels} cannot be the name of a metric.",
            fix="Use letters, digits and underscores, and no digit at the beginning.",
        )
    if not {"le", "slot"}.isdisjoint(labels):
        raise CallerError(
            f"{series.name} has a label `le` or `slot`, which the exposition adds by itself.",
            fix="Give the label another name.",
        )


def _carry_over(source: Slot, target: Slot) -> None:
    """Add what a slot holds to another one that has the same series; nothing writes to the source any more.

    The target is written to meanwhile, so this goes cell by cell, each of them a whole addition.
    """
    for kind, at, series in source.entries():
        place = target.place(kind, series)
        if place is None:
            continue
        if kind == GAUGE:
            if target.floats[place] == 0.0:
                target.floats[place] = source.floats[at]
            continue
        for offset in range(WIDTH[kind]):
            target.cells[place + offset] += source.cells[at + offset]


_open: dict[int, Counters] = {}


def _after_fork_in_child() -> None:
    for counters in list(_open.values()):
        counters._forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
