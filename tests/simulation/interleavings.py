"""One seeded interleaving of loads, writes and invalidations in two or three processes, and what must hold in it.

The source of a loaded key is a number that each invalidation counts up first, as an application writes to its database
and then invalidates. A value is stale when it is below what the number was when an invalidation returned:

- the shared tier never takes such a value (checked at each write that it carries out, while no connection is killed);
- the memory of the process that invalidated never holds one, and its readers never get one that they ask for later;
- when everything has settled, no memory holds one, and no memory differs from the shared tier in any key.

A counted key is updated from what is there, and begins with the number of invalidations where nothing is. No outcome
of an update is below what that number was when an invalidation of whatever process had returned before the update
began.
"""

import asyncio
import random
from collections import defaultdict
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

from msgspec import UNSET

from headrace.cache import Cache, RemoteConfig
from headrace.cache.codec import Codec, Envelope
from headrace.cache.remote import Remote
from headrace.errors import CacheUnavailable
from tests.simulation.simulated_redis import Connection, Idleness, LoopClock, SimulatedRedis, Step

KEYS = ("a", "b")
WRITTEN = ("w", "x")
COUNTED = "n"
ROUND = 1000
"""More than the updates of a run: a count of an earlier round is told from one of a later."""
TAG = "t"
ACTIONS = (
    *("load", "load", "load", "load", "get", "delete", "delete", "tag", "pattern", "clear"),
    *("set", "set", "erase", "count", "count"),
)
ACCIDENT_SHARE = 0.02
LOADED_SHARE = 0.15
"""A load takes as long as several calls of the others, so that they come between."""
SETTLE_S = 2.5
"""Simulated: the heartbeat, the generation check and the bound of unheard changes (1 s) fit in one after the other."""


class Outcome(NamedTuple):
    """What a run was made of."""

    loads: int
    invalidations: int
    refused: int
    """Values that were loaded and not kept, because an invalidation came between."""
    violations: list[str]
    trace: list[str]


