"""The query cache's promise in the long: four writers, two of them outside headrace, and what may go wrong.

    python -m benchmarks.scenario.query_cache [--count 100000] [--staleness-ms 250] [--major 16] [--only NAME ...]

From the root of a checkout. `--count` reads for each scenario, by four readers over two caches with one Redis. Prints
counts; exits with 1 if a read was older than promised, or lacked a write of its own process.
"""

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from headrace.database import QueryPolicy
from headrace.embedded import EmbeddedPostgres, started
from headrace.testing import TcpProxy
from tests.redis_servers import RedisServer
from tests.stale_reads import Report, Run, cut_all, flush, freeze_decoding, kill_decoding, mute_all

SCENARIOS = ("quiet", "decoding killed", "decoding frozen", "network cut", "network mute", "redis flushed")


def socket_of(url: str) -> str:
    """The path of the socket that an embedded Postgres listens on."""
    query = parse_qs(urlsplit(url).query)
    return f"{query['host'][0]}/.s.PGSQL.{query['port'][0]}"


async def run_scenario(name: str, url: str, redis: RedisServer, policy: QueryPolicy, count: int) -> Report:
    """One scenario, through a proxy that can fail."""
    async with TcpProxy(socket_of(url)) as proxy:
        dsn = f"postgresql://headrace@{proxy.address}/headrace"
        faults: dict[str, Callable[[], object]] = {
            "quiet": lambda: None,
            "decoding killed": lambda: kill_decoding(url),
            "decoding frozen": lambda: freeze_decoding(url),
            "network cut": lambda: cut_all(proxy),
            "network mute": lambda: mute_all(proxy),
            "redis flushed": lambda: flush(redis),
        }
        return await Run(dsn, url, redis, policy).run(count, fault=faults[name](), every_s=1.0)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--staleness-ms", type=float, default=250.0)
    parser.add_argument("--major", type=int, default=16)
    parser.add_argument("--only", nargs="*", choices=SCENARIOS)
    options = parser.parse_args()
    policy = QueryPolicy(staleness_max=options.staleness_ms / 1000, ttl=60.0)
    is_good = True
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        redis = RedisServer(Path(directory) / "redis").start()
        try:
            with started(EmbeddedPostgres(Path(directory) / "pg", name="pg", major=options.major)) as postgres:
                for name in options.only or SCENARIOS:
                    report = asyncio.run(run_scenario(name, postgres.url, redis, policy, options.count))
                    is_good &= not report.stale and not report.unseen
                    print(
                        f"{name:16} {report.reads} reads in {report.seconds:.0f} s, {report.hits} hits, "
                        f"{report.loads} loads, {report.writes} writes, {report.faults} faults, "
                        f"{len(report.stale)} older than {policy.staleness_max * 1000:g} ms, "
                        f"{len(report.unseen)} without an own write, most behind {report.oldest_s * 1000:.0f} ms, "
                        f"errors {dict(report.errors)}",
                        flush=True,
                    )
                    print(*(report.stale + report.unseen)[:5], sep="\n", end="")
        finally:
            redis.stop()
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
