"""What a hit of the query cache costs, and which results are worth their memory.

    python -m benchmarks.micro.query_cache [hit] [worth] [--rounds 101]

From the root of a checkout. `hit`: awaited `fetch(..., cache=QueryPolicy(...))` of a row that is in memory while the
change stream vouches for it, next to a `get` of the same cache and to the same fetch without a cache, in alternating
rounds; on one shard, on two with the key in the call, and on two with the key in the text. `worth`: queries of Zipf
popularity whose costs and sizes differ a thousandfold, through three policies with the same budget of bytes; shown is
the share of the time that the cache saved, and of the calls that it answered.
"""

import argparse
import asyncio
import platform
import random
import statistics
import tempfile
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psycopg

from headrace.build import is_compiled
from headrace.cache import Cache, MemoryCache
from headrace.clock import SystemClock
from headrace.database import Database, DatabaseConfig, QueryPolicy, ShardConfig, Sharded
from headrace.database.query_cache.worth import ENTRY_BYTES, Worth
from headrace.embedded import EmbeddedPostgres, started

CALLS = 100
"""A round is short, so that most fit between two interruptions by others."""
QUERIES = 5000
REQUESTS = 200_000
BUDGETS = (0.01, 0.05, 0.2)
SQL = "SELECT id, name, price FROM items WHERE id = $1"
POLICY = QueryPolicy(staleness_max=1.0, ttl=600.0)
now = SystemClock.monotonic

Call = Callable[[], Awaitable[Any]]


async def timed(call: Call) -> float:
    """Microseconds a call."""
    began = now()
    for _ in range(CALLS):
        await call()
    return (now() - began) / CALLS * 1e6


async def vouched(database: Database, call: Call) -> None:
    """Wait until results live by the stream."""
    async with asyncio.timeout(20):
        while True:
            await call()
            await asyncio.sleep(0.05)
            queries = database.statistics().queries
            assert queries is not None
            if any(shard.invalidation == "change stream" for shard in queries.shards.values()):
                return


async def hits(urls: list[str], rounds: int) -> None:
    one = DatabaseConfig(shards=(ShardConfig(name="one", dsn=urls[0]),))
    tables = {"items": Sharded(key="id")}
    two = DatabaseConfig(
        shards=tuple(ShardConfig(name=name, dsn=url) for name, url in zip("ab", urls[1:], strict=True)), tables=tables
    )
    async with Cache() as cache, Database(one, cache=cache) as single, Database(two, cache=cache) as double:
        await cache.set("item", [(1, "item 1", 0.33)])
        calls: dict[str, Call] = {
            "cache.get alone": lambda: cache.get("item"),
            "cached, one shard": lambda: single.fetch(SQL, 1, cache=POLICY),
            "cached, two shards, key in the call": lambda: double.fetch(SQL, 1, key=1, cache=POLICY),
            "cached, two shards, key in the text": lambda: double.fetch(SQL, 1, cache=POLICY),
            "not cached, one shard": lambda: single.fetch(SQL, 1, read_only=True),
        }
        for name in list(calls)[1:4]:
            await vouched(single if "one" in name else double, calls[name])
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(await timed(call))
        for name, each in times.items():
            low, middle, high = statistics.quantiles(each, n=4)
            print(f"{name:38} {middle:8.2f} us  (quartiles {low:.2f} to {high:.2f})")


def by_worth(budget: int) -> Callable[[int, float, int], bool]:
    worth = Worth(budget)

    def ask(query: int, cost_s: float, size: int) -> bool:
        name = str(query)
        if name in worth:
            worth.use(name)
            return True
        worth.add(name, cost_s=cost_s, size=size)
        return False

    return ask


def by_lru(budget: int) -> Callable[[int, float, int], bool]:
    held: OrderedDict[int, int] = OrderedDict()
    total = 0

    def ask(query: int, _: float, size: int) -> bool:
        nonlocal total
        if query in held:
            held.move_to_end(query)
            return True
        held[query] = size + ENTRY_BYTES
        total += size + ENTRY_BYTES
        while total > budget:
            total -= held.popitem(last=False)[1]
        return False

    return ask


def by_memory_cache(budget: int) -> Callable[[int, float, int], bool]:
    cache = MemoryCache(10**9, ttl=None, weight_max=budget)

    def ask(query: int, _: float, size: int) -> bool:
        if cache.get(query) is not None:
            return True
        cache.set(query, True, weight=size + ENTRY_BYTES)
        return False

    return ask


def worths() -> None:
    rng = random.Random(20)
    # Popularity, cost and size know nothing of each other: 0.1 to 100 ms, 100 bytes to 100 kB.
    queries = [(10 ** rng.uniform(-4, -1), int(10 ** rng.uniform(2, 5))) for _ in range(QUERIES)]
    asked = rng.choices(range(QUERIES), weights=[1 / (rank + 1) ** 0.9 for rank in range(QUERIES)], k=REQUESTS)
    everything = sum(size + ENTRY_BYTES for _, size in queries)
    total_s = sum(queries[query][0] for query in asked)
    subjects = {"GDSF (worth.py)": by_worth, "LRU": by_lru, "MemoryCache, adaptive": by_memory_cache}
    print(f"{'budget of all bytes':24}{'policy':24}{'time saved':>12}{'calls answered':>16}{'us a call':>12}")
    for share in BUDGETS:
        for name, make in subjects.items():
            ask, saved_s, answered = make(int(share * everything)), 0.0, 0
            began = now()
            for query in asked:
                cost_s, size = queries[query]
                if ask(query, cost_s, size):
                    saved_s += cost_s
                    answered += 1
            took_us = (now() - began) / REQUESTS * 1e6
            print(
                f"{share:<24.0%}{name:24}{saved_s / total_s:>12.1%}{answered / REQUESTS:>16.1%}{took_us:>12.2f}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["hit", "worth"])
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    form = "compiled" if is_compiled() else "plain Python"
    print(f"CPython {platform.python_version()}, hot modules {form}")
    if "hit" in options.parts:
        with (
            tempfile.TemporaryDirectory(prefix="hr") as directory,
            started(EmbeddedPostgres(Path(directory) / "one", name="one")) as one,
            started(EmbeddedPostgres(Path(directory) / "a", name="a")) as first,
            started(EmbeddedPostgres(Path(directory) / "b", name="b")) as second,
        ):
            for server in (one, first, second):
                with psycopg.connect(server.url, autocommit=True) as connection:
                    connection.execute("CREATE TABLE items (id bigint PRIMARY KEY, name text, price float8)")
                    connection.execute(
                        "INSERT INTO items SELECT n, 'item ' || n, n / 3.0 FROM generate_series(1, 100) n"
                    )
            asyncio.run(hits([one.url, first.url, second.url], options.rounds))
    if "worth" in options.parts:
        worths()


if __name__ == "__main__":
    main()
