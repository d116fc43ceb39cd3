"""What happens behind the hit path: reading the shared tier, loading, storing, and standing in for what fails.

The order of a miss: join a load under way, else note the epoch, ask the shared tier, run the loader, write the shared
tier, install in memory. Every install and every write checks that the epoch still holds, so an invalidation at any
moment in between wins over the value that was on its way.
"""

import asyncio
import inspect
import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from msgspec import UnsetType

from headrace.cache.codec import FOREVER_MS, Envelope, Sealed, Tags
from headrace.cache.entry import FOREVER, Entry, attention_after, fresh_for
from headrace.cache.fence import Epoch
from headrace.cache.flight import WAIT_MAX_S, Flights, running_loop
from headrace.cache.lease import Lease, Right
from headrace.cache.near import Near, Write
from headrace.cache.policy import CachePolicy, Strategy, glob_pattern
from headrace.cache.shared import AWAY, Found, SharedTier
from headrace.cache.statistics import Counts
from headrace.cache.write_behind import WriteBehind
from headrace.clock import Clock
from headrace.errors import CacheUnavailable, LoadTimeout
from headrace.events import LoadFailed, Observer

T = TypeVar("T")
_ABSENT: Final = object()


class Request(NamedTuple):
    """A key with what the call and its policy say about it."""

    key: str
    policy: CachePolicy
    ttl: float | UnsetType | None
    tags: tuple[str, ...]
    type: Any


