"""Nodes on one queue in the long: as many simulated lives as one likes, in which everything fails that can.

    python -m benchmarks.scenario.agent_nodes [--count 10000] [--first 0]

From the root of a checkout. Prints counts; exits with 1 at the first life in which a promise was broken, with what is
needed to see it again.
"""

import argparse
import sys
from collections import Counter

from headrace.clock import SystemClock
from tests.simulation.node_failures import Life, report

now = SystemClock.monotonic


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    options = parser.parse_args()
    started = now()
    ends, faults, beginnings = Counter[str](), Counter[str](), 0
    for seed in range(options.first, options.first + options.count):
        outcome = Life(seed).run()
        if outcome.violations:
            print(report(seed, outcome))
            return 1
        ends += outcome.ends
        faults += outcome.faults
        beginnings += outcome.beginnings
    print(
        f"{options.count} lives in {now() - started:.1f} s: {beginnings} beginnings, {dict(ends)}, "
        f"{dict(faults)}, 0 broken promises"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
