"""A primary is killed under load and its standby promoted: what became of every write, and what the other shard felt.

    python -m benchmarks.scenario.failover [--runs 3] [--seconds 3]

From the root of a checkout. Two shards, 200 single-row writes a second to each; the first has a synchronous standby.
After `--seconds` all processes of its primary are killed at once, and the standby is promoted by `pg_promote`, as an
HA manager would; the writes go on as long again. Counted are the rows that are there against the writes that were
acknowledged, refused and unknown. `lost` and `twice` must be 0; the exit status is 1 if they are not. `gap` is the
longest time without an acknowledged write on the shard that moved, from the kill on. The other shard's p99 is told
before the kill and after it. Each run is made with `resolve_unknown` off and on.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from headrace.database import Database, DatabaseConfig
from tests.failovers import Load, Pair, ask, kill, pair, writing

HEADER = "resolve  grouped  acknowledged  refused  unknown  resolved  lost  twice  gap s  other p99 ms before / after"


def p99_ms(took_s: list[float]) -> float:
    """The 99th percentile, in milliseconds."""
    return sorted(took_s)[len(took_s) * 99 // 100] * 1000


async def fail_over(servers: Pair, seconds: float, *, resolve: bool, grouped: bool) -> tuple[str, bool]:
    """One run: its line, and whether nothing was lost or doubled."""
    load, beside = Load(), Load()
    config = DatabaseConfig(shards=servers.shards, connections_max=8, resolve_unknown=resolve)
    async with Database(config) as database:
        moving, still = (
            next(key for key in map(str, range(1000)) if database.locate(key).shard == name)
            for name in ("moving", "still")
        )
        async with writing(database, moving, load, grouped=grouped), writing(database, still, beside, grouped=grouped):
            await asyncio.sleep(seconds)
            killed_at, count, before = time.monotonic(), len(beside.took_s), len(load.acknowledged)
            await asyncio.to_thread(kill, servers.first)
            await asyncio.to_thread(ask, servers.second, "SELECT pg_promote()")
            while len(load.acknowledged) == before:
                await asyncio.sleep(0.01)
            gap = time.monotonic() - killed_at
            await asyncio.sleep(seconds)
        resolved = database.statistics().shards["moving"].resolved
    found = Counter(n for (n,) in await asyncio.to_thread(ask, servers.second, "SELECT n FROM notes"))
    lost, twice = len(load.acknowledged - found.keys()), sum(times > 1 for times in found.values())
    counts = (len(load.acknowledged), len(load.refused), len(load.unknown), resolved, lost, twice)
    switches = ["on" if each else "off" for each in (resolve, grouped)]
    line = "{:<7}  {:<7}  {:>12}  {:>7}  {:>7}  {:>8}  {:>4}  {:>5}".format(*switches, *counts)
    others = f"{p99_ms(beside.took_s[:count]):.1f} / {p99_ms(beside.took_s[count:]):.1f}"
    others += "" if len(beside.acknowledged) == len(beside.took_s) and not beside.unknown | beside.refused else " (!)"
    return f"{line}  {gap:>5.2f}  {others}", not lost and not twice


def main() -> int:
    """Run all and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    options = parser.parse_args()
    print(HEADER, flush=True)
    well = True
    for _ in range(options.runs):
        for resolve in (False, True):
            for grouped in (False, True):
                with tempfile.TemporaryDirectory() as directory, pair(Path(directory), synchronous=True) as servers:
                    line, is_well = asyncio.run(fail_over(servers, options.seconds, resolve=resolve, grouped=grouped))
                print(line, flush=True)
                well = well and is_well
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
