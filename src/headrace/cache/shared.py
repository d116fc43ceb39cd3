"""The shared tier as the cache sees it: envelopes in and out, and a failure never reaches the caller.

What can go wrong here is an answer like any other. A read gives an envelope, None for a miss, or AWAY; a write gives
whether it happened. An invalidation that could not be delivered is kept, in bounds, and delivered before its key is
believed again: until then this process treats the key as AWAY, and if more are kept than the bound, the whole
namespace is cleared on return.
"""

import asyncio
import enum
import random
from collections.abc import Callable, Collection, Coroutine, Iterable, Sequence
from typing import Any, Final, cast

from headrace.cache.codec import FOREVER_MS, Codec, Envelope, Rejected, Sealed, Tags, milliseconds
from headrace.cache.config import RemoteConfig
from headrace.cache.deferred import ALL, Deferred, OnWay
from headrace.cache.exchange import Exchange
from headrace.cache.keyspace import Keyspace
from headrace.cache.lease import Claim, Lease, Leases, Right
from headrace.cache.near import Near
from headrace.cache.remote import Remote, RemoteWatcher
from headrace.cache.seal import seal_of
from headrace.cache.statistics import Counts
from headrace.cache.tracking import OwnWrites, Tracking
from headrace.clock import Clock
from headrace.errors import CacheRefused, CacheUnavailable
from headrace.events import EntryRejected, Observer, TierRecovered, TierUnavailable, WriteDropped

GENERATION_CHECK_S = 1.0
"""How long another process's `clear` may go unnoticed when no invalidation channel stands."""
TAG_TTL_MS = 30 * 24 * 3600 * 1000
"""A tag's token outlives its last use by this; its loss only makes the tag's entries misses."""
GENERATIONS_MAX = 5
"""How often a change is made again because others have just begun a new generation; then it is owed."""
CLEARED = b"c"
"""Begins a generation that `clear` made."""
FOUND_EMPTY = b"e"
"""Begins a generation that was made because the server had none: it is new, was flushed, or lost its data."""


class Absence(enum.Enum):
    """Why there is no envelope, apart from a miss."""

    AWAY = "away"
    """The tier could not be asked, or its answer may not be believed yet."""


AWAY: Final = Absence.AWAY
Found = Envelope | Absence | None


