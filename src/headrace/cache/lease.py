"""One loader a key over all processes, and the right to write what was loaded.

Whoever misses takes the lease: a random token under a name of its own beside the entry, in the same hash slot. Whoever
finds it taken waits for the value to appear. The loaded value is written by a script that looks whether the token is
still there: every delete and every write removes it first, so a value that was loaded before an invalidation can never
be written after it. The token is drawn anew for each attempt, so an attempt cannot be mistaken for an earlier one of
the same process.

The lease lasts `lease_s` and is renewed while the load runs: when its holder dies, others wait at most that long. When
the holder lives but takes longer than a waiter's patience, the waiter loads for itself and keeps nothing. (Facebook's
leases, Nishtala et al., "Scaling Memcache at Facebook", NSDI 2013, on Redis scripts.)
"""

import asyncio
import enum
import hashlib
import weakref
from collections.abc import Awaitable, Callable
from typing import Any, Final, NamedTuple

from headrace.cache.codec import Envelope
from headrace.cache.remote import Part, Remote
from headrace.errors import CacheRefused, CacheUnavailable

POLL_FIRST_S = 0.002
POLL_MAX_S = 0.05


class Script:
    """A Lua script, called by its digest and sent in full only to a server that does not know it."""

    __slots__ = ("_digest", "_text")

    def __init__(self, text: str) -> None:
        self._text = text
        self._digest = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, remote: Remote, keys: tuple[bytes, ...], *arguments: Part) -> Any:
        """The script's reply."""
        try:
            return await remote.call(keys[0], "EVALSHA", self._digest, len(keys), *keys, *arguments)
        except CacheRefused as refusal:
            if not refusal.message.startswith("NOSCRIPT"):
                raise
            return await remote.call(keys[0], "EVAL", self._text, len(keys), *keys, *arguments)


COMMIT: Final = Script("""
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
""")
RELEASE: Final = Script("if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0")
RENEW: Final = Script("""
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('PEXPIRE', KEYS[1], ARGV[2]) end
return 0
""")


class Lease:
    """The right to load and write one entry. The names are those of the generation in which it was taken."""

    __slots__ = ("__weakref__", "entry_name", "name", "token")

    def __init__(self, entry_name: bytes, name: bytes, token: bytes) -> None:
        self.entry_name = entry_name
        self.name = name
        self.token = token


class Right(enum.Enum):
    """What a caller without a lease may do with a value."""

    ENOUGH = "the shared tier had what was asked for"
    HELD = "another loader is at work, and the caller did not want to wait"
    OVERDUE = "another loader is at work for too long: load, and keep nothing"
    ALONE = "the shared tier is away: load, and keep the value in memory only"


class Claim(NamedTuple):
    """What is shared now, and what the caller may do."""

    envelope: Envelope | None
    right: Lease | Right


class Leases:
    """Takes, renews and gives back the leases of one process."""

    def __init__(
        self, remote: Remote, *, lease_s: float, token: Callable[[], bytes], rng: Callable[[], float]
    ) -> None:
        self._remote = remote
        self._lease_ms = int(lease_s * 1000)
        self._token = token
        self._rng = rng
        # Weakly: a lease that got lost on its way to whoever asked for it must not be renewed for ever.
        self._held: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._renewer: asyncio.Task[None] | None = None
        self._releases: set[asyncio.Task[Any]] = set()

    async def close(self) -> None:
        """Give every lease back, so that nobody waits for this process."""
        if self._renewer is not None:
            self._renewer.cancel()
        for lease in list(self._held):
            self.release(lease)
        tasks = [*self._releases, *([self._renewer] if self._renewer is not None else [])]
        if tasks:
            await asyncio.wait(tasks)

    async def claim(
        self,
        names: tuple[bytes, bytes],
        opened: Callable[[Any], Awaitable[Envelope | None]],
        *,
        is_enough: Callable[[Envelope], bool],
        patience_s: float,
    ) -> Claim:
        """The lease of an entry, or the entry itself as soon as it is good enough.

        `names` are the entry's and its lease's; `opened` makes an envelope of the bytes. With no patience, HELD is the
        answer when another loader is at work.
        """
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + patience_s
        pause_s = POLL_FIRST_S
        while True:
            lease = Lease(*names, self._token())
            try:
                is_held, data = await self._take(lease)
                envelope = await opened(data)
                is_good = envelope is not None and is_enough(envelope)
            except CacheUnavailable:
                self.release(lease)
                return Claim(None, Right.ALONE)
            except BaseException:
                # Cancelled, perhaps, while the command was on its way. Giving back what was never taken does no harm.
                self.release(lease)
                raise
            if is_good:
                if is_held:
                    self.release(lease)
                return Claim(envelope, Right.ENOUGH)
            if is_held:
                return Claim(envelope, lease)
            if patience_s <= 0:
                return Claim(envelope, Right.HELD)
            if loop.time() >= give_up_at:
                return Claim(envelope, Right.OVERDUE)
            await asyncio.sleep(pause_s * (0.5 + self._rng()))
            pause_s = min(pause_s * 1.6, POLL_MAX_S)

    async def _take(self, lease: Lease) -> tuple[bool, Any]:
        """Try for the lease and read the entry in one round trip: what was written just before is not loaded again."""
        taken, data = await self._remote.call_each(
            [
                (lease.name, ("SET", lease.name, lease.token, "NX", "PX", self._lease_ms)),
                (lease.entry_name, ("GET", lease.entry_name)),
            ]
        )
        if isinstance(taken, BaseException):
            raise taken
        if taken is None:
            return False, data
        self._hold(lease)
        return True, data

    async def commit(self, lease: Lease, data: bytes, life_ms: int | None) -> bool:
        """Write the entry if the lease still stands; False if an invalidation or another write came between."""
        self._held.discard(lease)
        life: Part = "" if life_ms is None else life_ms
        done = await COMMIT.run(self._remote, (lease.entry_name, lease.name), lease.token, data, life)
        return bool(done)

    def release(self, lease: Lease) -> None:
        """Give the lease back behind the caller, who may be in the middle of being cancelled."""
        self._held.discard(lease)
        task = asyncio.get_running_loop().create_task(self._quietly(RELEASE, lease))
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    def _hold(self, lease: Lease) -> None:
        self._held.add(lease)
        if self._renewer is None or self._renewer.done():
            self._renewer = asyncio.get_running_loop().create_task(self._renew_while_held())

    async def _renew_while_held(self) -> None:
        while self._held:
            await asyncio.sleep(self._lease_ms / 3000)
            await asyncio.gather(*(self._quietly(RENEW, lease, self._lease_ms) for lease in list(self._held)))

    async def _quietly(self, script: Script, lease: Lease, *arguments: Part) -> None:
        try:
            await script.run(self._remote, (lease.name,), lease.token, *arguments)
        except CacheUnavailable:
            return  # it runs out by itself, and the commit will find it gone
