"""The door of the cache: a hit of `get_or_load` and of `@cached`, and plain awaited gets of many tasks over Redis.

    python benchmarks/micro/cache_door.py [hit|remote]

Every figure is the best of several rounds in this process, next to what it is compared with in the same run: a no-op
that is awaited and a dict lookup for the hit, redis-py (one by one, and its explicit pipeline) for the remote gets, by
as many tasks. The Redis server is started here, on a Unix socket, and stopped by pid.
"""

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import redis.asyncio

from headrace.cache import Cache, CachePolicy, RemoteConfig
from headrace.clock import SystemClock
from headrace.embedded.binaries import find_redis

ROUNDS = 7
CALLS = 50_000
TASKS = 64
GETS_A_TASK = 1000
now = SystemClock.monotonic


async def best_ns(work: Callable[[], Awaitable[object]], calls: int) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        started = now()
        await work()
        best = min(best, (now() - started) / calls)
    return best * 1e9


async def repeated(call: Callable[[], Awaitable[object]]) -> None:
    for _ in range(CALLS):
        await call()


async def measure_hit(cache: Cache) -> None:  # noqa: C901 - one loop for each thing that is measured, written out
    async def load() -> int:
        return 1

    @cache.cached("user:{user_id}")
    async def user(user_id: int) -> int:
        return user_id

    await user(7)
    await cache.get_or_load("k", load)
    # Written out: a call through `repeated` would cost what is to be measured.
    table, lookup = {"k": 1}.get, cache.memory.get

    async def dict_get() -> None:
        for _ in range(CALLS):
            table("k")

    async def memory_get() -> None:
        for _ in range(CALLS):
            lookup("k")

    async def get_or_load() -> None:
        for _ in range(CALLS):
            await cache.get_or_load("k", load)

    async def decorated() -> None:
        for _ in range(CALLS):
            await user(7)

    for name, work in (
        ("dict.get", dict_get),
        ("MemoryCache.get", memory_get),
        ("awaited no-op", lambda: repeated(load)),
        ("get_or_load", get_or_load),
        ("@cached", decorated),
    ):
        print(f"{name:>18} {await best_ns(work, CALLS):10.0f} ns")


async def in_tasks(get: Callable[[str], Awaitable[object]], names: Sequence[str], gets: int) -> None:
    async def task(number: int) -> None:
        for step in range(gets):
            await get(names[(number * 7 + step) % len(names)])

    await asyncio.gather(*(task(number) for number in range(TASKS)))


async def in_pipelines(client: redis.asyncio.Redis, names: Sequence[str], rounds: int) -> None:
    for _ in range(rounds):
        pipeline = client.pipeline(transaction=False)
        for name in names:
            pipeline.get(name)
        await pipeline.execute()


async def measure_remote(url: str) -> None:
    client = redis.asyncio.Redis.from_url(url)
    keys = [f"user:{number}" for number in range(1000)]
    async with Cache(memory=None, remote=RemoteConfig(url=url)) as cache:
        await cache.set_many({key: {"name": "Ada", "tags": ["a", "b"], "n": 12345} for key in keys})
        names = [name async for name in client.scan_iter(match="headrace:*{*}", count=2000)]
        few = GETS_A_TASK // 10
        for name, work, calls in (
            ("redis-py get", lambda: in_tasks(client.get, names, few), TASKS * few),
            ("redis-py pipeline", lambda: in_pipelines(client, names[:TASKS], few), TASKS * few),
            ("Cache.get", lambda: in_tasks(cache.get, keys, GETS_A_TASK), TASKS * GETS_A_TASK),
            ("Cache.get_many", lambda: cache.get_many(keys), len(keys)),
        ):
            print(f"{name:>18} {1e9 / await best_ns(work, calls):10,.0f} gets/s")
    await client.aclose()


async def main(what: str) -> None:
    binary = find_redis()
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        path = Path(directory) / "redis.sock"
        server = subprocess.Popen(
            [str(binary.path), "--port", "0", "--unixsocket", str(path), "--save", ""], stdout=subprocess.DEVNULL
        )
        try:
            while not path.exists():
                await asyncio.sleep(0.01)
            url = f"unix://{path}"
            if what in {"all", "hit"}:
                policies = [CachePolicy(match="other:*"), CachePolicy(match="*", ttl=600)]
                async with Cache(remote=RemoteConfig(url=url), policies=policies) as cache:
                    await measure_hit(cache)
            if what in {"all", "remote"}:
                await measure_remote(url)
        finally:
            server.kill()
            server.wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "all"))
