"""The door of the cache next to those of others: hits in memory, and reads from Redis by many tasks, in the same run.

    python -m benchmarks.micro.cache_door [hit] [plain] [remote] [--rounds 9] [--uvloop] [--json FILE]

- hit: awaited hits of a function of one int that is cached for TTL_S, over IDS ids in random order. `get_or_load` is
  shown with keys that exist, and with keys that are spelt in the call as a caller would.
- plain: the same of a plain function.
- remote: reads by TASKS tasks from one Redis with no memory in front, and of TASKS keys in a call. The peers are given
  the bytes; headrace decodes them, checks them and builds the value.

Each peer is set up as its own documentation shows for a cache in memory; peers that are not installed are left out by
name: see benchmarks/peers/requirements-door.txt. The value is a str, which no cache has to copy. Rounds alternate
between the subjects, so that a noisy neighbour hits all of them. Those of hits take SHORT_S for each subject, so that
most fit between two interruptions, and are SHORT_ROUNDS times as many. Shown are the median, half the distance between
the quartiles, and the median over the rounds of the ratio to the subject that is marked 1.00. The Redis server is
started here, on a Unix socket, and stopped by pid.
"""

import argparse
import asyncio
import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import redis.asyncio

from headrace.build import is_compiled
from headrace.cache import Cache, RemoteConfig
from headrace.clock import SystemClock
from headrace.embedded.binaries import find_redis

IDS = 1000
TTL_S = 300
CALLS = 20_000
SHORT_S = 0.002
SHORT_ROUNDS = 20
TASKS = 64
GETS_A_ROUND = 12_800
PARTS = ("hit", "plain", "remote")
VALUE = {"name": "Ada", "tags": ["a", "b"], "n": 12345}
PEERS = ("aiocache", "async-lru", "cachebox", "cashews", "fastapi-cache2", "redis", "theine", "valkey-glide")
now = SystemClock.monotonic
ids = random.Random(1).choices(range(IDS), k=CALLS)
keys = [f"user:{number}" for number in ids]

Figures = dict[str, list[float]]
Turn = Callable[[], Awaitable[float]]
"""One round of a subject: its figure."""
Hits = Callable[[int], Awaitable[float]]
"""So many hits of a subject: nanoseconds a hit."""


runs: list[int] = []
"""The ids that were not answered by a cache."""


async def name_of(user_id: int) -> str:
    """What the async functions are caches of."""
    return plain_name_of(user_id)


def plain_name_of(user_id: int) -> str:
    """What the plain functions are caches of."""
    runs.append(user_id)
    return f"name of {user_id}"


# -- hits in memory ---------------------------------------------------------------------------------------------------


def async_lru_cached() -> Any:
    import async_lru

    return async_lru.alru_cache(maxsize=IDS * 10, ttl=TTL_S)(name_of)


def cachebox_cached(function: Any) -> Any:
    import cachebox

    return cachebox.cached(cachebox.TTLCache(IDS * 10, TTL_S))(function)


def theine_memoized(function: Any) -> Any:
    import theine

    return theine.Memoize(IDS * 10, datetime.timedelta(seconds=TTL_S))(function)


def fastapi_cache_cached() -> Any:
    from fastapi_cache import FastAPICache
    from fastapi_cache.backends.inmemory import InMemoryBackend
    from fastapi_cache.decorator import cache

    FastAPICache.init(InMemoryBackend(), prefix="door")
    return cache(expire=TTL_S)(name_of)


def aiocache_cached(**options: Any) -> Any:
    import aiocache

    return aiocache.cached(ttl=TTL_S, **options)(name_of)


def cashews_cached() -> Any:
    import cashews

    cashews.cache.setup("mem://")
    return cashews.cache(ttl=f"{TTL_S}s", key="user:{user_id}")(name_of)


AWAITED: dict[str, tuple[str, Callable[[], Any]]] = {
    "async_lru": ("async_lru", async_lru_cached),
    "cachebox.cached": ("cachebox", lambda: cachebox_cached(name_of)),
    "theine.Memoize": ("theine", lambda: theine_memoized(name_of)),
    "aiocache.cached": ("aiocache", aiocache_cached),
    # Its default is a timer and a task for each get, which a cache in memory has no use for.
    "aiocache, timeout=0": ("aiocache", lambda: aiocache_cached(timeout=0)),
    "cashews": ("cashews", cashews_cached),
    "fastapi-cache2": ("fastapi_cache", fastapi_cache_cached),
}
PLAIN: dict[str, tuple[str, Callable[[], Any]]] = {
    "cachebox.cached": ("cachebox", lambda: cachebox_cached(plain_name_of)),
    "theine.Memoize": ("theine", lambda: theine_memoized(plain_name_of)),
    "functools.lru_cache": ("functools", lambda: functools.lru_cache(IDS * 10)(plain_name_of)),
}


def is_installed(name: str, module: str) -> bool:
    if importlib.util.find_spec(module):
        return True
    print(f"{name}: not installed, left out", file=sys.stderr)
    return False


