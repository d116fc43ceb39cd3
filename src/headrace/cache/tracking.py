"""Invalidation of the copies in memory: the server tells which keys change, and silence is noticed.

One connection to each primary asks for CLIENT TRACKING in broadcasting mode on our prefix: Redis then pushes the name
of every key of ours that anybody writes, deletes, expires or evicts, and "everything" on a flush. A push raises the
key's fence and drops the copy, so neither a copy nor a read that is under way outlives the change.

- Cover is whole while every primary's channel stands and answered its last heartbeat. When it is not, changes may go
  unheard:
  copies stay fresh for `degraded_s` at most, and when cover is whole again all of them are checked against the shared
  tier before they answer, because nobody knows what was missed. A lost channel is noticed after heartbeat plus timeout
  at the latest.
- Our own writes come back as pushes too. They are not suppressed: a push that we might have caused ourselves is looked
  at, by
  reading the version in the entry's head. If it is the one we wrote, the copy is right; if not, somebody else wrote
  after us. The same with tags: that a tag got its first token, for a load of ours that begins, is no invalidation.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from headrace.cache.codec import HEAD_BYTES, version_in
from headrace.cache.keyspace import Keyspace
from headrace.cache.near import Near
from headrace.cache.pipeline import Pipeline
from headrace.cache.remote import Command, Remote, pack
from headrace.cache.topology import Address
from headrace.clock import Clock
from headrace.errors import CacheRefused, CacheUnavailable
from headrace.events import Observer, TierRecovered, TierUnavailable

HEARTBEAT_S = 0.5
OWN_MAX = 20_000
CHECKS_MAX = 1_000
_PING = pack(("PING",))
_ROLE = pack(("ROLE",))


class OwnWrites:
    """The version that this process last wrote of a key, and the tokens that it has just made for a tag, for as many
    of each as are worth remembering."""

    __slots__ = ("_tokens", "_versions")

    def __init__(self) -> None:
        self._versions: dict[str, int] = {}
        self._tokens: dict[str, set[bytes]] = {}

    def note(self, key: str, version: int) -> None:
        """A write is about to be sent."""
        self._versions.pop(key, None)
        self._versions[key] = version
        if len(self._versions) > OWN_MAX:
            del self._versions[next(iter(self._versions))]

    def version(self, key: str) -> int | None:
        """The version that we would recognise as ours."""
        return self._versions.get(key)

    def forget(self, key: str) -> None:
        """What comes from now on is somebody else's."""
        self._versions.pop(key, None)

    def note_token(self, tag: str, token: bytes) -> None:
        """A tag is about to get this token if it has none."""
        self._tokens.setdefault(tag, set()).add(token)
        if len(self._tokens) > OWN_MAX:
            del self._tokens[next(iter(self._tokens))]

    def withdraw_token(self, tag: str, token: bytes) -> None:
        """The tag had one already."""
        tokens = self._tokens.get(tag, set())
        tokens.discard(token)
        if not tokens:
            self._tokens.pop(tag, None)

    def tokens(self, tag: str) -> "set[bytes] | None":
        """With one of these the tag was made by us, not invalidated."""
        return self._tokens.get(tag)

    def forget_tokens(self, tag: str) -> None:
        """What comes from now on is an invalidation."""
        self._tokens.pop(tag, None)