class Filler:
    """The work behind one open cache."""

    def __init__(
        self,
        *,
        near: Near,
        shared: SharedTier | None,
        home: asyncio.AbstractEventLoop,
        clock: Clock,
        observer: Observer,
        counts: Counts,
        rng: random.Random,
        request: Callable[..., Request],
        behind: WriteBehind | None,
    ) -> None:
        self._near = near
        self._shared = shared
        self._home = home
        self._clock = clock
        self._observer = observer
        self._counts = counts
        self._rng = rng
        self._request = request
        self._queue = behind
        self._flights = Flights()

    async def close(self) -> None:
        """End every load."""
        await self._flights.close()

    # -- reading ------------------------------------------------------------------------------------------------------

    async def find(self, key: str, entry: Entry | None, type: Any, default: Any) -> Any:
        """A fresh value from memory or the shared tier; a stale one only when the shared tier is away; else
        `default`."""
        if entry is not None and self._clock.monotonic() < entry.fresh_until:
            return entry.value
        shared = self._shared
        if shared is None:
            return default
        epoch = self._near.epoch(key)
        if self._queue is not None and (own := self._queue.pending(key)) is not None:
            return own.value if self._clock.monotonic() < own.fresh_until else default
        if asyncio.get_running_loop() is self._home:
            # Spelt out instead of awaiting `read`: a coroutine less on the way of every remote hit.
            reply = shared.fetch(key)
            found: Any = AWAY
            if reply is not None:
                try:
                    found = shared.opened(key, await reply, type)
                except CacheUnavailable as error:
                    found = shared.failed(key, error)
                if found.__class__ is Envelope and found.tags:
                    found = await shared.checked(key, found)
        else:
            found = await self._at_home(shared.read(key, type))
        return self._answer(key, type, found, entry, epoch, default)

    def _answer(self, key: str, type: Any, found: Found, entry: Entry | None, epoch: Epoch, default: Any) -> Any:
        """What `find` returns for what the shared tier said."""
        if isinstance(found, Envelope):
            if self._near.memory is None and self._is_fresh(found):
                return found.value
            promoted = self._from_shared(self._request(key, type=type), found, epoch)
            return promoted.value if self._clock.monotonic() < promoted.fresh_until else default
        if found is AWAY and entry is not None and self._may_stand_in(entry):
            self._counts.add("stale_served")
            return entry.value
        return default

    def _is_fresh(self, envelope: Envelope) -> bool:
        if envelope.fresh_ms == FOREVER_MS:
            return True
        return self._clock.wall() * 1000 < envelope.created_ms + envelope.fresh_ms

    async def find_many(self, keys: Sequence[str], type: Any) -> dict[str, Any]:
        """As `find`, for several keys in one round trip; keys without a value are left out."""
        shared = self._shared
        values: dict[str, Any] = {}
        if self._queue is not None:
            now = self._clock.monotonic()
            own = {key: entry for key in keys if (entry := self._queue.pending(key)) is not None}
            values.update((key, entry.value) for key, entry in own.items() if now < entry.fresh_until)
            keys = [key for key in keys if key not in own]
        if shared is None or not keys:
            return values
        epochs = [self._near.epoch(key) for key in keys]
        found = await self._at_home(shared.read_many(keys, type))
        for key, epoch in zip(keys, epochs, strict=True):
            if (each := found.get(key)) is None:
                continue
            stale = self._near.lookup(key) if each is AWAY else None
            value = self._answer(key, type, each, stale, epoch, _ABSENT)
            if value is not _ABSENT:
                values[key] = value
        return values

    async def find_or_load(self, request: Request, entry: Entry | None, loader: Callable[[], Any]) -> Entry:
        """A usable entry, by whatever it takes."""
        if entry is not None and self._is_usable(request.policy, entry):
            self._refresh_behind(request, loader)
            self._note_age(entry)
            return entry
        key, policy = request.key, request.policy
        epoch = self._near.epoch(key)
        soft = policy.load_timeout_soft if self._may_stand_in(entry) else None
        if soft is not None:
            self._flights.start(key, epoch, lambda: self._fill(request, epoch, loader))
        try:
            async with asyncio.timeout(soft) as timer:
                found, joined = await self._flights.run(
                    key, epoch, lambda: self._fill(request, epoch, loader), wait_max_s=_patience_s(policy)
                )
        except (TimeoutError, LoadTimeout) as error:
            # Whoever waited for another's load until the hard limit is helped out as the loader itself would be.
            is_late = self._near.holds(key, epoch) if isinstance(error, LoadTimeout) else timer.expired()
            if entry is None or not is_late or not self._may_stand_in(entry):
                raise
            self._counts.add("stale_served")
            return entry
        if joined:
            self._counts.add("coalesced")
        elif found.attention_at <= self._clock.monotonic():
            self._refresh_behind(request, loader)
        filled: Entry = found
        return filled

    def find_or_load_blocking(self, request: Request, entry: Entry | None, loader: Callable[[], Any]) -> Entry:
        """As `find_or_load`, in a plain function: the loader runs in the calling thread."""
        if entry is not None and self._clock.monotonic() < entry.fresh_until:
            return entry
        epoch = self._near.epoch(request.key)
        if running_loop() is not None:
            return self._load_on_loop_thread(request, epoch, loader)
        try:
            found, joined = self._flights.run_in_thread(
                request.key,
                epoch,
                lambda: self._fill_in_thread(request, epoch, loader),
                wait_max_s=_patience_s(request.policy),
            )
        except LoadTimeout:
            if entry is None or not self._may_stand_in(entry) or not self._near.holds(request.key, epoch):
                raise
            self._counts.add("stale_served")
            return entry
        if joined:
            self._counts.add("coalesced")
        filled: Entry = found
        return filled

    # -- loading ------------------------------------------------------------------------------------------------------

    async def _fill(self, request: Request, epoch: Epoch, loader: Callable[[], Any], *, renew: bool = False) -> Entry:
        """What one flight does. `renew`: an entry that wants attention is not good enough, but nobody waits for
        better."""
        own = self._queue.pending(request.key) if self._queue is not None else None
        if own is not None and self._queue is not None:
            if renew or self._is_usable(request.policy, own):
                return own
            await self._at_home(self._queue.take_back([request.key]))
        older, right = await self._claim(request, epoch, renew=renew)
        if right is Right.ENOUGH and older is not None:
            self._note_age(older)
            return older
        if right is Right.HELD and older is not None:
            return self._rested(request, older, epoch)
        committed = False
        try:
            tags = await self._tokens(request)
            started = self._clock.monotonic()
            value = await self._load(request, loader)
            committed = True
        except Exception as error:  # a loader may raise anything; without a stand-in it goes to the waiters unchanged
            stand_in = self._stand_in(request, older, epoch, error)
            if stand_in is None:
                raise
            return stand_in
        finally:
            if not committed and isinstance(right, Lease) and self._shared is not None:
                await self._at_home(self._shared.release(right))
        load_s = self._clock.monotonic() - started
        return await self._store_loaded(request, epoch, value, load_s, tags, right, is_renewal=older is not None)

    async def _claim(self, request: Request, epoch: Epoch, *, renew: bool) -> tuple[Entry | None, Lease | Right]:
        """What the shared tier has, as an entry, and what may be done with a value that is loaded now."""
        if self._shared is None:
            return None, Right.ALONE

        def is_enough(envelope: Envelope) -> bool:
            entry = self._entry_from(request, envelope)
            if renew:
                return self._clock.monotonic() < entry.attention_at
            return self._is_usable(request.policy, entry)

        patience_s = 0.0 if renew else request.policy.load_timeout
        envelope, right = await self._at_home(
            self._shared.claim(request.key, request.type, is_enough=is_enough, patience_s=patience_s)
        )
        return (self._from_shared(request, envelope, epoch) if envelope is not None else None), right

    async def _load(self, request: Request, loader: Callable[[], Any]) -> Any:
        self._counts.add("loads")
        limit = request.policy.load_timeout
        try:
            async with asyncio.timeout(limit) as timer:
                value = loader()
                return await value if inspect.isawaitable(value) else value
        except TimeoutError as error:
            if not timer.expired():
                raise
            raise LoadTimeout(f"Loading {request.key!r} took longer than {limit:g} s.") from error

    def _fill_in_thread(self, request: Request, epoch: Epoch, loader: Callable[[], Any]) -> Entry:
        if self._shared is None:
            value, load_s, stand_in = self._load_here(request, epoch, loader, None)
            return stand_in or self._install_loaded(request, epoch, value, load_s)
        older, right = self._from_thread(self._claim(request, epoch, renew=False))
        if right is Right.ENOUGH and older is not None:
            return older
        committed = False
        try:
            tags = self._from_thread(self._tokens(request))
            value, load_s, stand_in = self._load_here(request, epoch, loader, older)
            committed = stand_in is None
        finally:
            if not committed and isinstance(right, Lease):
                self._from_thread(self._shared.release(right))
        if stand_in is not None:
            return stand_in
        storing = self._store_loaded(request, epoch, value, load_s, tags, right, is_renewal=older is not None)
        return self._from_thread(storing)

    def _load_on_loop_thread(self, request: Request, epoch: Epoch, loader: Callable[[], Any]) -> Entry:
        """Waiting would stop the loop, and a lease needs waiting: memory only, and within the bound of unheard
        changes."""
        value, load_s, stand_in = self._load_here(request, epoch, loader, None)
        return stand_in or self._install_loaded(request, epoch, value, load_s)

    def _load_here(
        self, request: Request, epoch: Epoch, loader: Callable[[], Any], older: Entry | None
    ) -> tuple[Any, float, Entry | None]:
        self._counts.add("loads")
        started = self._clock.monotonic()
        try:
            value = loader()
        except Exception as error:  # as in _fill: a loader may raise anything
            stand_in = self._stand_in(request, older, epoch, error)
            if stand_in is None:
                raise
            return None, 0.0, stand_in
        return value, self._clock.monotonic() - started, None

    def _stand_in(self, request: Request, older: Entry | None, epoch: Epoch, error: Exception) -> Entry | None:
        """An older value for a load that failed, if the policy has one and nobody invalidated it."""
        self._counts.add("load_errors")
        entry = self._near.lookup(request.key) or older
        usable = self._may_stand_in(entry) and self._near.holds(request.key, epoch)
        self._observer.on(LoadFailed(key=request.key, error=f"{error.__class__.__name__}: {error}", stale=usable))
        if not usable:
            return None
        assert entry is not None
        self._note_age(entry)
        return self._rested(request, entry, epoch)

    def _rested(self, request: Request, entry: Entry, epoch: Epoch) -> Entry:
        """The entry, left alone for a while although it wants attention."""
        rested = Entry(
            entry.value,
            attention_at=min(self._clock.monotonic() + request.policy.retry_after, entry.stale_until),
            fresh_until=entry.fresh_until,
            stale_until=entry.stale_until,
            load_s=entry.load_s,
            version=entry.version,
            tags=entry.tags,
        )
        self._near.install(request.key, rested, epoch, request.policy)
        return rested

    def _refresh_behind(self, request: Request, loader: Callable[[], Any]) -> None:
        epoch = self._near.epoch(request.key)
        if self._flights.start(request.key, epoch, lambda: self._fill(request, epoch, loader, renew=True)):
            self._counts.add("refreshes")

    # -- storing ------------------------------------------------------------------------------------------------------

    async def _tokens(self, request: Request) -> Tags | None:
        if not request.tags or self._shared is None:
            return ()
        return await self._at_home(self._shared.tokens(request.tags))

    async def _store_loaded(
        self,
        request: Request,
        epoch: Epoch,
        value: Any,
        load_s: float,
        tags: Tags | None,
        right: Lease | Right,
        *,
        is_renewal: bool,
    ) -> Entry:
        """Write what was loaded, if the right to do so still stands, and keep it, if nothing came between."""
        fresh_s = self._fresh_s(request, value)
        entry = self._fresh_entry(request, value, load_s, fresh_s)
        keep = is_alone = right is Right.ALONE
        if isinstance(right, Lease):
            assert self._shared is not None
            if fresh_s > 0 and tags is not None and self._near.holds(request.key, epoch):
                try:
                    sealed = self._seal(self._shared, request, value, fresh_s, tags, load_s)
                except BaseException:  # a value's own code may raise anything; it is raised again
                    await self._at_home(self._shared.release(right))
                    raise
                # None: the tier went away meanwhile, and this process's memory is all there is.
                done = await self._at_home(self._shared.commit(right, sealed))
                keep, is_alone = done is not False, done is None
                entry.version = sealed.version
            else:
                await self._at_home(self._shared.release(right))
        if is_alone:
            self._limit_alone(entry)
        kept = keep and self._near.install(request.key, entry, epoch, request.policy, is_renewal=is_renewal)
        if fresh_s > 0 and not kept:
            self._counts.add("installs_refused")
            if keep and isinstance(right, Lease):
                self._near.drop(request.key)
        return entry

    def _install_loaded(self, request: Request, epoch: Epoch, value: Any, load_s: float) -> Entry:
        entry = self._fresh_entry(request, value, load_s, self._fresh_s(request, value))
        self._limit_alone(entry)
        if not self._near.install(request.key, entry, epoch, request.policy):
            self._counts.add("installs_refused")
        return entry

    async def put(self, items: Sequence[tuple[Request, Any]]) -> None:
        """What `set` does: the shared tier first, then memory, unless another write came between."""
        lives = [self._fresh_s(request, value) for request, value in items]
        gone = [request.key for (request, _), life_s in zip(items, lives, strict=True) if life_s <= 0]
        if gone:
            await self.forget(gone)
        kept = [(*item, life_s) for item, life_s in zip(items, lives, strict=True) if life_s > 0]
        epochs = self._near.begin_writes([request.key for request, _, _ in kept])
        try:
            taken = [True] * len(kept) if self._shared is None else await self._at_home(self._put_shared(kept))
        except BaseException:
            # Given up, or refused for one of the values: what was sent or queued by then arrives all the same, and the
            # echo of one's own write does not drop a copy from before it.
            self._near.forget([request.key for request, _, _ in kept])
            raise
        writes = [
            Write(request.key, self._fresh_entry(request, value, 0.0, life_s), epoch, request.policy)
            for (request, value, life_s), epoch in zip(kept, epochs, strict=True)
        ]
        for write, ok in zip(writes, taken, strict=True):
            if not ok:
                self._limit_alone(write.entry)
        self._near.end_writes(writes)
        lost = [
            request.key
            for (request, _, _), ok in zip(kept, taken, strict=True)
            if not ok and request.policy.strategy is Strategy.WRITE_THROUGH and request.policy.stale_max == 0
        ]
        if lost:
            # Their callers are told that the values were not taken: nobody may read them here either.
            self._near.forget(lost)
            await asyncio.sleep(0)  # whoever tries again at once must not keep the loop from connecting
            raise CacheUnavailable(f"The shared cache did not take {len(lost)} values, {lost[0]!r} among them.")

    async def _put_shared(self, items: Sequence[tuple[Request, Any, float]]) -> list[bool]:
        shared = self._shared
        assert shared is not None
        through: dict[str, Sealed] = {}
        taken: dict[str, bool] = {}
        for request, value, life_s in items:
            tags = await shared.tokens(request.tags)
            if tags is None:
                taken[request.key] = shared.drop(request.key, "its tags could not be read")
                continue
            sealed = self._seal(shared, request, value, life_s, tags)
            if await self._put_behind(request, sealed, value, life_s):
                taken[request.key] = True
            else:
                through[request.key] = sealed
        taken.update(zip(through, await shared.write(list(through.values())), strict=True))
        await self._keep_owed()
        return [taken[request.key] for request, _, _ in items]

    async def _put_behind(self, request: Request, sealed: Sealed, value: Any, life_s: float) -> bool:
        if self._queue is None or request.policy.strategy is not Strategy.WRITE_BEHIND:
            return False
        return await self._queue.put(sealed, self._fresh_entry(request, value, 0.0, life_s))

    @staticmethod
    def _seal(
        shared: SharedTier, request: Request, value: Any, fresh_s: float, tags: Tags, load_s: float = 0.0
    ) -> Sealed:
        return shared.seal(
            request.key,
            value,
            fresh_s=fresh_s,
            stale_s=request.policy.stale_s,
            load_s=load_s,
            tags=tags,
            serializer=request.policy.serializer,
            type=request.type,
        )

    # -- invalidating -------------------------------------------------------------------------------------------------

    async def forget(self, keys: Sequence[str]) -> int:
        """Remove keys. Memory is cleared again afterwards: a read in between may have brought the old value back."""
        held = self._near.forget(keys)
        if self._shared is None or not keys:
            return held
        if self._queue is not None:
            await self._at_home(self._queue.take_back(keys))
        removed = await self._at_home(self._shared.forget(keys))
        await self._keep_owed()
        self._near.forget(keys)
        return max(held, removed)

    async def forget_tags(self, tags: Sequence[str]) -> int:
        """Invalidate tags in both tiers."""
        held = self._near.forget_tags(tags)
        if self._shared is not None and tags:
            if self._queue is not None:
                await self._at_home(self._queue.take_back_tagged(tags))
            await self._at_home(self._shared.forget_tags(tags))
            await self._keep_owed()
            held += self._near.forget_tags(tags)
        return held

    async def forget_matching(self, glob: str) -> int:
        """Invalidate a pattern in both tiers."""
        held = self._near.forget_matching(glob)
        if self._shared is None:
            return held
        if self._queue is not None:
            await self._at_home(self._queue.take_back_matching(glob_pattern(glob).match))
        removed = await self._at_home(self._shared.forget_matching(glob))
        await self._keep_owed()
        self._near.forget_matching(glob)
        return max(held, removed)

    async def forget_all(self) -> None:
        """Forget the namespace in both tiers."""
        self._near.forget_all()
        if self._queue is not None:
            await self._at_home(self._queue.take_back_all())
        if self._shared is not None:
            await self._at_home(self._shared.forget_all())
            await self._keep_owed()
            self._near.forget_all()

    async def _keep_owed(self) -> None:
        """What could not be delivered outlives this process, where there is a spool."""
        if self._queue is not None:
            await self._at_home(self._queue.keep_owed())

    async def flush(self) -> None:
        """Wait for what is being written."""
        if self._queue is not None:
            await self._at_home(self._queue.flush())

    # -- entries ------------------------------------------------------------------------------------------------------

    def _fresh_s(self, request: Request, value: Any) -> float:
        ttl = request.ttl
        if isinstance(ttl, UnsetType):
            return fresh_for(request.policy, value=value, rng=self._rng.random)
        return FOREVER if ttl is None else ttl

    def _fresh_entry(self, request: Request, value: Any, load_s: float, fresh_s: float) -> Entry:
        now = self._clock.monotonic()
        attention_s = attention_after(request.policy, fresh_s=fresh_s, load_s=load_s, rng=self._rng.random)
        return Entry(
            value,
            attention_at=now + attention_s,
            fresh_until=now + fresh_s,
            stale_until=now + fresh_s + request.policy.stale_s,
            load_s=load_s,
            tags=request.tags,
        )

    def _limit_alone(self, entry: Entry) -> None:
        """The shared tier does not have this value, so it will not tell when others change it: the bound of unheard
        changes holds."""
        if self._shared is not None and self._shared.unheard_s is not None:
            entry.age(self._clock.monotonic() + self._shared.unheard_s)

    def _from_shared(self, request: Request, envelope: Envelope, epoch: Epoch) -> Entry:
        """The envelope as an entry, installed in memory unless the reader sees less than its writer meant."""
        entry = self._entry_from(request, envelope)
        if envelope.is_typed and request.type is Any:
            return entry
        if not self._near.install(request.key, entry, epoch, request.policy):
            self._counts.add("installs_refused")
        return entry

    def _entry_from(self, request: Request, envelope: Envelope) -> Entry:
        """The envelope in the times of this process's clock."""
        policy = request.policy
        # A writer's clock may run ahead of ours: an entry from the future counts as new.
        age_s = max(0.0, self._clock.wall() - envelope.created_ms / 1000)
        fresh_s = FOREVER if envelope.fresh_ms == FOREVER_MS else envelope.fresh_ms / 1000
        load_s = envelope.load_us / 1_000_000
        born = self._clock.monotonic() - age_s
        return Entry(
            envelope.value,
            attention_at=born + attention_after(policy, fresh_s=fresh_s, load_s=load_s, rng=self._rng.random),
            fresh_until=born + fresh_s,
            stale_until=born + fresh_s + min(policy.stale_s, envelope.stale_ms / 1000),
            load_s=load_s,
            version=envelope.version,
            tags=tuple(tag for tag, _ in envelope.tags),
        )

    def _is_usable(self, policy: CachePolicy, entry: Entry) -> bool:
        """Whether the entry may answer without a load: it is fresh, or its policy renews stale ones behind the
        answer."""
        now = self._clock.monotonic()
        if now < entry.fresh_until:
            return True
        return policy.strategy is Strategy.REFRESH_AHEAD and now < entry.stale_until

    def _may_stand_in(self, entry: Entry | None) -> bool:
        return entry is not None and self._clock.monotonic() < entry.stale_until

    def _note_age(self, entry: Entry) -> None:
        if self._clock.monotonic() >= entry.fresh_until:
            self._counts.add("stale_served")

    # -- loops --------------------------------------------------------------------------------------------------------

    async def _at_home(self, work: Coroutine[Any, Any, T]) -> T:
        """Do work of the shared tier on the loop that its connections belong to."""
        if running_loop() is self._home:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._home))

    def _from_thread(self, work: Coroutine[Any, Any, T]) -> T:
        outcome = asyncio.run_coroutine_threadsafe(work, self._home)
        try:
            return outcome.result()
        except BaseException:
            # Ctrl-C ends the wait, not the work: a claim that went on alone would keep its lease until the cache
            # closes.
            outcome.cancel()
            raise


def _patience_s(policy: CachePolicy) -> float:
    """How long to wait for a load that cannot be cancelled."""
    return WAIT_MAX_S if policy.load_timeout is None else policy.load_timeout
