"""Writes that return before the shared tier has them.

Order: of several writes to one key the last one is delivered, the ones before it need not be; keys are delivered in
the order in which they were first queued; a key's next write is delivered after its previous one. Until then this
process reads its own writes from the queue. A delete, a tag, a pattern or a clear takes back what was queued before
it.

The queue is bounded: when it is full, a write waits for the shared tier itself, as write-through does. What cannot be
delivered stays queued and is tried again. With a spool, a write returns once it is on disk too, and outlives the
process.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence

from headrace.cache.entry import Entry
from headrace.cache.shared import Sealed, SharedTier
from headrace.cache.spool import Record, Spool
from headrace.cache.statistics import Counts
from headrace.clock import Clock
from headrace.errors import CacheUnavailable

BATCH = 256
RETRY_S = 0.25
SPOOL_RESTART_BYTES = 1024 * 1024


class Owed:
    """A write on its way. `entry` is None for one that a dead process left: it has no value here, only bytes."""

    __slots__ = ("entry", "sealed", "until_ms")

    def __init__(self, sealed: Sealed, entry: Entry | None, until_ms: int | None) -> None:
        self.sealed = sealed
        self.entry = entry
        self.until_ms = until_ms


class WriteBehind:
    """The queue of one cache."""

    def __init__(
        self, shared: SharedTier, *, queue_max: int, spool: Spool | None, clock: Clock, counts: Counts
    ) -> None:
        self._shared = shared
        self._queue_max = queue_max
        self._spool = spool
        self._clock = clock
        self._counts = counts
        self._queue: dict[str, Owed] = {}
        self._sending: dict[str, Owed] = {}
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._disk = asyncio.Lock()
        self._courier: asyncio.Task[None] | None = None
        self._failures = 0

    async def open(self) -> None:
        """Adopt what dead processes left, and begin to deliver."""
        if self._spool is not None:
            for record in await asyncio.to_thread(self._spool.open):
                assert record.data is not None
                sealed = Sealed(record.key, record.data, None, 0, record.generation)
                self._queue[record.key] = Owed(sealed, None, record.until_ms)
        self._courier = asyncio.get_running_loop().create_task(self._deliver_for_ever())
        self._wake.set()

    async def close(self) -> None:
        """Deliver what can be delivered now. Without a spool the rest is dropped, and told; with one it is kept."""
        try:
            await self.flush()
        except CacheUnavailable:
            self._tell_dropped()
        if self._courier is not None:
            self._courier.cancel()
            await asyncio.wait([self._courier])
        if self._spool is not None:
            await asyncio.to_thread(self._spool.close, done=not self._queue and not self._sending)

    def _tell_dropped(self) -> None:
        if self._spool is None:
            for key in {**self._sending, **self._queue}:
                self._shared.drop(key, "the cache was closed before the write could be delivered")

    def pending(self, key: str) -> Entry | None:
        """This process's own write that the shared tier does not have yet."""
        owed = self._queue.get(key) or self._sending.get(key)
        return owed.entry if owed is not None else None

    def __len__(self) -> int:
        return len(self._queue) + len(self._sending)

    async def put(self, sealed: Sealed, entry: Entry) -> bool:
        """Queue a write; False if there is no room, and the caller has to write through."""
        if sealed.key not in self._queue and len(self._queue) >= self._queue_max:
            # An earlier write of this key that is under way and fails must not come back after the one that is made
            # now.
            self._sending.pop(sealed.key, None)
            return False
        until_ms = None if sealed.life_ms is None else int(self._clock.wall() * 1000) + sealed.life_ms
        owed = self._queue[sealed.key] = Owed(sealed, entry, until_ms)
        await self._write_down([_record(owed)])
        self._wake.set()
        return True

    async def take_back(self, keys: Iterable[str]) -> None:
        """Forget writes that an invalidation came after."""
        taken = [key for key in keys if key in self._queue or key in self._sending]
        for key in taken:
            self._queue.pop(key, None)
            self._sending.pop(key, None)
        await self._write_down([Record(key, None, None, b"") for key in taken])
        self._changed.set()

    async def take_back_matching(self, matches: Callable[[str], re.Match[str] | None]) -> None:
        """Forget the writes of keys that match."""
        await self.take_back([key for key in {**self._sending, **self._queue} if matches(key)])

    async def take_back_all(self) -> None:
        """Forget every write."""
        await self.take_back(list({**self._sending, **self._queue}))

    async def flush(self) -> None:
        """Return when everything queued until now was delivered; CacheUnavailable if an attempt meanwhile failed."""
        failures = self._failures
        while len(self):
            self._changed.clear()
            self._wake.set()
            await self._changed.wait()
            if self._failures != failures:
                raise CacheUnavailable(f"{len(self)} writes could not be delivered; they stay queued.")

    # -- delivering ---------------------------------------------------------------------------------------------------

    async def _deliver_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._queue:
                if not await self._deliver_batch():
                    # A flush asks again sooner than that.
                    try:
                        async with asyncio.timeout(RETRY_S):
                            await self._wake.wait()
                    except TimeoutError:
                        pass  # it is time all the same
                    self._wake.clear()

    async def _deliver_batch(self) -> bool:
        keys = list(self._queue)[:BATCH]
        self._sending = {key: self._queue.pop(key) for key in keys}
        batch = await self._still_wanted(list(self._sending.values()))
        taken = await self._shared.deliver([owed.sealed for owed in batch])
        failed = {owed.sealed.key: owed for owed, ok in zip(batch, taken, strict=True) if not ok}
        # What was not taken goes back to the front, unless it was taken back or written again meanwhile.
        back = {key: owed for key, owed in failed.items() if key in self._sending and key not in self._queue}
        self._queue = {**back, **self._queue}
        self._sending = {}
        await self._cross_out([key for key in keys if key not in failed])
        if failed:
            self._failures += 1
        self._changed.set()
        return not failed

    async def _still_wanted(self, batch: Sequence[Owed]) -> list[Owed]:
        """Without what is expired, and of what a dead process left, without what is older than the shared tier's."""
        now_ms = int(self._clock.wall() * 1000)
        wanted: list[Owed] = []
        for owed in batch:
            if owed.until_ms is not None:
                owed.sealed.life_ms = owed.until_ms - now_ms
                if owed.sealed.life_ms <= 0:
                    continue
            if owed.entry is not None or await self._shared.is_newer(owed.sealed):
                wanted.append(owed)
        return wanted

    # -- spooling -----------------------------------------------------------------------------------------------------

    async def _write_down(self, records: list[Record]) -> None:
        if self._spool is None or not records:
            return
        async with self._disk:
            await asyncio.to_thread(self._spool.append, records)

    async def _cross_out(self, delivered: Sequence[str]) -> None:
        """Note on disk what was delivered, so that it is not delivered again after somebody deleted it."""
        spool = self._spool
        if spool is None:
            return
        async with self._disk:
            if spool.size >= SPOOL_RESTART_BYTES or not self._queue:
                owed = [_record(owed) for owed in self._queue.values()]
                await asyncio.to_thread(spool.restart, owed)
            else:
                # A key that is queued again has, or waits here to write, a later record of its own.
                done = [Record(key, None, None, b"") for key in delivered if key not in self._queue]
                await asyncio.to_thread(spool.append, done)


def _record(owed: Owed) -> Record:
    return Record(owed.sealed.key, owed.sealed.data, owed.until_ms, owed.sealed.generation)