class Interleaving:
    """One run. `faults` also kills connections and flushes the server."""

    def __init__(self, seed: int, *, faults: bool = False) -> None:
        self._rng = random.Random(seed)
        self._seed = seed
        self._faults = faults
        self._idleness = Idleness(self._rng, self._steps)
        self._loop = self._idleness.loop
        self._redis = SimulatedRedis(self._loop.time, self._on_written)
        self._clock = LoopClock(self._loop)
        self._codec = Codec()
        self._caches: list[Cache] = []
        self._gates: list[tuple[str, asyncio.Future[None]]] = []
        self._source: dict[str, int] = dict.fromkeys(KEYS, 0)
        self._floor: dict[str, int] = dict.fromkeys(KEYS, 0)
        self._rounds = 0
        self._round_floor = 0
        self._own_round_floor: dict[int, int] = defaultdict(int)
        self._own_floor: dict[tuple[int, str], int] = defaultdict(int)
        self._writes = 0
        self._faults_left = self._rng.randrange(1, 4) if faults else 0
        self._violations: list[str] = []
        self.loads = 0
        self.invalidations = 0
        self.refused = 0

    def run(self) -> Outcome:
        """The whole of it."""
        run = self
        dial_for_real = Remote.dial

        async def dial(remote: Remote, address: Any, wire: Any) -> Any:
            number = next((n for n, cache in enumerate(run._caches) if cache._remote_config is remote._config), None)
            if number is None:  # a cache of another test, in a thread of its own
                return await dial_for_real(remote, address, wire)
            connection = Connection(run._redis, f"p{number}", wire)
            run._redis.connections.append(connection)
            wire.connection_made(connection)
            return connection

        try:
            with patch.object(Remote, "dial", dial):
                self._loop.run_until_complete(self._live())
        finally:
            self._loop.close()
        return Outcome(self.loads, self.invalidations, self.refused, self._violations, self._idleness.trace)

    async def _live(self) -> None:
        for number in range(self._rng.randrange(2, 4)):
            remote = RemoteConfig(url="redis://simulated")
            rng = random.Random(self._seed * 8 + number)
            self._caches.append(Cache(remote=remote, clock=self._clock, rng=rng))
        for cache in self._caches:
            await cache.open()
        async with asyncio.TaskGroup() as actors:
            for number in range(self._rng.randrange(3, 6)):
                actors.create_task(self._act(number % len(self._caches)))
        self._faults_left = 0
        await asyncio.sleep(SETTLE_S)
        self._check_settled()
        self.refused = sum(cache.statistics().installs_refused for cache in self._caches)
        for cache in self._caches:
            await cache.close()

    # -- what may happen ----------------------------------------------------------------------------------------------

    def _steps(self) -> list[Step]:
        if self._faults_left and self._rng.random() < ACCIDENT_SHARE:
            self._faults_left -= 1
            return [*(connection.kill for connection in self._redis.connections), self._redis.flush]
        waiting = [gate for gate in self._gates if " loading " not in gate[0] or self._rng.random() < LOADED_SHARE]
        return self._redis.steps() + [partial(self._open, gate) for gate in waiting]

    def _open(self, gate: tuple[str, asyncio.Future[None]]) -> str:
        self._gates.remove(gate)
        if not gate[1].done():
            gate[1].set_result(None)
        return f"{gate[0]} goes on"

    async def _pause(self, who: str) -> None:
        gate = (who, self._loop.create_future())
        self._gates.append(gate)
        await gate[1]

    async def _act(self, process: int) -> None:
        for _ in range(self._rng.randrange(2, 6)):
            await self._pause(f"p{process}")
            action = self._rng.choice(ACTIONS)
            self._idleness.trace.append(f"p{process} {action} begins")
            await self._do(process, action)
            self._idleness.trace.append(f"p{process} {action} returned")
            self._check_own(process)

    async def _do(self, process: int, action: str) -> None:
        cache = self._caches[process]
        key = self._rng.choice(KEYS)
        match action:
            case "load":
                await self._load(process, key)
            case "get":
                await cache.get(key)
                await cache.get(self._rng.choice((*WRITTEN, COUNTED)))
            case "set":
                self._writes += 1
                tags = self._rng.choice([(), (TAG,)])
                await cache.set(self._rng.choice(WRITTEN), self._writes, tags=tags)
            case "erase":
                await cache.delete(self._rng.choice(WRITTEN))
            case "count":
                await self._count(process)
            case _:
                await self._invalidate(process, action, key)

    async def _load(self, process: int, key: str) -> None:
        cache = self._caches[process]
        floor = self._own_floor[process, key]

        async def load() -> int:
            self.loads += 1
            value = self._source[key]
            self._idleness.trace.append(f"p{process} reads {key}={value} from the source")
            await self._pause(f"p{process} loading {key}")
            return value

        value = await cache.get_or_load(key, load, tags=(TAG,) if key == "b" else ())
        if value < floor:
            self._violations.append(
                f"p{process} was given {key}={value} after it had invalidated what is below {floor}"
            )

    async def _count(self, process: int) -> None:
        # With connections killed, what another process invalidated may still be on its way when it returns there.
        floor = self._own_round_floor[process] if self._faults else self._round_floor

        def count(old: Any) -> int:
            return self._rounds * ROUND if old is UNSET else old + 1

        try:
            value = await self._caches[process].update(COUNTED, count, tags=(TAG,))
        except CacheUnavailable:
            return
        if value < floor:
            self._violations.append(f"p{process} counted {value} after what is below {floor} was invalidated")

    async def _invalidate(self, process: int, action: str, key: str) -> None:
        cache = self._caches[process]
        self.invalidations += 1
        self._rounds += 1
        reached = self._rounds * ROUND
        keys = {"delete": (key,), "tag": ("b",), "pattern": (key,)}.get(action, KEYS)
        wanted = {}
        for each in keys:
            self._source[each] += 1
            wanted[each] = self._source[each]
        self._idleness.trace.append(f"the source becomes {wanted}")
        match action:
            case "delete":
                await cache.delete(key)
            case "tag":
                await cache.invalidate_tag(TAG)
            case "pattern":
                await cache.invalidate_pattern(f"{key}*")
            case _:
                await cache.clear()
        if action in {"tag", "clear"}:
            self._round_floor = max(self._round_floor, reached)
            self._own_round_floor[process] = max(self._own_round_floor[process], reached)
        for each, value in wanted.items():
            self._floor[each] = max(self._floor[each], value)
            self._own_floor[process, each] = max(self._own_floor[process, each], value)

    # -- what must hold -----------------------------------------------------------------------------------------------

    def _shared(self, key: str) -> Envelope | None:
        """What the shared tier would answer with."""
        generation = self._redis.get(b"headrace:@generation") or b""
        data = self._redis.get(b"headrace:%b:{%b}" % (generation, key.encode()))
        envelope = self._codec.open(key, data) if data is not None else None
        if not isinstance(envelope, Envelope):
            return None
        valid = all(self._redis.get(b"headrace:@tag:" + tag.encode()) == token for tag, token in envelope.tags)
        return envelope if valid else None

    def _on_written(self, name: bytes, _: bytes) -> None:
        if self._faults or not name.endswith(b"}") or b"@lease" in name:
            return
        for key in KEYS:
            found = self._shared(key)
            if found is not None and found.value < self._floor[key]:
                self._violations.append(f"the shared tier took {key}={found.value}, the floor is {self._floor[key]}")

    def _check_own(self, process: int) -> None:
        cache = self._caches[process]
        for key in KEYS:
            entry = cache.entry_lookup(key)
            if entry is not None and entry.value < self._own_floor[process, key]:
                self._violations.append(
                    f"p{process} holds {key}={entry.value} after invalidating below {self._own_floor[process, key]}"
                )

    def _check_settled(self) -> None:
        for number, cache in enumerate(self._caches):
            for key in (*KEYS, *WRITTEN, COUNTED):
                entry, shared = cache.entry_lookup(key), self._shared(key)
                if entry is None or entry.fresh_until <= self._loop.now:
                    continue
                if shared is None or shared.value != entry.value:
                    theirs = None if shared is None else shared.value
                    self._violations.append(f"settled: p{number} holds {key}={entry.value}, shared is {theirs}")
        for key in KEYS:
            held = [cache.entry_lookup(key) for cache in self._caches]
            values = [entry.value for entry in held if entry is not None and entry.fresh_until > self._loop.now]
            values += [shared.value] if (shared := self._shared(key)) is not None else []
            if any(value != self._source[key] for value in values):
                self._violations.append(f"settled: {key} is {values} and its source {self._source[key]}")


def report(seed: int, outcome: Outcome) -> str:
    """A failed run, for people."""
    return "\n".join([f"seed {seed}:", *outcome.violations, "events:", *(f"  {line}" for line in outcome.trace)])
