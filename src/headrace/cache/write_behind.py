"""Writes that return before the shared tier has them.

Order: of several writes to one key the last one is delivered, the ones before it need not be; keys are delivered in
the order in which they were first queued; a key's next write is delivered after its previous one. Until then this
process reads its own writes from the queue. A delete, a tag, a pattern or a clear takes back what was queued before
it.

The queue is bounded: when it is full, a write waits for the shared tier itself, as write-through does. What cannot be
delivered stays queued and is tried again. With a spool, a write returns once it is on disk too, and outlives the
process; so do invalidations that the shared tier could not be told of. A disk that takes no more makes writes wait for
the shared tier itself, as a full queue does, and the observer is told.
"""

import asyncio
import re
from collections.abc import Callable, Iterable, Sequence

from headrace.cache.codec import Sealed
from headrace.cache.deferred import Debt
from headrace.cache.entry import Entry
from headrace.cache.shared import SharedTier
from headrace.cache.spool import WRITE, Record, Spool
from headrace.cache.statistics import Counts
from headrace.clock import Clock
from headrace.errors import CacheUnavailable
from headrace.events import Observer, TierRecovered, TierUnavailable, WriteDropped

BATCH = 256
RETRY_S = 0.25
SPOOL_RESTART_BYTES = 1024 * 1024


class Owed:
    """A write on its way. `entry` is None for one that a dead process left: it has no value here, only bytes.

    `number` is that of the first write of its key that still waits in the queue.
    """

    __slots__ = ("entry", "number", "sealed", "until_ms")

    def __init__(self, sealed: Sealed, entry: Entry | None, until_ms: int | None, number: int) -> None:
        self.sealed = sealed
        self.entry = entry
        self.until_ms = until_ms
        self.number = number