class SharedTier(RemoteWatcher):
    """One namespace in Redis, for one process."""

    def __init__(
        self,
        config: RemoteConfig,
        *,
        namespace: str,
        clock: Clock,
        observer: Observer,
        counts: Counts,
        rng: random.Random,
        tokens: random.Random,
        near: Near,
    ) -> None:
        self._config = config
        self._clock = clock
        self._observer = observer
        self._counts = counts
        self._tokens = tokens
        self._near = near
        seal = seal_of(config, namespace=namespace)
        self._codec = Codec(compress_min=config.compress_min, value_bytes_max=config.value_bytes_max, seal=seal)
        self.keyspace = Keyspace(namespace)
        self._remote = Remote(config, self, rng=rng.random)
        self._deferred = Deferred(config.deferred_max)
        self._clearing = asyncio.Lock()
        self._tags_on_way: list[frozenset[str]] = []
        self._own = OwnWrites()
        self._tracking: Tracking | None = None
        self.exchange = Exchange(self, self._remote, is_cluster="+cluster" in config.url.partition("://")[0])
        self._leases = Leases(self._remote, lease_s=config.lease, token=self._random, rng=tokens.random)
        self._down_since: dict[str, float] = {}
        self._wake = asyncio.Event()
        self._on_way = OnWay(self._wake.set)
        self.on_delivered: Callable[[], None] | None = None
        """Called after an attempt at what is owed."""
        self._upkeep: asyncio.Task[None] | None = None
        # Counted on the home loop alone, so without a lock.
        self.hits = 0
        self.misses = 0

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and learn the generation; returns even when the tier is away."""
        await self._remote.open()
        await self.learn_generation()
        if self._config.tracking and self._near.memory is not None:
            self._tracking = Tracking(
                self._remote,
                keyspace=self.keyspace,
                near=self._near,
                own=self._own,
                clock=self._clock,
                observer=self._observer,
                degraded_s=self._config.degraded_ttl,
                on_generation=self._wake.set,
            )
            await self._tracking.open(self._config.connect_timeout if self._remote.is_available else 0.0)
        self._upkeep = asyncio.get_running_loop().create_task(self._keep_up())

    async def close(self) -> None:
        """Disconnect. Invalidations that were never delivered are told to the observer."""
        if self._upkeep is not None:
            self._upkeep.cancel()
            await asyncio.wait([self._upkeep])
        if self._tracking is not None:
            await self._tracking.close()
        await self._leases.close()
        await self._remote.close()
        for name in self._deferred.names():
            self._observer.on(
                WriteDropped(key=name, reason="the cache was closed before the invalidation could be delivered")
            )

    @property
    def is_available(self) -> bool:
        """Whether calls are answered now."""
        return self._remote.is_available

    @property
    def owed(self) -> Deferred:
        """The invalidations that could not be delivered yet."""
        return self._deferred

    @property
    def unheard_s(self) -> float | None:
        """How long a change may go unheard that the server does not tell of; None: it tells of none anyway."""
        return self._config.degraded_ttl if self._config.tracking else None

    def on_node_up(self, name: str) -> None:
        """A node can be called: what is owed to it is delivered now."""
        down_since = self._down_since.pop(name, None)
        if down_since is not None:
            self._observer.on(TierRecovered(tier=f"remote {name}", down_s=self._clock.monotonic() - down_since))
        self._wake.set()

    def on_node_down(self, name: str, reason: str) -> None:
        """A node cannot be called; told once until it comes back."""
        if name not in self._down_since:
            self._down_since[name] = self._clock.monotonic()
            self._observer.on(TierUnavailable(tier=f"remote {name}", reason=reason))

    # -- reading ------------------------------------------------------------------------------------------------------

    def fetch(self, key: str) -> "asyncio.Future[Any] | Coroutine[Any, Any, Any] | None":
        """An awaitable of what `opened` wants to see; None if the tier cannot be asked about this key now.

        With `opened` it is `read` in two halves, for those who count in microseconds.
        """
        if self._deferred.is_owed and self._deferred.covers(key):
            return None
        name = self.keyspace.entry(key)
        return None if name is None else self._remote.get(name)

    def opened(self, key: str, data: Any, type: Any) -> Envelope | None:
        """The envelope in a reply, counted as hit or miss. If it has tags, they still have to be checked."""
        if data is None:
            self.misses += 1
            return None
        opened = self._codec.open(key, data, type) if data.__class__ is bytes else Rejected("not a string")
        if opened.__class__ is Envelope:
            self.hits += 1
            return opened
        self._reject(key, cast("Rejected", opened).reason)
        return None

    def failed(self, key: str, error: CacheUnavailable) -> Found:
        """What a read that raised comes to: a miss if the server holds something foreign, else AWAY."""
        if isinstance(error, CacheRefused) and error.message.startswith("WRONGTYPE"):
            self._reject(key, "another data type lives under this name")
            return None
        self._counts.add("remote_errors")
        return AWAY

    async def read(self, key: str, type: Any = Any) -> Found:
        """The envelope under `key`, None, or AWAY."""
        reply = self.fetch(key)
        if reply is None:
            return AWAY
        try:
            data = await reply
        except CacheUnavailable as error:
            return self.failed(key, error)
        return await self.checked(key, self.opened(key, data, type))

    async def checked(self, key: str, envelope: Envelope | None) -> Found:
        """The envelope, unless one of its tags was invalidated since it was written."""
        if envelope is None or not envelope.tags:
            return envelope
        valid = await self._without_stale_tags({key: envelope})
        return valid.get(key)

    async def read_many(self, keys: Sequence[str], type: Any = Any) -> dict[str, Found]:
        """The envelopes that are there, and AWAY for keys that could not be asked for; missing ones are left out."""
        found: dict[str, Found] = {}
        if self.keyspace.generation is None:
            return dict.fromkeys(keys, AWAY)
        owed = self._deferred.is_owed
        asked = [key for key in keys if not self._deferred.covers(key)] if owed else keys
        replies = await self._remote.get_many([self.keyspace.name(key) for key in asked])
        tagged: dict[str, Envelope] = {}
        if owed:
            found.update((key, AWAY) for key in keys if self._deferred.covers(key))
        for key, data in zip(asked, replies, strict=True):
            if isinstance(data, CacheUnavailable):
                found[key] = self.failed(key, data)
            elif (envelope := self.opened(key, data, type)) is not None:
                (tagged if envelope.tags else found)[key] = envelope
        if tagged:
            found.update(await self._without_stale_tags(tagged))
        return found

    def _reject(self, key: str, reason: str) -> None:
        self.misses += 1
        self._counts.add("entries_rejected")
        self._observer.on(EntryRejected(key=key, reason=reason))

    async def _without_stale_tags(self, found: dict[str, Envelope]) -> dict[str, Envelope]:
        """Those whose tags all still have the tokens that they were written with."""
        tags = sorted({tag for envelope in found.values() for tag, _ in envelope.tags})
        tokens = dict(zip(tags, await self._remote.get_many([self.keyspace.tag(tag) for tag in tags]), strict=True))
        valid: dict[str, Envelope] = {}
        for key, envelope in found.items():
            if any(isinstance(tokens[tag], BaseException) or tag in self._deferred.tags for tag, _ in envelope.tags):
                self._counts.add("remote_errors")
                self.hits -= 1
            elif all(tokens[tag] == token for tag, token in envelope.tags):
                valid[key] = envelope
            else:
                self.hits -= 1
                self.misses += 1
        return valid

    # -- writing ------------------------------------------------------------------------------------------------------

    async def tokens(self, tags: Collection[str]) -> Tags | None:
        """The tokens of tags, made where there are none; to be asked for before the value is read. None: away."""
        if not tags:
            return ()
        # An invalidation that is on its way arrives before what is asked for here, or the tag is owed again.
        sent, known = self._tags_on_way, self._deferred.tags
        if owed := [tag for tag in tags if tag in known and not any(tag in each for each in sent)]:
            await self._deliver_tags(owed)
            if not self._deferred.tags.keys().isdisjoint(owed):
                return None
        asked = [(tag, self.keyspace.tag(tag), self._random()) for tag in tags]
        commands: list[tuple[bytes, tuple[bytes | str | int, ...]]] = []
        for tag, name, token in asked:
            self._own.note_token(tag, token)
            commands.append((name, ("SET", name, token, "NX", "PX", TAG_TTL_MS)))
            commands.append((name, ("GET", name)))
        replies = (await self._remote.call_each(commands))[1::2]
        for (tag, _, token), reply in zip(asked, replies, strict=True):
            if reply != token:
                self._own.withdraw_token(tag, token)
        if not all(isinstance(reply, bytes) for reply in replies):
            self._counts.add("remote_errors")
            return None
        return tuple((tag, reply) for (tag, _, _), reply in zip(asked, replies, strict=True))

    def seal(
        self,
        key: str,
        value: Any,
        *,
        fresh_s: float,
        stale_s: float,
        load_s: float = 0.0,
        tags: Tags = (),
        serializer: str = "msgpack",
        type: Any = Any,
    ) -> Sealed:
        """The bytes to write for a value that is fresh for `fresh_s` from now. Raises UnencodableValue."""
        version = self._tokens.getrandbits(63)
        envelope = Envelope(
            value=value,
            created_ms=int(self._clock.wall() * 1000),
            fresh_ms=max(1, milliseconds(fresh_s)),
            stale_ms=milliseconds(stale_s),
            load_us=int(load_s * 1_000_000),
            version=version,
            tags=tags,
        )
        data = self._codec.seal(key, envelope, serializer=serializer, type=type)
        is_endless = FOREVER_MS in {envelope.fresh_ms, envelope.stale_ms}
        life_ms = None if is_endless else envelope.fresh_ms + envelope.stale_ms
        # What comes after a `clear` that is still owed belongs to the generation that it will begin.
        generation = b"" if self._deferred.everything else self.keyspace.generation or b""
        return Sealed(key, data, life_ms, version, generation)

    async def write(self, entries: Sequence[Sealed]) -> list[bool]:
        """Store entries; whether each was taken. Loads under way in other processes cannot overwrite them."""
        if self.keyspace.generation is None:
            return [self.drop(entry.key, "the tier is away") for entry in entries]
        for _ in range(GENERATIONS_MAX):
            as_of = self._deferred.latest
            replies, is_current = await self._send(entries)
            if is_current:
                return [self._written(entry.key, reply, as_of) for entry, reply in zip(entries, replies, strict=True)]
            await self.learn_generation()
        return [self.drop(entry.key, "the namespace is cleared over and over") for entry in entries]

    async def deliver(self, entries: Sequence[Sealed]) -> list[bool]:
        """As `write`, for entries that are kept and tried again if they are not taken."""
        if self._deferred.everything:  # whatever went ahead of it would be cleared with the rest
            async with self._clearing:
                if self._deferred.everything:
                    await self._deliver_everything()
        generation = self.keyspace.generation
        if generation is None or self._deferred.everything:
            return [False] * len(entries)
        # What was written before a `clear` that another process called is not wanted any more. What was written before
        # the server lost its data is, and what was written while the generation was unknown.
        cleared = generation.startswith(CLEARED)
        current = [entry for entry in entries if not cleared or entry.generation in {b"", generation}]
        as_of = self._deferred.latest
        answers, is_current = await self._send(current)
        if not is_current:
            await self.learn_generation()
            return [False] * len(entries)
        replies = dict(zip((entry.key for entry in current), answers, strict=True))
        for key, reply in replies.items():
            if not isinstance(reply, BaseException):
                self._deferred.pay_keys([key], as_of=as_of)
        return [not isinstance(replies.get(entry.key), BaseException) for entry in entries]

    async def is_newer(self, entry: Sealed) -> bool | str:
        """Whether an entry that was found on disk is newer than what is shared now; if that is unknown, it is.

        A str says why it cannot be read.
        """
        mine = self._codec.open(entry.key, entry.data)
        if isinstance(mine, Rejected):
            return mine.reason
        current = await self.read(entry.key)
        return not isinstance(current, Envelope) or current.created_ms < mine.created_ms

    async def _send(self, entries: Sequence[Sealed]) -> tuple[list[Any], bool]:
        """The replies, and whether they are about the generation that others read; that is believed when it cannot be
        known, because in a Cluster another node would have to be asked."""
        if not entries:
            return [], True
        generation = self.keyspace.generation
        commands: list[tuple[bytes, tuple[bytes | str | int, ...]]] = []
        for entry in entries:
            name, lease = self.keyspace.name(entry.key), self.keyspace.lease(entry.key)
            self._own.note(entry.key, entry.version)
            commands.append((name, ("UNLINK", lease)))
            life = () if entry.life_ms is None else ("PX", entry.life_ms)
            commands.append((name, ("SET", name, entry.data, *life)))
        commands.append((self.keyspace.generation_key, ("GET", self.keyspace.generation_key)))
        *replies, current = await self._remote.call_each(commands)
        return replies[1::2], isinstance(current, CacheUnavailable) or current == generation

    def _written(self, key: str, reply: Any, as_of: int) -> bool:
        if isinstance(reply, BaseException):
            return self.drop(key, str(reply))
        self._deferred.pay_keys([key], as_of=as_of)
        return True

    def drop(self, key: str, reason: str) -> bool:
        """The old value may still be there, and the writer said that it is not true any more."""
        self._deferred.add_keys([key])
        self._counts.add("writes_dropped")
        self._observer.on(WriteDropped(key=key, reason=reason))
        return False

    # -- leases -------------------------------------------------------------------------------------------------------

    async def claim(
        self, key: str, type: Any, *, is_enough: Callable[[Envelope], bool], patience_s: float | None
    ) -> Claim:
        """What is shared under `key` if it is good enough, else the lease to load it, waited for at most `patience_s`.

        None: as long as the configuration says.
        """
        found = await self.read(key, type)
        if found is AWAY:
            return Claim(None, Right.ALONE)
        if isinstance(found, Envelope) and is_enough(found):
            return Claim(found, Right.ENOUGH)

        looks = 0

        async def opened(data: Any) -> Envelope | None:
            # Not counted as hits and misses: it is the same read as above, over again.
            nonlocal looks
            looks += 1
            if looks == 2:
                self._counts.add("lease_waits")
            opened = self._codec.open(key, data, type) if data.__class__ is bytes else None
            checked = await self.checked(key, opened) if isinstance(opened, Envelope) else None
            return checked if isinstance(checked, Envelope) else None

        return await self._leases.claim(
            (self.keyspace.name(key), self.keyspace.lease(key)),
            opened,
            is_enough=is_enough,
            patience_s=self._config.lease_wait_max if patience_s is None else patience_s,
        )

    async def commit(self, lease: Lease, entry: Sealed) -> bool | None:
        """Write what was loaded under a lease; False if something came between, None if the tier is away."""
        self._own.note(entry.key, entry.version)
        try:
            return await self._leases.commit(lease, entry.data, entry.life_ms)
        except CacheUnavailable as error:
            self._counts.add("writes_dropped")
            self._observer.on(WriteDropped(key=entry.key, reason=error.message))
            return None

    async def release(self, lease: Lease) -> None:
        """Let others load."""
        self._leases.release(lease)

    # -- invalidating -------------------------------------------------------------------------------------------------

    async def forget(self, keys: Sequence[str]) -> int:
        """Remove entries, and every right to write them that was given out; how many there were."""
        self._deferred.add_keys(keys)
        removed = await self._deliver_keys(keys) if self.keyspace.generation is not None else None
        if removed is None:
            self._counts.add("remote_errors")
            return 0
        return removed

    async def forget_matching(self, glob: str) -> int:
        """Remove the entries whose keys match; how many there were."""
        self._deferred.add_pattern(glob)
        if self.keyspace.generation is None:
            return 0
        with self._on_way.delivery(glob):
            for _ in range(GENERATIONS_MAX):
                generation, as_of = self.keyspace.generation, self._deferred.latest
                entries, kind = self.keyspace.entries(glob), self.keyspace.matcher(glob)
                try:
                    removed = await self._remote.unlink_matching(entries, kind)
                    if await self._is_current(generation):
                        self._deferred.pay_pattern(glob, as_of=as_of)
                        return removed
                except CacheUnavailable:
                    break
                await self.learn_generation()
        self._counts.add("remote_errors")
        return 0

    async def forget_tags(self, tags: Iterable[str]) -> None:
        """Give tags new tokens: every entry written with the old ones is a miss from now on, everywhere."""
        wanted = list(tags)
        for tag in wanted:
            self._own.forget_tokens(tag)
        self._deferred.add_tags(wanted)
        await self._deliver_tags(wanted)

    async def forget_all(self) -> None:
        """Begin a new generation; the old entries are unreachable at once and leave with their TTL."""
        self._deferred.add_everything()
        async with self._clearing:
            await self._deliver_everything()

    async def settle(self, key: str) -> bool:
        """Deliver what is owed for a key; False while a clear or a pattern still keeps it from being believed.

        Raises CacheUnavailable if the tier is away.
        """
        if key in self._deferred.keys and self.keyspace.generation is not None:
            await self._deliver_keys([key])
        if covering := self._deferred.covering(key):
            await self._on_way.landed(covering)
        if not self._deferred.covers(key):
            return True
        if not self._remote.is_available:
            raise CacheUnavailable(f"{key!r} was invalidated, and the shared cache is away.")
        return False

    async def _deliver_keys(self, keys: Sequence[str]) -> int | None:
        for key in keys:
            self._own.forget(key)
        for _ in range(GENERATIONS_MAX):
            as_of = self._deferred.latest
            leases = [self.keyspace.lease(key) for key in keys]
            names = [self.keyspace.name(key) for key in keys]
            try:
                # Leases first: once the entry is gone nobody may still have the right to write the old value back.
                _, removed, is_current = await asyncio.gather(
                    self._remote.unlink(leases),
                    self._remote.unlink(names),
                    self._is_current(self.keyspace.generation),
                )
            except CacheUnavailable:
                return None
            if is_current:
                self._deferred.pay_keys(keys, as_of=as_of)
                return removed
            await self.learn_generation()
        return None

    async def _is_current(self, generation: bytes | None) -> bool:
        """Whether no `clear` or flush began a new generation that this process has not heard of.

        Asked together with every change: one that was made under old names is not seen by those who read the new ones.
        If the answer is yes, whoever enters a newer generation does it after this change began.
        """
        name = self.keyspace.generation_key
        current: Any = await self._remote.call(name, "GET", name)
        return bool(current == generation)

    async def _deliver_tags(self, tags: Sequence[str]) -> None:
        commands = [(name, ("SET", name, self._random(), "PX", TAG_TTL_MS)) for name in map(self.keyspace.tag, tags)]
        as_of, on_way = self._deferred.latest, frozenset(tags)
        self._tags_on_way.append(on_way)
        try:
            replies = await self._remote.call_each(commands)
        finally:
            self._tags_on_way.remove(on_way)
        for tag, reply in zip(tags, replies, strict=True):
            if isinstance(reply, BaseException):
                self._counts.add("remote_errors")
            else:
                self._deferred.pay_tags([tag], as_of=as_of)

    async def _deliver_everything(self) -> None:
        name, generation, as_of = self.keyspace.generation_key, CLEARED + self._random(), self._deferred.latest
        try:
            with self._on_way.delivery(ALL):
                await self._remote.call(name, "SET", name, generation)
        except CacheUnavailable:
            self._counts.add("remote_errors")
            return
        self.keyspace.enter(generation)
        # What was written under the old names while the answer was on its way is in memory only.
        self._near.forget_all()
        self._deferred.pay_everything(as_of=as_of)

    # -- upkeep -------------------------------------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        """Notice other processes' `clear`, and deliver what could not be delivered."""
        while True:
            try:
                async with asyncio.timeout(GENERATION_CHECK_S):
                    await self._wake.wait()
            except TimeoutError:
                pass  # time for a look all the same
            self._wake.clear()
            if self._remote.is_available:
                await self.deliver_owed()
                await self.learn_generation()

    async def deliver_owed(self) -> None:
        """Deliver the invalidations that could not be delivered before."""
        # The echo of a `clear` may come before its answer: it is not owed, it is on its way.
        if self._deferred.everything and not self._clearing.locked():
            async with self._clearing:
                await self._deliver_everything()
        if self.keyspace.generation is None or not self._deferred.is_owed:
            return
        if self._deferred.keys:
            await self._deliver_keys(list(self._deferred.keys))
        if self._deferred.tags:
            await self._deliver_tags(list(self._deferred.tags))
        for glob in list(self._deferred.patterns):
            # Taken twice, one walk would count what the other removed.
            if glob in self._deferred.patterns and not self._on_way.brings(glob):
                await self.forget_matching(glob)
        if self.on_delivered is not None:
            self.on_delivered()

    async def learn_generation(self) -> None:
        """Enter the generation that the others read, and forget the copies of any other."""
        name = self.keyspace.generation_key
        try:
            generation = await self._remote.call(name, "GET", name)
            if generation is None:
                await self._remote.call(name, "SET", name, FOUND_EMPTY + self._random(), "NX")
                generation = await self._remote.call(name, "GET", name)
        except CacheUnavailable:
            return
        if isinstance(generation, bytes) and generation != self.keyspace.generation and not self._deferred.everything:
            known_before = self.keyspace.generation is not None
            self.keyspace.enter(generation)
            if known_before:
                self._near.forget_all()

    def _random(self) -> bytes:
        return b"%016x" % self._tokens.getrandbits(64)