class Tracking:
    """The channels of one cache. Is a Watcher of its pipelines."""

    def __init__(
        self,
        remote: Remote,
        *,
        keyspace: Keyspace,
        near: Near,
        own: OwnWrites,
        clock: Clock,
        observer: Observer,
        degraded_s: float,
        on_generation: Callable[[], None],
    ) -> None:
        self._remote = remote
        self._keyspace = keyspace
        self._near = near
        self._own = own
        self._clock = clock
        self._observer = observer
        self._degraded_s = degraded_s
        self._on_generation = on_generation
        self._channels: dict[Address, Pipeline] = {}
        self._covered: set[Pipeline] = set()
        self._whole = False
        self._is_unaged = False
        """Copies from before the loss are still as fresh as they were."""
        self._down_since: float | None = None
        self._wake = asyncio.Event()
        self._first = asyncio.Event()
        self._doubted: set[str] = set()
        self._doubted_tags: set[str] = set()
        self._check: asyncio.Task[None] | None = None
        self._keeper: asyncio.Task[None] | None = None
        near.limit_freshness(degraded_s)

    async def open(self, wait_s: float) -> None:
        """Begin, and wait at most `wait_s` for the first whole cover."""
        self._keeper = asyncio.get_running_loop().create_task(self._keep_covered())
        try:
            async with asyncio.timeout(wait_s):
                await self._first.wait()
        except TimeoutError:
            self._lose(f"no invalidation channel within {wait_s:g} s")

    async def close(self) -> None:
        """Close the channels."""
        tasks = [task for task in (self._check, self._keeper) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        channels = list(self._channels.values())
        self._channels.clear()
        await asyncio.gather(*(channel.close() for channel in channels))

    # -- cover --------------------------------------------------------------------------------------------------------

    async def _keep_covered(self) -> None:
        while True:
            await self._follow_topology()
            await self._beat()
            if self._is_covered() and not self._whole:
                # What was kept while changes could go unheard is checked before it answers again.
                await asyncio.to_thread(self._near.age, 0.0)
                if self._is_covered():
                    self._regain()
            elif self._is_unaged:
                self._is_unaged = False
                await asyncio.to_thread(self._near.age, self._degraded_s)
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._wake.wait()
            except TimeoutError:
                pass  # the next heartbeat is due
            self._wake.clear()

    async def _follow_topology(self) -> None:
        """A channel for each primary, and for no other node."""
        await self._remote.check_topology()
        wanted = self._remote.addresses()
        if self._whole and wanted != self._channels.keys():
            # What was read from a new primary before its channel stands may have changed there unheard.
            self._lose("other primaries serve the keys now")
        for address in [address for address in self._channels if address not in wanted]:
            channel = self._channels.pop(address)
            self._covered.discard(channel)
            await channel.close()
        for address in wanted - self._channels.keys():
            self._channels[address] = self._remote.channel(address, self)
        await asyncio.gather(*(channel.open() for channel in self._channels.values()))

    async def _beat(self) -> None:
        """Ask each channel for a sign of life; the pipeline itself cuts one that stays silent."""
        beats = [self._beat_one(channel) for channel in list(self._covered)]
        await asyncio.gather(*beats)

    async def _beat_one(self, channel: Pipeline) -> None:
        try:
            if not self._remote.follows_sentinel:
                await channel.call(_PING)
                return
            role = await channel.call(_ROLE)
            if isinstance(role, list) and role and role[0] != b"master":
                channel.cut("the node is a replica now")
        except CacheRefused:
            return  # the node answers, even if the user may not ask this
        except CacheUnavailable as error:
            self._covered.discard(channel)
            channel.cut(error.message)
            self._lose(error.message)

    def _is_covered(self) -> bool:
        return bool(self._channels) and all(channel in self._covered for channel in self._channels.values())

    def _lose(self, reason: str) -> None:
        self._near.limit_freshness(self._degraded_s)
        self._is_unaged = self._is_unaged or self._whole
        self._whole = False
        if self._down_since is None:
            self._down_since = self._clock.monotonic()
            self._observer.on(TierUnavailable(tier="invalidation", reason=reason))
        self._wake.set()

    def _regain(self) -> None:
        self._whole = True
        self._near.limit_freshness(None)
        self._first.set()
        if self._down_since is not None:
            down_s = self._clock.monotonic() - self._down_since
            self._observer.on(TierRecovered(tier="invalidation", down_s=down_s))
            self._down_since = None

    # -- what the pipelines say ---------------------------------------------------------------------------------------

    def on_up(self, pipeline: Pipeline) -> None:
        """A channel stands: ask for the pushes. It covers once the server agreed."""
        command: Command = ("CLIENT", "TRACKING", "ON", "BCAST", "PREFIX", self._keyspace.prefix)
        agreed = pipeline.call(pack(command))
        agreed.add_done_callback(lambda reply: self._begin(pipeline, reply))

    def _begin(self, pipeline: Pipeline, reply: "asyncio.Future[Any]") -> None:
        if reply.cancelled():
            return
        error = reply.exception()
        if error is None:
            self._covered.add(pipeline)
            self._wake.set()
        else:
            # Perhaps the server is still loading its data: a new connection, with back-off, asks again.
            self._lose(str(error))
            pipeline.cut("the server refused to track")

    def on_lost(self, pipeline: Pipeline, reason: str) -> None:
        """A channel broke."""
        self._covered.discard(pipeline)
        if pipeline in self._channels.values():
            self._lose(reason)

    def on_down(self, pipeline: Pipeline, reason: str) -> None:
        """A channel could not be made again at once."""
        self.on_lost(pipeline, reason)

    def on_push(self, pipeline: Pipeline, message: list[Any]) -> None:
        """The server tells what changed."""
        if len(message) != 2 or message[0] != b"invalidate":
            return
        names = message[1]
        if names is None:
            self._near.forget_all()
            self._on_generation()
            return
        self._note_changes(names)

    # -- changes ------------------------------------------------------------------------------------------------------

    def _note_changes(self, names: Iterable[bytes]) -> None:
        gone: list[str] = []
        for name in names:
            match self._keyspace.parse(name):
                case "entry", key if self._own.version(key) is not None and len(self._doubted) < CHECKS_MAX:
                    self._doubted.add(key)
                case "entry", key:
                    self._own.forget(key)
                    gone.append(key)
                case "tag", tag if self._own.tokens(tag) and len(self._doubted_tags) < CHECKS_MAX:
                    self._doubted_tags.add(tag)
                case "tag", tag:
                    self._own.forget_tokens(tag)
                    self._near.forget_tags([tag])
                case "generation", _:
                    self._on_generation()
        if gone:
            self._near.forget(gone)
        # Asked of the task itself: one that has just ended would not see what is added now.
        if (self._doubted or self._doubted_tags) and (self._check is None or self._check.done()):
            self._check = asyncio.get_running_loop().create_task(self._check_doubted())

    async def _check_doubted(self) -> None:
        """Is what is there now what we wrote? Each round takes everything that was pushed meanwhile."""
        while self._doubted or self._doubted_tags:
            keys, tags = list(self._doubted), list(self._doubted_tags)
            self._doubted.clear()
            self._doubted_tags.clear()
            expected = {key: self._own.version(key) for key in keys}
            names = [self._keyspace.name(key) for key in keys]
            tokens = [self._keyspace.tag(tag) for tag in tags]
            replies = await self._remote.call_each(
                [
                    *((name, ("GETRANGE", name, 0, HEAD_BYTES - 1)) for name in names),
                    *((name, ("GET", name)) for name in tokens),
                ]
            )
            heads, found = replies[: len(keys)], replies[len(keys) :]
            others: list[str] = []
            unknown: list[str] = []
            for key, head in zip(keys, heads, strict=True):
                if not isinstance(head, bytes):
                    unknown.append(key)
                elif version_in(head) not in {expected[key], self._own.version(key)}:
                    others.append(key)
            for key in (*others, *unknown):
                self._own.forget(key)
            self._near.forget(others)
            self._near.expire(unknown)  # the node does not answer, and then a stale copy is better than none
            changed = [
                tag for tag, token in zip(tags, found, strict=True) if token not in (self._own.tokens(tag) or ())
            ]
            for tag in tags:
                self._own.forget_tokens(tag)  # it was made once; whatever is pushed next is an invalidation
            if changed:
                self._near.forget_tags(changed)
