"""The file that all processes of one `headrace up` count in, a slot a process.

    header: owners of the slots, what is retired | retired A | retired B | slot 0 | slot 1 | ...

**Who writes where.** A process writes into its slot alone, without a lock. The header changes only under the lock: an
flock, which the kernel takes back from whoever dies with it. (Only an owner's word that it has left needs none.) It
says who owns which slot: process id, start of the process and generation, because ids and slots are given again. All
processes must see each other's ids, so they live in one PID namespace.

**The dead.** A process that was killed leaves its slot as it was after its last finished store. Whoever folds and gets
the lock at once adds such slots to the retired totals, so that counters never go back, and drops their gauges. The new
totals are written into whichever of the two retired areas is *not* in force, together with the generation up to which
each slot is contained in them; raising the epoch by one then switches areas with a single store. Killed at any point
before that, nothing has happened; after it, everything has. A slot is free when the area in force contains its owner.

**The disk.** The file is sparse, and an area's space is reserved before it is first touched: touching a page that a
full disk cannot hold, and on tmpfs even reading one, is a SIGBUS and the end of the process.
"""

import contextlib
import fcntl
import mmap
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from headrace.errors import CountersUnusable
from headrace.monitor.processes import is_alive, started
from headrace.monitor.slots import Contents, Slot, SlotReading

MAGIC: Final = int.from_bytes(b"headrace", "little")
LAYOUT: Final = 1
PAGE: Final = 4096

# Cells of the header. After them: three for each slot's owner, then for each retired area how far it contains each
# slot.
_MAGIC, _LAYOUT, _SLOTS, _SLOT_BYTES, _IDENTITY, _GENERATION, _EPOCH, _OWNERS = range(8)

# A lock is held for the time of a few copies in memory; these are generous and still bounded.
_CLAIM_TRIES: Final = 100
_OPEN_TRIES: Final = 4_000
_TRY_EVERY_S: Final = 0.0005
_READS_MAX: Final = 8


class Owner(NamedTuple):
    """Who counts in a slot; nobody with the process id 0."""

    pid: int
    mark: int
    generation: int


class Reading(NamedTuple):
    """All slots and the retired totals at one instant."""

    identity: int
    retired: Contents
    retired_processes: int
    refused: int
    slots: list[SlotReading]