async def awaited_ns(function: Callable[[int], Awaitable[object]], calls: int) -> float:
    numbers = ids[:calls]
    started = now()
    for number in numbers:
        await function(number)
    return (now() - started) / calls * 1e9


async def awaited_by_keyword_ns(function: Callable[..., Awaitable[object]], calls: int) -> float:
    numbers = ids[:calls]
    started = now()
    for number in numbers:
        await function(user_id=number)
    return (now() - started) / calls * 1e9


async def called_ns(function: Callable[[Any], object], arguments: Sequence[Any], calls: int) -> float:
    arguments = arguments[:calls]
    started = now()
    for argument in arguments:
        function(argument)
    return (now() - started) / calls * 1e9


async def get_or_load_ns(cache: Cache, calls: int) -> float:
    names = keys[:calls]
    started = now()
    for name in names:
        await cache.get_or_load(name, unexpected)
    return (now() - started) / calls * 1e9


async def get_or_load_spelt_ns(cache: Cache, calls: int) -> float:
    numbers = ids[:calls]
    started = now()
    for number in numbers:
        await cache.get_or_load(f"user:{number}", unexpected)
    return (now() - started) / calls * 1e9


async def unexpected() -> None:
    """The loader of what is there."""
    runs.append(-1)


async def measure_hit(cache: Cache, rounds: int) -> Figures:
    cached = cache.cached("user:{user_id}", ttl=TTL_S)(name_of)
    made = {name: make() for name, (module, make) in AWAITED.items() if is_installed(name, module)}
    for function in (cached, *made.values()):
        for number in range(IDS):
            assert await function(number) == f"name of {number}"
    table = {key: key for key in keys}
    subjects: dict[str, Hits] = {
        "dict.get": partial(called_ns, table.get, keys),
        "awaited no-op": partial(awaited_ns, nothing),
        "Cache.get_or_load": partial(get_or_load_ns, cache),
        'Cache.get_or_load(f"…")': partial(get_or_load_spelt_ns, cache),
        "@cache.cached": partial(awaited_ns, cached),
        "@cache.cached, keyword": partial(awaited_by_keyword_ns, cached),
    }
    subjects |= {name: partial(awaited_ns, function) for name, function in made.items()}
    return await hits_in_turns(subjects, rounds)


async def nothing(user_id: int) -> None:
    """The price of any awaited call."""


async def measure_plain(cache: Cache, rounds: int) -> Figures:
    cached = cache.cached("plain:{user_id}", ttl=TTL_S)(plain_name_of)
    made = {name: make() for name, (module, make) in PLAIN.items() if is_installed(name, module)}
    for function in (cached, *made.values()):
        for number in range(IDS):
            assert function(number) == f"name of {number}"
    table = {number: number for number in ids}
    subjects: dict[str, Hits] = {"dict.get": partial(called_ns, table.get, ids)}
    for name, function in {"@cache.cached": cached, **made}.items():
        subjects[name] = partial(called_ns, function, ids)
    return await hits_in_turns(subjects, rounds)


async def hits_in_turns(subjects: dict[str, Hits], rounds: int) -> Figures:
    """Rounds of the same short time for all, most of which fit between two interruptions by other processes."""
    runs.clear()
    turns: dict[str, Turn] = {}
    for name, figure_of in subjects.items():
        calls = int(SHORT_S / (await figure_of(CALLS) / 1e9))
        turns[name] = partial(figure_of, min(max(calls, 1), CALLS))
    figures = await in_turns(turns, rounds * SHORT_ROUNDS)
    assert not runs, f"{len(runs)} calls were misses: this measures hits"
    return figures


async def in_turns(turns: dict[str, Turn], rounds: int) -> Figures:
    """One figure a subject and round, the subjects in turn."""
    figures: Figures = {name: [] for name in turns}
    for turn in range(rounds + 1):
        for name, figure_of in turns.items():
            figure = await figure_of()
            if turn:
                # The first round warms up.
                figures[name].append(figure)
    return figures


# -- reads from Redis -------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def redis_server() -> AsyncIterator[Path]:
    """The socket of a server that is stopped afterwards."""
    binary = find_redis()
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        path = Path(directory) / "redis.sock"
        server = subprocess.Popen(
            [str(binary.path), "--port", "0", "--unixsocket", str(path), "--save", ""], stdout=subprocess.DEVNULL
        )
        try:
            async with asyncio.timeout(10):
                while not path.exists():
                    await asyncio.sleep(0.01)
            yield path
        finally:
            server.kill()
            server.wait()


async def gets_per_s(get: Callable[[str], Awaitable[object]], names: Sequence[str]) -> float:
    """By TASKS tasks, each with its share of the names."""

    async def task(share: Sequence[str]) -> None:
        for name in share:
            await get(name)

    drawn = random.Random(1).choices(names, k=GETS_A_ROUND)
    started = now()
    await asyncio.gather(*(task(drawn[number::TASKS]) for number in range(TASKS)))
    return GETS_A_ROUND / (now() - started)


