"""One process of a fleet over one shared cache: does random operations when told so, and says what is in its memory.

    python coherence_process.py URL NUMBER writer|reader [TIMEOUT]

One JSON command a line on stdin, one JSON answer a line on stdout: `{"do": "run", "operations": n, "without": []}`,
`{"do": "run_until_told"}`, `{"do": "settle"}`, `{"do": "dump"}`, `{"do": "read"}`. While it runs until it is told, a
first line is answered when the outage has been met, and the second one ends the run.
"""

import asyncio
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence

from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy
from headrace.errors import CacheUnavailable, HeadraceError

PING = b"*1\r\n$4\r\nPING\r\n"
TASKS = 8
KEYS = [f"k:{number}" for number in range(200)] + [f"strict:{number}" for number in range(40)]
TAGS = [f"t{number}" for number in range(8)]
POLICIES = [
    CachePolicy(match="strict:*", strategy=Strategy.WRITE_THROUGH, stale_max=0),
    CachePolicy(match="*", stale_max=300),
]
WEIGHTS = {
    "writer": {"get": 30, "load": 25, "set": 25, "get_many": 5, "delete": 12, "tag": 2, "pattern": 0.3, "clear": 0.1},
    "reader": {"get": 60, "load": 30, "get_many": 10},
}
PAUSE_S = 0.002
"""Between two operations when a run lasts until it is told to end, so that the caller's patience is what is tested."""


class Worker:
    def __init__(self, cache: Cache, number: int, role: str) -> None:
        self.cache = cache
        self.number = number
        self.rng = random.Random(number)
        self.weights = WEIGHTS[role]
        self.names = list(self.weights)
        self.written = 0
        self.done: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.slowest_s = 0.0
        self.under_way: set[object] = set()
        self.is_told = asyncio.Event()

    def value(self) -> str:
        self.written += 1
        return f"{self.number}:{self.written}"

    async def operate(self, without: Sequence[str]) -> None:
        name = self.rng.choices(self.names, [0 if name in without else self.weights[name] for name in self.names])[0]
        key = self.rng.choice(KEYS)
        loop, operation = asyncio.get_running_loop(), object()
        started = loop.time()
        self.under_way.add(operation)
        try:
            await self.call(name, key)
        except HeadraceError as error:
            self.errors[f"{name} {key.partition(':')[0]} {error.code}"] += 1
        self.under_way.discard(operation)
        self.done[name] += 1
        self.slowest_s = max(self.slowest_s, loop.time() - started)

    async def call(self, name: str, key: str) -> None:
        cache, rng = self.cache, self.rng
        tags = [TAGS[int(key[-1]) % len(TAGS)]] if key[-1] in "13579" else []
        match name:
            case "get":
                await cache.get(key)
            case "get_many":
                await cache.get_many(rng.sample(KEYS, 5))
            case "load":
                await cache.get_or_load(key, self.load, tags=tags)
            case "set":
                await cache.set(key, self.value(), tags=tags)
            case "delete":
                await cache.delete(key)
            case "tag":
                await cache.invalidate_tag(rng.choice(TAGS))
            case "pattern":
                await cache.invalidate_pattern(f"*:{rng.randrange(10)}*")
            case "clear":
                await cache.clear()

    async def load(self) -> str:
        value = self.value()
        await asyncio.sleep(self.rng.random() * 0.004)
        return value

    async def run(self, operations: int | None, without: Sequence[str] = ()) -> dict[str, object]:
        """So many operations, or as many as come before one is told to end."""
        left = operations
        self.done.clear()
        self.errors.clear()
        self.slowest_s = 0.0

        async def go_on() -> None:
            nonlocal left
            while left is None or left > 0:
                if left is not None:
                    left -= 1
                elif self.is_told.is_set():
                    return
                else:
                    await asyncio.sleep(PAUSE_S)
                await self.operate(without)
                await asyncio.sleep(0)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(TASKS):
                tasks.create_task(go_on())
        return {"done": dict(self.done), "errors": dict(self.errors), "slowest_s": self.slowest_s}

    async def listen(self) -> None:
        """Say when no operation of now is under way any more and, if writes are made, one was refused; then wait for
        the end."""
        await asyncio.to_thread(sys.stdin.readline)
        before = set(self.under_way)
        async with asyncio.timeout(60):
            while before & self.under_way or ("set" in self.names and not self.errors):
                await asyncio.sleep(PAUSE_S)
        print(json.dumps({"met": True}), flush=True)
        await asyncio.to_thread(sys.stdin.readline)

    async def settle(self) -> dict[str, object]:
        """Return when everything is connected, nothing is owed and nothing is in doubt."""
        async with asyncio.timeout(60):
            while not await self.is_settled():
                await asyncio.sleep(0.02)
        return {"settled": True}

    async def is_settled(self) -> bool:
        shared = self.cache._shared
        tracking = shared._tracking
        try:
            for channel in tracking._channels.values():
                await channel.call(PING)  # it is answered behind the pushes that were on their way
        except CacheUnavailable:
            return False
        if tracking._check is not None:
            await asyncio.wait([tracking._check])
        await shared.learn_generation()
        return shared.is_available and tracking._whole and not shared._deferred.is_owed

    def dump(self) -> dict[str, object]:
        """What memory would answer with at once."""
        now = self.cache.now()
        found = {key: self.cache.entry_lookup(key) for key in KEYS}
        return {key: entry.value for key, entry in found.items() if entry is not None and entry.attention_at > now}

    async def obey(self, command: dict[str, object]) -> dict[str, object]:
        match command:
            case {"do": "run", "operations": operations, **more}:
                return await self.run(operations, more.get("without", ()))
            case {"do": "run_until_told"}:
                self.is_told.clear()
                told = asyncio.get_running_loop().create_task(self.listen())
                told.add_done_callback(lambda _: self.is_told.set())
                done = await self.run(None)
                await told
                return done
            case {"do": "settle"}:
                return await self.settle()
            case {"do": "dump"}:
                return self.dump()
            case {"do": "read"}:
                return await self.cache.get_many(KEYS)
        raise ValueError(command)


async def main(url: str, number: str, role: str, *timeout_s: str) -> None:
    patience = {name: float(seconds) for seconds in timeout_s for name in ("timeout", "connect_timeout")}
    remote = RemoteConfig(url=url, reconnect_wait_max=0.5, lease=1.0, lease_wait_max=5.0, **patience)
    async with Cache(remote=remote, policies=POLICIES) as cache:
        worker = Worker(cache, int(number), role)
        print(json.dumps({"ready": True}), flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps(await worker.obey(json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