class SlotFile:
    """The file: opening it, claiming a slot in it, reading all slots, retiring the dead."""

    def __init__(self, path: Path, descriptor: int) -> None:
        """Use `SlotFile.open`."""
        self._path = path
        self._descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._memory = memoryview(self._mapping)
        everything = self._memory.cast("Q")
        self.slots_max: int = everything[_SLOTS]
        self.slot_bytes: int = everything[_SLOT_BYTES]
        everything.release()
        begin = _header_bytes(self.slots_max)
        self._header: memoryview[int] = self._memory[:begin].cast("Q")
        self._offsets = range(begin, begin + (self.slots_max + 2) * self.slot_bytes, self.slot_bytes)
        areas = [Slot(self._memory[offset : offset + self.slot_bytes]) for offset in self._offsets]
        self._retired, self._slots = areas[:2], areas[2:]

    @classmethod
    def open(cls, path: Path, *, slots: int, slot_bytes: int) -> "SlotFile":
        """Join the file, or make it. CountersUnusable when foreign, in use with another shape, or unreachable."""
        try:
            with _locked(path, _OPEN_TRIES) as held:
                if not held:
                    raise CountersUnusable(
                        f"Another process has kept the lock of {path} for {_OPEN_TRIES * _TRY_EVERY_S} seconds.",
                        fix="Find out who stopped it; a lock is held for milliseconds.",
                    )
                return cls._join(path, slots, slot_bytes)
        except OSError as error:
            raise CountersUnusable(f"{path} cannot be opened: {error.strerror}.") from error

    @classmethod
    def _join(cls, path: Path, slots: int, slot_bytes: int) -> "SlotFile":
        if not path.exists() or path.stat().st_size == 0:
            _create(path, slots, slot_bytes)
        file = cls._map(path)
        if (file.slots_max, file.slot_bytes) == (slots, slot_bytes):
            return file
        owners = [file._owner(index) for index in range(file.slots_max)]
        living = [owner.pid for owner in owners if is_alive(owner.pid, owner.mark)]
        file.close()
        if living:
            raise CountersUnusable(
                f"{path} has {file.slots_max} slots of {file.slot_bytes} bytes, not {slots} of {slot_bytes}, and "
                f"process {living[0]} is using it.",
                fix="Stop the processes that use it, or open it with the same `slots` and `slot_bytes`.",
            )
        _create(path, slots, slot_bytes)
        return cls._map(path)

    @classmethod
    def _map(cls, path: Path) -> "SlotFile":
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            _check_header(path, descriptor)
            return cls(path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    def close(self) -> None:
        """Unmap the file. Slots that are owned stay so."""
        for area in (*self._retired, *self._slots):
            area.release()
        self._header.release()
        self._memory.release()
        self._mapping.close()
        os.close(self._descriptor)

    # -- owning a slot ----------------------------------------------------------------------------------------------

    def claim(self) -> Slot | None:
        """A slot for this process; None when the living have them all, the disk is full or the lock is not free."""
        try:
            with _locked(self._path, _CLAIM_TRIES) as held:
                return self._claim() if held else None
        except OSError:
            return None

    def _claim(self) -> Slot | None:
        pid = os.getpid()
        mark = started(pid)
        index = self._free()
        if index is None:
            self._retire()
            index = self._free()
        # A process that cannot see itself would be taken for dead, and its counts from then on lost.
        if index is None or mark == 0 or not self._reserve(index + 2):
            return None
        header, slot = self._header, self._slots[index]
        generation = header[_GENERATION] + 1
        header[_GENERATION] = generation
        self._own(index, Owner(0, 0, 0))
        slot.reset(generation)
        self._own(index, Owner(pid, mark, generation))
        return slot

    def vacate(self, slot: Slot) -> None:
        """Say that this process writes into its slot no more, though it lives on; it is folded like a dead one's."""
        self._header[_OWNERS + 3 * self._slots.index(slot) + 1] = 0

    def _own(self, index: int, owner: Owner) -> None:
        # The process id goes first when a slot is taken away and last when it is given: without one, nobody looks in.
        at = _OWNERS + 3 * index
        if owner.pid == 0:
            self._header[at] = 0
        self._header[at + 1] = owner.mark
        self._header[at + 2] = owner.generation
        self._header[at] = owner.pid

    def _owner(self, index: int) -> Owner:
        at = _OWNERS + 3 * index
        return Owner(self._header[at], self._header[at + 1], self._header[at + 2])

    def _free(self) -> int | None:
        for index in range(self.slots_max):
            owner = self._owner(index)
            if owner.pid == 0 or self._is_folded(index, owner):
                return index
        return None

    def _is_folded(self, index: int, owner: Owner) -> bool:
        return owner.generation <= self._header[self._folded_at(self._header[_EPOCH] & 1) + index]

    def _folded_at(self, area: int) -> int:
        return _OWNERS + (3 + area) * self.slots_max

    def _reserve(self, area: int) -> bool:
        if sys.platform == "linux":
            try:
                os.posix_fallocate(self._descriptor, self._offsets[area], self.slot_bytes)
            except OSError:
                return False
        return True

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self) -> Reading:
        """All slots and the retired totals, as of one epoch."""
        for _ in range(_READS_MAX):
            reading = self._read_once()
            if reading is not None:
                return reading
        with contextlib.suppress(OSError), _locked(self._path, _OPEN_TRIES) as held:
            reading = self._read_once() if held else None
        if reading is None:
            raise CountersUnusable(
                f"Processes that count in {self._path} came and went faster than they could be read.",
                fix="Find out why they end; their counts are safe.",
            )
        return reading

    def _read_once(self) -> Reading | None:
        header = self._header
        epoch = header[_EPOCH]
        totals, processes, refused = self._in_force(epoch)
        readings = []
        for index, slot in enumerate(self._slots):
            owner = self._owner(index)
            if owner.pid == 0 or self._is_folded(index, owner):
                continue
            reading = slot.reading(index, owner.pid, owner.generation)
            if self._owner(index) != owner:
                return None  # vacated, or claimed by another process, at this instant
            if is_alive(owner.pid, owner.mark):
                readings.append(reading)
            else:
                totals.add(reading.contents)
                processes += 1
            refused += reading.refused
        if header[_EPOCH] != epoch:
            return None  # a slot was retired meanwhile: it may have been seen twice, or not at all
        return Reading(header[_IDENTITY], totals, processes, refused, readings)

    def _in_force(self, epoch: int) -> tuple[Contents, int, int]:
        """The retired totals, of how many processes they are, and how many series found no room."""
        if epoch == 0:
            return Contents(), 0, 0  # nobody has died yet, and no space is reserved for the dead
        area = self._retired[epoch & 1]
        return area.contents(), area.processes, area.refused

    # -- retiring ---------------------------------------------------------------------------------------------------

    def retire(self) -> None:
        """Fold the slots of the dead into the retired totals, unless someone else is at it."""
        if not self._dead():
            return
        # Without the lock's directory the dead stay where they are, which every reader copes with.
        with contextlib.suppress(OSError), _locked(self._path, 1) as held:
            if held:
                self._retire()

    def _dead(self) -> list[int]:
        """Slots whose owner is gone and that the area in force does not contain."""
        owners = [(index, self._owner(index)) for index in range(self.slots_max)]
        owned = [(index, owner) for index, owner in owners if owner.pid and not self._is_folded(index, owner)]
        return [index for index, owner in owned if not is_alive(owner.pid, owner.mark)]

    def _retire(self) -> None:
        dead = self._dead()
        epoch = self._header[_EPOCH]
        target = (epoch + 1) & 1
        if not dead or not self._reserve(target):
            return
        totals, processes, refused = self._in_force(epoch)
        for index in dead:
            totals.add(self._slots[index].contents())
            refused += self._slots[index].refused
        area = self._retired[target]
        # A generation of its own makes readers forget the directory that they know of this area.
        area.reset(epoch + 1)
        area.store(totals, processes=processes + len(dead), refused=refused)
        self._copy_folded(epoch & 1, target, dead)
        self._header[_EPOCH] = epoch + 1

    def _copy_folded(self, source: int, target: int, dead: Iterable[int]) -> None:
        header, begin, known = self._header, self._folded_at(target), self._folded_at(source)
        header[begin : begin + self.slots_max] = header[known : known + self.slots_max]
        for index in dead:
            header[begin + index] = self._owner(index).generation


