"""What it costs to observe one request, and to fold what all processes observed.

    python -m benchmarks.micro.observe [--rounds 5] [--calls 200000] [--json FILE]

One request observed is a histogram and a counter, both bound to their labels beforehand, in memory that other
processes read. Each figure is the median of rounds, each round a process of its own, and the rounds of all rows
alternate, so that a noisy neighbour hits all of them. The call of an empty function, which every row pays, is measured
the same way and shown, not subtracted. Peers run where they are installed (`pip install prometheus-client ddsketch`)
and are skipped with the reason where not.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import headrace
from headrace.clock import SystemClock
from tests.sources import prefer_sources

DURATIONS_S = [0.0004 * 1.37 ** (step % 20) for step in range(1_000)]
LIMIT_NS = 500.0
now = SystemClock.monotonic


class Skipped(Exception):
    """A row that cannot be measured here, and why."""


def a_call_ns(calls: int, function: Callable[[float], object]) -> float:
    """Nanoseconds of one call, over durations from 0.4 to 160 ms."""
    rounds = calls // len(DURATIONS_S)
    for duration in DURATIONS_S:
        function(duration)
    begun = now()
    for _ in range(rounds):
        for duration in DURATIONS_S:
            function(duration)
    return (now() - begun) / (rounds * len(DURATIONS_S)) * 1e9


def nothing(calls: int) -> float:
    return a_call_ns(calls, lambda _seconds: None)


def load_headrace(form: str) -> None:
    """Decide, before the monitor is imported, which form of it is."""
    if form == "plain":
        prefer_sources(Path(headrace.__file__).parent)
    from headrace.monitor import counters

    if form == "compiled" and str(counters.__file__).endswith(".py"):
        raise Skipped("the hot modules are not compiled: `make compile`")


def observed(form: str) -> Callable[[int], float]:
    """A histogram and a counter of ours."""

    def row(calls: int) -> float:
        load_headrace(form)
        from headrace.monitor import Counters

        with tempfile.TemporaryDirectory() as directory:
            counters = Counters.open(Path(directory) / "counters")
            add = counters.counter("requests_total", method="GET", route="/", status="2xx").add
            record = counters.histogram("duration_seconds", method="GET", route="/").record

            def observe(seconds: float) -> None:
                record(seconds)
                add()

            try:
                return a_call_ns(calls, observe)
            finally:
                counters.close()

    return row


def middleware(form: str) -> Callable[[int], float]:
    """What the middleware adds to a request of an application that answers at once."""

    def row(calls: int) -> float:
        load_headrace(form)
        from headrace.monitor import Monitor

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send(START)
            await send(BODY)

        async def send(message: Any) -> None:
            return None

        async def a_request_ns(app: Any) -> float:
            scope = {"type": "http", "method": "GET", "path": "/", "headrace.route": "/"}
            begun = now()
            for _ in range(calls):
                await app(scope, None, send)
            return (now() - begun) / calls * 1e9

        async def added() -> float:
            monitor = Monitor()
            around = monitor.middleware(app)
            await a_request_ns(around)
            try:
                return await a_request_ns(around) - await a_request_ns(app)
            finally:
                monitor.close()

        return asyncio.run(added())

    return row


START = {"type": "http.response.start", "status": 200, "headers": []}
BODY = {"type": "http.response.body", "body": b"hello"}


def fold(form: str) -> Callable[[int], float]:
    """One fold of four processes with thirty endpoints each; told in nanoseconds like the rest."""

    def row(_calls: int) -> float:
        load_headrace(form)
        from headrace.monitor import Counters

        with tempfile.TemporaryDirectory() as directory:
            several = [Counters.open(Path(directory) / "counters") for _ in range(4)]
            for counters in several:
                for number in range(30):
                    histogram = counters.histogram("duration_seconds", route=str(number))
                    for duration in DURATIONS_S:
                        histogram.record(duration)
                    for status in ("2xx", "3xx", "4xx", "5xx"):
                        counters.counter("requests_total", route=str(number), status=status).add()
            several[0].fold()
            begun = now()
            for _ in range(20):
                several[0].fold()
            elapsed = (now() - begun) / 20
            for counters in several:
                counters.close()
            return elapsed * 1e9

    return row


def prometheus(mode: str) -> Callable[[int], float]:
    """The same with prometheus_client, in one process or in its mode for several."""

    def row(calls: int) -> float:
        if importlib.util.find_spec("prometheus_client") is None:
            raise Skipped("prometheus-client is not installed")
        with tempfile.TemporaryDirectory() as directory:
            if mode == "multiprocess":
                os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
            import prometheus_client

            requests = prometheus_client.Counter("requests", "Requests.", ["method", "route", "status"])
            durations = prometheus_client.Histogram("duration_seconds", "Durations.", ["method", "route"])
            add, record = requests.labels("GET", "/", "2xx").inc, durations.labels("GET", "/").observe

            def observe(seconds: float) -> None:
                record(seconds)
                add()

            return a_call_ns(calls, observe)

    return row


def ddsketch(calls: int) -> float:
    """The sketch alone, without a counter and without sharing."""
    if importlib.util.find_spec("ddsketch") is None:
        raise Skipped("ddsketch is not installed")
    from ddsketch import DDSketch

    return a_call_ns(calls, DDSketch(0.01).add)


ROWS: dict[str, Callable[[int], float]] = {
    "an empty call": nothing,
    "headrace, compiled": observed("compiled"),
    "headrace, plain": observed("plain"),
    "prometheus_client": prometheus("single"),
    "prometheus_client, multiprocess": prometheus("multiprocess"),
    "ddsketch alone": ddsketch,
    "headrace middleware, compiled": middleware("compiled"),
    "headrace middleware, plain": middleware("plain"),
    "headrace fold 4 x 30, compiled": fold("compiled"),
    "headrace fold 4 x 30, plain": fold("plain"),
}


def measured(row: str, calls: int) -> float | str:
    """One round of one row in a process of its own: nanoseconds, or why not."""
    command = [sys.executable, "-m", "benchmarks.micro.observe", "--row", row, "--calls", str(calls)]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, text=True, timeout=120).stdout)
    return answer if isinstance(answer, str) else float(answer)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--calls", type=int, default=200_000)
    options.add_argument("--json", type=Path)
    options.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.row:
        try:
            print(json.dumps(ROWS[chosen.row](chosen.calls)))
        except Skipped as reason:
            print(json.dumps(str(reason)))
        return
    rounds = [{row: measured(row, chosen.calls) for row in ROWS} for _ in range(chosen.rounds)]
    results: dict[str, Any] = {}
    for row in ROWS:
        figures = [figure for one in rounds if isinstance(figure := one[row], float)]
        if not figures:
            results[row] = {"skipped": rounds[0][row]}
            print(f"{row:36} skipped: {rounds[0][row]}")
            continue
        median, spread = statistics.median(figures), (min(figures), max(figures))
        results[row] = {"median_ns": median, "min_ns": spread[0], "max_ns": spread[1], "rounds": len(figures)}
        print(f"{row:36} {median:11,.0f} ns   {spread[0]:,.0f} to {spread[1]:,.0f}")
    compiled = results["headrace, compiled"].get("median_ns")
    if compiled is not None:
        print(f"limit {LIMIT_NS:.0f} ns compiled: {'kept' if compiled <= LIMIT_NS else 'MISSED'}")
    if chosen.json:
        chosen.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