class WriteBehind:
    """The queue of one cache."""

    def __init__(
        self,
        shared: SharedTier,
        *,
        queue_max: int,
        spool: Spool | None,
        clock: Clock,
        counts: Counts,
        observer: Observer,
    ) -> None:
        self._shared = shared
        self._observer = observer
        self._queue_max = queue_max
        self._spool = spool
        self._clock = clock
        self._counts = counts
        self._queue: dict[str, Owed] = {}
        self._sending: dict[str, Owed] = {}
        self._wake = asyncio.Event()
        self._retry = asyncio.Event()
        """It is worth trying again before its time."""
        self._changed = asyncio.Event()
        self._disk = asyncio.Lock()
        self._courier: asyncio.Task[None] | None = None
        self._failures = 0
        self._number = 0
        self._debts: set[Debt] = set()
        """The invalidations that the spool holds."""
        self._disk_down_since: float | None = None

    async def open(self) -> None:
        """Adopt what dead processes left, and begin to deliver."""
        if self._spool is not None:
            opening = asyncio.get_running_loop().run_in_executor(None, self._spool.open)
            try:
                await self._inherit(self._spool, await asyncio.shield(opening))
            except BaseException:
                # Its lock would keep what is on disk from whoever opens next.
                await asyncio.wait([opening])
                await asyncio.to_thread(self._spool.close, done=False)
                raise
        self._courier = asyncio.get_running_loop().create_task(self._deliver_for_ever())
        self._wake.set()

    async def _inherit(self, spool: Spool, records: Sequence[Record]) -> None:
        for record in records:
            self._adopt(record)
        for path in spool.damaged:
            self._observer.on(
                WriteDropped(key="*", reason=f"the spool was damaged; what could not be read is kept in {path}")
            )
        self._shared.owed.changes()  # from here on they are remembered
        self._shared.on_delivered = self._try_now
        if self._debts and self._shared.is_available:
            await self._shared.deliver_owed()

    def _adopt(self, record: Record) -> None:
        if record.kind == WRITE:
            assert record.data is not None
            sealed = Sealed(record.key, record.data, None, 0, record.generation)
            self._number += 1
            self._queue[record.key] = Owed(sealed, None, record.until_ms, self._number)
        else:
            self._debts.add((record.kind, record.key))
            self._shared.owed.add((record.kind, record.key))

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
            await self.keep_owed()
            if self._debts.issuperset(self._shared.owed.debts()):
                self._shared.owed.clear()  # it is the heir's now
            await asyncio.to_thread(self._spool.close, done=not (self._queue or self._sending or self._debts))

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
        key = sealed.key
        if key not in self._queue and len(self._queue) >= self._queue_max:
            # An earlier write of this key that is under way and fails must not come back after the one that is made
            # now.
            self._sending.pop(key, None)
            return False
        until_ms = None if sealed.life_ms is None else int(self._clock.wall() * 1000) + sealed.life_ms
        self._number += 1
        number = self._queue[key].number if key in self._queue else self._number
        owed = self._queue[key] = Owed(sealed, entry, until_ms, number)
        if not await self._write_down([_record(owed)]):
            self._sending.pop(key, None)
            if self._queue.get(key) is owed:
                del self._queue[key]
            return False
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

    async def take_back_tagged(self, tags: Iterable[str]) -> None:
        """Forget the writes under one of these tags. What a dead process left shows its tags to the server alone."""
        gone = frozenset(tags)
        queued = {**self._sending, **self._queue}.items()
        await self.take_back([key for key, owed in queued if owed.entry and not gone.isdisjoint(owed.entry.tags)])

    async def take_back_matching(self, matches: Callable[[str], re.Match[str] | None]) -> None:
        """Forget the writes of keys that match."""
        await self.take_back([key for key in {**self._sending, **self._queue} if matches(key)])

    async def take_back_all(self) -> None:
        """Forget every write."""
        await self.take_back(list({**self._sending, **self._queue}))

    async def flush(self) -> None:
        """Return when everything queued until now was delivered; CacheUnavailable if an attempt meanwhile failed."""
        failures, number = self._failures, self._number
        while any(owed.number <= number for queue in (self._sending, self._queue) for owed in queue.values()):
            self._changed.clear()
            self._try_now()
            await self._changed.wait()
            if self._failures != failures:
                raise CacheUnavailable(f"{len(self)} writes could not be delivered; they stay queued.")

    async def keep_owed(self) -> None:
        """Note on disk which invalidations are owed and which are not any more."""
        if self._spool is None:
            return
        owed = self._shared.owed
        if not (self._debts or owed.is_owed or self._disk.locked()):
            owed.changes()  # all is paid: nothing to tell the disk
            return
        async with self._disk:
            changed = {debt: is_owed for debt, is_owed in owed.changes().items() if is_owed != (debt in self._debts)}
            records = [_debt_record(debt, is_owed=is_owed) for debt, is_owed in changed.items()]
            is_kept = False
            try:
                is_kept = not records or await self._on_disk(self._spool.append, records)
            finally:
                if not is_kept:  # also when it was given up: whoever closes the spool asks again
                    owed.note(changed)
            if not is_kept:
                return
            for debt, is_owed in changed.items():
                (self._debts.add if is_owed else self._debts.discard)(debt)

    # -- delivering ---------------------------------------------------------------------------------------------------

    async def _deliver_for_ever(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            await self.keep_owed()
            while self._queue:
                self._retry.clear()
                if not await self._deliver_batch():
                    # A flush asks again sooner than that. A further write does not: it would be one attempt at the
                    # whole queue for each write into an outage.
                    try:
                        async with asyncio.timeout(RETRY_S):
                            await self._retry.wait()
                    except TimeoutError:
                        pass  # it is time all the same

    def _try_now(self) -> None:
        self._retry.set()
        self._wake.set()

    async def _deliver_batch(self) -> bool:
        keys = list(self._queue)[:BATCH]
        self._sending = {key: self._queue.pop(key) for key in keys}
        found = await self._still_wanted(list(self._sending.values()))
        # Some may have been taken back while others were looked up.
        batch = [owed for owed in found if self._sending.get(owed.sealed.key) is owed]
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
            newer = True if owed.entry is not None else await self._shared.is_newer(owed.sealed)
            if newer is True or (isinstance(newer, str) and not await self._put_aside(owed, newer)):
                wanted.append(owed)
        return wanted

    async def _put_aside(self, owed: Owed, reason: str) -> bool:
        """Keep a write of the dead that this process cannot read where it is not lost; whether the disk took it."""
        assert self._spool is not None
        try:
            path = await asyncio.to_thread(self._spool.put_aside, [_record(owed)])
        except OSError as error:
            self._disk_failed(error)
            return False
        self._counts.add("writes_dropped")
        self._observer.on(WriteDropped(key=owed.sealed.key, reason=f"{reason}; the write is kept in {path}"))
        return True

    # -- spooling -----------------------------------------------------------------------------------------------------

    async def _write_down(self, records: list[Record]) -> bool:
        """Whether the disk has them, as far as it has to."""
        if self._spool is None or not records:
            return True
        async with self._disk:
            return await self._on_disk(self._spool.append, records)

    async def _cross_out(self, delivered: Sequence[str]) -> None:
        """Note on disk what was delivered, so that it is not delivered again after somebody deleted it."""
        spool = self._spool
        if spool is None:
            return
        async with self._disk:
            if spool.size >= SPOOL_RESTART_BYTES or not self._queue:
                owed = [_record(owed) for owed in self._queue.values()]
                debts = [_debt_record(debt, is_owed=True) for debt in self._debts]
                await self._on_disk(spool.restart, owed + debts)
            else:
                # A key that is queued again has, or waits here to write, a later record of its own.
                done = [Record(key, None, None, b"") for key in delivered if key not in self._queue]
                if done:
                    await self._on_disk(spool.append, done)

    async def _on_disk(self, act: Callable[[list[Record]], None], records: list[Record]) -> bool:
        """Whether the disk did it; the first failure and the recovery are told."""
        try:
            await asyncio.to_thread(act, records)
        except OSError as error:
            self._disk_failed(error)
            return False
        if self._disk_down_since is not None:
            down_s = self._clock.monotonic() - self._disk_down_since
            self._disk_down_since = None
            self._observer.on(TierRecovered(tier="spool", down_s=down_s))
        return True

    def _disk_failed(self, error: OSError) -> None:
        if self._disk_down_since is None:
            self._disk_down_since = self._clock.monotonic()
            self._observer.on(TierUnavailable(tier="spool", reason=error.strerror or str(error)))


def _record(owed: Owed) -> Record:
    return Record(owed.sealed.key, owed.sealed.data, owed.until_ms, owed.sealed.generation)


def _debt_record(debt: Debt, *, is_owed: bool) -> Record:
    kind, name = debt
    return Record(name, b"" if is_owed else None, None, b"", kind)