def _header_bytes(slots: int) -> int:
    return -(-(_OWNERS + 5 * slots) * 8 // PAGE) * PAGE


def _create(path: Path, slots: int, slot_bytes: int) -> None:
    """Put a new, empty file in place, all or nothing."""
    begin = _header_bytes(slots)
    header = memoryview(bytearray(begin))
    cells = header.cast("Q")
    cells[_MAGIC], cells[_LAYOUT], cells[_SLOTS], cells[_SLOT_BYTES] = MAGIC, LAYOUT, slots, slot_bytes
    cells[_IDENTITY] = int.from_bytes(os.urandom(7), "little")
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.new")
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, begin + (slots + 2) * slot_bytes)
        os.pwrite(descriptor, header, 0)
        unfinished.replace(path)
    finally:
        os.close(descriptor)
        unfinished.unlink(missing_ok=True)


def _check_header(path: Path, descriptor: int) -> None:
    """Refuse what is not a whole counters file of this layout: mapping it would end in SIGBUS or in nonsense."""
    size = os.fstat(descriptor).st_size
    head = os.pread(descriptor, _OWNERS * 8, 0)
    cells = memoryview(head).cast("Q") if len(head) == _OWNERS * 8 else None
    if cells is None or cells[_MAGIC] != MAGIC:
        raise CountersUnusable(f"{path} is not a counters file.")
    if cells[_LAYOUT] != LAYOUT:
        raise CountersUnusable(f"{path} has layout {cells[_LAYOUT]}; this headrace writes layout {LAYOUT}.")
    if size != _header_bytes(cells[_SLOTS]) + (cells[_SLOTS] + 2) * cells[_SLOT_BYTES]:
        raise CountersUnusable(
            f"{path} has {size} bytes, which is not what its header says: it was cut or appended to."
        )


@contextlib.contextmanager
def _locked(path: Path, tries: int) -> Iterator[bool]:
    """Hold the file's lock; False when another kept it for `tries` attempts. The kernel frees a dead holder's."""
    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        held = _try_lock(descriptor, tries)
        try:
            yield held
        finally:
            if held:
                # Unlocked, not only closed: a process forked meanwhile holds a copy of the descriptor.
                fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, tries: int) -> bool:
    for attempt in range(tries):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if attempt + 1 < tries:
                time.sleep(_TRY_EVERY_S)  # noqa: TID251 - bounded by `tries`; the holder copies memory and is gone
    return False
