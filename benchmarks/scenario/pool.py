"""How well a pool's connections are used: `statistics().shards[...].efficiency` beside what callers waited.

    python -m benchmarks.scenario.pool [--seconds 5] [--connections 4] [--clients 2,4,8,16,32]

From the root of a checkout. Each client writes one row after the other, each write a transaction of its own with its
commit on disk. Shown are the rate, the busy share of the opened connection-seconds, the 99th percentile of waiting for
a connection, and whether that was within `wait_p99_max_s`: above it the work counts as idle. The server is started
here, on a Unix socket, and stopped.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.embedded import EmbeddedPostgres, started

LIMIT_S = 0.1


async def measure(url: str, *, connections: int, clients: int, seconds: float) -> str:
    """One line of the table."""
    shards = (ShardConfig(name="shard-0", dsn=url),)
    config = DatabaseConfig(shards=shards, connections_max=connections, wait_p99_max_s=LIMIT_S)
    async with Database(config) as database:
        await database.execute("CREATE TABLE IF NOT EXISTS written (n int)")
        ends, done = time.monotonic() + seconds, 0

        async def client() -> None:
            nonlocal done
            while time.monotonic() < ends:
                await database.execute("INSERT INTO written VALUES ($1)", done)
                done += 1

        await asyncio.gather(*(client() for _ in range(clients)))
        used = database.statistics().shards["shard-0"]
    share, wait_ms = (used.efficiency or 0.0) * 100, (used.wait_p99_s or 0.0) * 1000
    return f"{clients:>7}  {used.connections:>11}  {done / seconds:>8.0f}  {share:>10.1f} %  {wait_ms:>11.2f} ms"


def main() -> int:
    """Run all and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--connections", type=int, default=4)
    parser.add_argument("--clients", default="2,4,8,16,32")
    options = parser.parse_args()
    print("clients  connections  writes/s    efficiency       wait p99", flush=True)
    with tempfile.TemporaryDirectory() as directory, started(EmbeddedPostgres(Path(directory), name="pool")) as server:
        for clients in map(int, options.clients.split(",")):
            measuring = measure(server.url, connections=options.connections, clients=clients, seconds=options.seconds)
            print(asyncio.run(measuring), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