async def batches_per_s(get_many: Callable[[list[str]], Awaitable[object]], names: Sequence[str]) -> float:
    """Keys a second by one task that asks for TASKS keys at a time."""
    drawn = random.Random(1).choices(names, k=GETS_A_ROUND)
    batches = [drawn[start : start + TASKS] for start in range(0, GETS_A_ROUND, TASKS)]
    started = now()
    for batch in batches:
        await get_many(batch)
    return GETS_A_ROUND / (now() - started)


async def glide_client(path: Path, stack: AsyncExitStack) -> Any:
    """valkey-glide on the same socket, or None where it is not installed."""
    if not is_installed("valkey-glide", "glide"):
        return None
    import glide

    client = await glide.GlideClient.create(
        glide.GlideClientConfiguration([glide.NodeAddress(unix_socket_path=str(path))], request_timeout=5000)
    )
    stack.push_async_callback(client.close)
    return client


async def measure_remote(path: Path, rounds: int) -> tuple[Figures, Figures]:
    async with AsyncExitStack() as stack:
        url = f"unix://{path}"
        client = await stack.enter_async_context(redis.asyncio.Redis.from_url(url))
        cache = await stack.enter_async_context(Cache(memory=None, remote=RemoteConfig(url=url)))
        glide = await glide_client(path, stack)
        users = [f"user:{number}" for number in range(IDS)]
        await cache.set_many(dict.fromkeys(users, VALUE))
        assert await cache.get_many(users) == dict.fromkeys(users, VALUE)
        # The peers read the very entries that headrace wrote.
        names = [name.decode() async for name in client.scan_iter(match="headrace:*{*}", count=2000)]
        assert len(names) == IDS

        async def in_pipeline(batch: list[str]) -> None:
            pipeline = client.pipeline(transaction=False)
            for name in batch:
                pipeline.get(name)
            await pipeline.execute()

        gets: dict[str, Turn] = {
            "Cache.get": lambda: gets_per_s(cache.get, users),
            "redis-py get": lambda: gets_per_s(client.get, names),
            "redis-py pipeline of 64": lambda: batches_per_s(in_pipeline, names),
        }
        many: dict[str, Turn] = {
            "Cache.get_many": lambda: batches_per_s(cache.get_many, users),
            "redis-py mget": lambda: batches_per_s(client.mget, names),
        }
        if glide is not None:
            gets["valkey-glide get"] = lambda: gets_per_s(glide.get, names)
            many["valkey-glide mget"] = lambda: batches_per_s(glide.mget, names)
        return await in_turns(gets, rounds), await in_turns(many, rounds)


# -- showing ----------------------------------------------------------------------------------------------------------


def show(title: str, unit: str, figures: Figures, reference: str) -> None:
    print(f"\n{title} ({unit})")
    for name, values in figures.items():
        ratio = statistics.median(value / base for value, base in zip(values, figures[reference], strict=True))
        quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [0.0, 0.0, 0.0]
        spread = (quartiles[2] - quartiles[0]) / 2
        print(f"  {name:<24} {statistics.median(values):10,.0f}  ±{spread:<8,.0f} x{ratio:.2f}")


async def main(parts: Sequence[str], rounds: int) -> dict[str, Figures]:
    results: dict[str, Figures] = {}
    async with Cache() as cache:
        if "hit" in parts:
            results["hit"] = await measure_hit(cache, rounds)
            show("hit, awaited", "ns", results["hit"], "@cache.cached")
        if "plain" in parts:
            results["plain"] = await measure_plain(cache, rounds)
            show("hit, plain function", "ns", results["plain"], "@cache.cached")
    if "remote" in parts:
        async with redis_server() as path:
            results["remote"], results["remote, many"] = await measure_remote(path, rounds)
        show(f"get from Redis by {TASKS} tasks", "keys/s", results["remote"], "Cache.get")
        show(f"{TASKS} keys in a call", "keys/s", results["remote, many"], "Cache.get_many")
    return results


def installed_versions() -> dict[str, str]:
    versions = {}
    for name in PEERS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def run() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=", ".join(PARTS))
    arguments.add_argument("--rounds", type=int, default=9)
    arguments.add_argument("--uvloop", action="store_true")
    arguments.add_argument("--json", type=Path)
    options = arguments.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        arguments.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    form = "compiled" if is_compiled() else "plain Python"
    loop = "uvloop" if options.uvloop else "asyncio"
    versions = installed_versions()
    print(f"headrace {form}, {loop}; Python {platform.python_version()}; {versions}")
    factory = None
    if options.uvloop:
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        results = runner.run(main(options.parts, options.rounds))
    if options.json:
        options.json.write_text(json.dumps({"form": form, "loop": loop, "versions": versions, "results": results}))


if __name__ == "__main__":
    run()
