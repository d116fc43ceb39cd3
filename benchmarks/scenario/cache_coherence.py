"""The cache's coherence in the long: simulated interleavings, and real processes on servers to which things happen.

    python -m benchmarks.scenario.cache_coherence interleavings [--count 10000] [--first 0] [--faults]
    python -m benchmarks.scenario.cache_coherence processes [--operations 100000] [--only NAME ...]
    python -m benchmarks.scenario.cache_coherence outage [--seconds 30]
    python -m benchmarks.scenario.cache_coherence cluster [--operations 100000]

From the root of a checkout. Prints counts; exits with 1 on a stale install, a difference or an unexpected error, with
what is needed to see it again. `cluster` needs redis-server 7.0 or newer.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

from headrace.clock import SystemClock
from tests.cache_fleets import (
    Fleet,
    Report,
    SlotMoves,
    fail_over,
    fetch_from,
    fetch_from_cluster,
    kill_calls,
    kill_tracking,
    restart,
    stopped,
)
from tests.redis_servers import HAS_CLUSTERS, RedisCluster, RedisServer
from tests.simulation.interleavings import Interleaving, report

FAULTS: dict[str, tuple[Callable[[RedisServer], object] | None, float]] = {
    "quiet": (None, 0.1),
    "tracking-kills": (kill_tracking, 0.05),
    "call-kills": (kill_calls, 0.1),
    "flushes": (lambda server: server.call("FLUSHALL"), 0.1),
    "restarts": (restart, 1.0),
}
CLUSTER_KEYS = [f"k:{number}" for number in range(200)]
TOLD = {"set strict cache-unavailable"}
"""Only a write that asked to be told of an outage is."""
now = SystemClock.monotonic


def interleavings(options: argparse.Namespace) -> bool:
    started = now()
    loads = invalidations = refused = events = 0
    for seed in range(options.first, options.first + options.count):
        outcome = Interleaving(seed, faults=options.faults).run()
        if outcome.violations:
            print(report(seed, outcome))
            return False
        loads += outcome.loads
        invalidations += outcome.invalidations
        refused += outcome.refused
        events += len(outcome.trace)
    print(
        f"{options.count} interleavings{' with faults' if options.faults else ''} in {now() - started:.1f} s: "
        f"{events} events, {loads} loads, {invalidations} invalidations, {refused} installs refused, 0 stale installs"
    )
    return True


def told(name: str, result: Report, started: float) -> bool:
    print(
        f"{name:15} {result.operations} operations in {now() - started:.1f} s, {result.faults} faults, "
        f"{len(result.differences)} differences in {result.compared} compared values, "
        f"slowest call {result.slowest_s:.2f} s, errors {dict(result.errors)}",
        flush=True,
    )
    print(*result.differences[:20], sep="\n", end="\n" if result.differences else "")
    return not result.differences and result.compared > 0 and set(result.errors) <= TOLD


def processes(options: argparse.Namespace) -> bool:
    good = True
    for name in options.only or FAULTS:
        fault, every_s = FAULTS[name]
        with tempfile.TemporaryDirectory(prefix="hr") as directory:
            server = RedisServer(Path(directory)).start()
            fleet = Fleet(server.url, fetch=fetch_from(server))
            act = None if fault is None else lambda fault=fault, server=server: fault(server)
            try:
                started = now()
                good &= told(name, fleet.run(options.operations, faults=act, every_s=every_s), started)
            finally:
                fleet.stop()
                server.stop()
    return good


def outage(options: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        server = RedisServer(Path(directory)).start()
        fleet = Fleet(server.url, fetch=fetch_from(server))
        try:
            started = now()
            result = fleet.run_through(lambda: stopped(server, options.seconds))
            return told(f"{options.seconds:g} s outage", result, started)
        finally:
            fleet.stop()
            server.stop()


def cluster(options: argparse.Namespace) -> bool:
    if not HAS_CLUSTERS:
        print("skipped: clusters are put together with redis-server 7.0 or newer")
        return True
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        servers = RedisCluster(Path(directory), primaries=3, replicas=1)
        try:
            servers.start()
            fleet = Fleet(servers.url, fetch=fetch_from_cluster(servers))
            try:
                move = SlotMoves(servers, CLUSTER_KEYS)
                # A failover now and then between the moves.
                turns = cycle([move] * 20 + [lambda: fail_over(servers)])
                started = now()
                result = fleet.run(options.operations, faults=lambda: next(turns)(), every_s=0.1)
                return told("cluster 3+3", result, started)
            finally:
                fleet.stop()
        finally:
            servers.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("interleavings")
    verb.add_argument("--count", type=int, default=10_000)
    verb.add_argument("--first", type=int, default=0)
    verb.add_argument("--faults", action="store_true")
    verb.set_defaults(run=interleavings)
    verb = verbs.add_parser("processes")
    verb.add_argument("--operations", type=int, default=100_000)
    verb.add_argument("--only", nargs="*", choices=FAULTS)
    verb.set_defaults(run=processes)
    verb = verbs.add_parser("outage")
    verb.add_argument("--seconds", type=float, default=30.0)
    verb.set_defaults(run=outage)
    verb = verbs.add_parser("cluster")
    verb.add_argument("--operations", type=int, default=100_000)
    verb.set_defaults(run=cluster)
    options = parser.parse_args()
    return 0 if options.run(options) else 1


if __name__ == "__main__":
    sys.exit(main())
