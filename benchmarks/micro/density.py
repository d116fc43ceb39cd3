"""What it takes to hold 50,000 executions in one process, and what it does to the event loop.

    python -m benchmarks.micro.density [--executions 50000] [--seconds 2] [--loop uvloop|asyncio] [--json FILE]

Each row is a fresh process, set up as a worker of `headrace up` is: uvloop, the collector settled, the guard armed.
The agent is a class whose `execute` awaits one future; nothing that a real wait would hold besides (sockets,
TLS, HTTP buffers) is counted. RSS is what the process grew by after its definitions were loaded; tracemalloc is on in
the column of its own alone, which holds 10,000. Loop lag is by how much a timer of 1 ms is late, again and again.

- *bytes*: a caller who awaits `execute` has a task and a frame of his own; so they are counted with him, and again
  when he has left, which ends no execution. A submitted execution has a record too, which is a row of Postgres in a
  service and is in memory here.
- *burst*: one task submits all of them in a loop; all are released at once; then once more, and all are cancelled.
- *distinct*: a definition from another source of 6.7 kB each, deployed and instantiated: compiled, and read from disk.
- *hog*: 200 agents that want to go on every 5 ms, beside one that never awaits, and one that swallows what stops it.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import ModuleType
from typing import Any

import uvloop

from benchmarks.micro.code_cache import source as long_source
from headrace.agents import AgentHost, AgentsConfig, CodeCache
from headrace.agents.stores.memory import MemoryStore
from headrace.clock import SystemClock
from headrace.errors import AgentQuarantined
from headrace.server.garbage import Garbage

TRACED = 10_000
CLOCK = SystemClock()
now = CLOCK.monotonic

PARKED = """
import asyncio

class Agent:
    async def execute(self, input, context):
        gate = asyncio.get_running_loop().create_future()
        gates.append(gate)
        await gate
        return input

gates = []
"""
STEADY = """
import asyncio, time

class Agent:
    async def execute(self, input, context):
        late, end = [], time.monotonic() + input
        while (before := time.monotonic()) < end:
            await asyncio.sleep(0.005)
            late.append(time.monotonic() - before - 0.005)
        return late
"""
SPINS = "async def Agent(input, context):\n    while True: pass"
SWALLOWS = """
async def Agent(input, context):
    while True:
        try:
            while True: pass
        except BaseException:
            pass
"""


class Lag:
    """How late a timer of 1 ms is, in milliseconds, over and over until the block ends."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._probe: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Lag":
        self._probe = asyncio.get_running_loop().create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._probe is not None
        await asyncio.sleep(0.002)
        self._probe.cancel()
        await asyncio.gather(self._probe, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            before = now()
            await asyncio.sleep(0.001)
            self._late.append((now() - before - 0.001) * 1000)

    def figures(self) -> dict[str, float]:
        return {"lag_p99_ms": quantile(self._late, 0.99), "lag_max_ms": max(self._late)}


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def modules() -> list[ModuleType]:
    """The modules of the agents that are loaded, with their gates."""
    return [module for name, module in sys.modules.items() if name.startswith("headrace_agent_")]


def gates() -> list[Any]:
    return [gate for module in modules() for gate in module.gates]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(300):
        while not condition():
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def host_of(definitions: int, **config: Any) -> AsyncIterator[tuple[AgentHost, Garbage]]:
    """A host as in a worker, with agents `0` to `definitions - 1` of one source."""
    settings = AgentsConfig(
        executions_max=200_000, queued_max=200_000, definitions_max=definitions + 10, drain_s=0.1, **config
    )
    store = MemoryStore(clock=CLOCK, executions_max=400_000)
    garbage = Garbage(CLOCK)
    async with AgentHost(settings, store=store, code_cache=CodeCache()) as host:
        for number in range(definitions):
            await host.deploy(str(number), PARKED, version="1.0.0", timeout_s=600.0)
        garbage.settle()
        host.guard.arm()
        yield host, garbage
        host.guard.disarm()
        garbage.leave()


async def instances(count: int, *, traced: bool, **_: Any) -> dict[str, float]:
    async with host_of(1) as (host, _garbage):
        held: list[Any] = [None] * count
        if traced:
            tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0] if traced else rss()
        for index in range(count):
            held[index] = host.instantiate("0")
        after = tracemalloc.get_traced_memory()[0] if traced else rss()
        return {"count": count, "bytes": (after - before) / count}


async def parked(count: int, *, traced: bool, how: str, **_: Any) -> dict[str, float]:
    """Bytes of a waiting execution."""
    async with host_of(1) as (host, _garbage):
        callers: list[asyncio.Task[Any]] = []
        loop = asyncio.get_running_loop()
        if traced:
            tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0] if traced else rss()
        for index in range(count):
            if how == "submitted":
                await host.submit("0", None)
            else:
                callers.append(loop.create_task(host.execute("0", None)))
            if index % 500 == 499:
                await until(lambda index=index: len(gates()) > index)  # type: ignore[misc]
                while how == "left" and callers:
                    caller = callers.pop()
                    caller.cancel()
                    await until(caller.done)
        await until(lambda: len(gates()) == count)
        gc.collect()
        after = tracemalloc.get_traced_memory()[0] if traced else rss()
        for gate in gates():
            gate.set_result(None)
        await until(lambda: not host.running)
        return {"count": count, "bytes": (after - before) / count}


async def burst(count: int, *, definitions: int, **_: Any) -> dict[str, float]:
    """All submitted from one task, all at once under way; completed, then all cancelled."""
    empty = rss()
    async with host_of(definitions) as (host, garbage):
        base, begun_at = rss(), now()
        async with Lag() as admission:
            ids = [(await host.submit(str(index % definitions), index)).id for index in range(count)]
            submitted_s = now() - begun_at
            await until(lambda: len(gates()) == count)
        figures = {
            "definitions": definitions,
            "count": count,
            "definition_bytes": (base - empty) / definitions if definitions > 1 else 0,
            "held_mb": (rss() - base) / 1e6,
            "submit_s": submitted_s,
            "all_wait_s": now() - begun_at,
            **admission.figures(),
        }
        begun_at = now()
        async with Lag() as ending:
            for gate in gates():
                gate.set_result(None)
            await until(lambda: not host.running)
        figures["complete_s"] = now() - begun_at
        figures["complete_lag_max_ms"] = ending.figures()["lag_max_ms"]
        ends = [await host.execution(str(index % definitions), ids[index]) for index in range(count)]
        figures["completed"] = sum(end.status == "completed" and end.output == n for n, end in enumerate(ends))
        del ends
        for module in modules():
            module.gates.clear()
        ids = [(await host.submit(str(index % definitions), index)).id for index in range(count)]
        await until(lambda: len(gates()) == count)
        begun_at = now()
        ends = []
        async with Lag() as cancelling:
            for at in range(0, count, 500):
                ends += await asyncio.gather(*(host.cancel(name) for name in ids[at : at + 500]))
        figures["cancel_s"] = now() - begun_at
        figures["cancel_lag_max_ms"] = cancelling.figures()["lag_max_ms"]
        figures["cancelled"] = sum(end.status == "cancelled" for end in ends)
        figures["gc_longest_ms"] = garbage.longest_s * 1000
        figures["gc_pauses"] = garbage.pauses
        return figures


async def shared(_count: int, *, seconds: float, **_: Any) -> dict[str, float]:
    """Instances of one definition."""
    async with host_of(1) as (host, _garbage):
        count, times, end, cpu_at = 0, [], now() + seconds, time.process_time()
        while (before := now()) < end:
            host.instantiate("0")
            if count % 100 == 0:  # a sample: a minute has tens of millions
                times.append(now() - before)
                await asyncio.sleep(0)
            count += 1
        cpu_s = time.process_time() - cpu_at
        return {"per_s": count / seconds, "cpu_ms": cpu_s / count * 1000, "p99_ms": quantile(times, 0.99) * 1000}


async def distinct(_count: int, *, seconds: float, how: str, **_: Any) -> dict[str, float]:
    """An instance of another source each time."""
    with tempfile.TemporaryDirectory() as directory:
        texts = 1_000 if how == "read" else 0
        if texts:
            cache = CodeCache(Path(directory) / "code")
            for number in range(texts):
                cache.compile("a", long_source(number))
                cache.flush()
            cache.close()
        cache = CodeCache(Path(directory) / "code") if texts else CodeCache()
        settings = AgentsConfig(definitions_max=500)
        garbage = Garbage(CLOCK)
        async with AgentHost(settings, store=MemoryStore(clock=CLOCK), code_cache=cache) as host:
            garbage.settle()
            times, begun_at, cpu_at = [], now(), time.process_time()
            async with Lag() as lag:
                while (before := now()) < begun_at + seconds and (not texts or len(times) < texts):
                    await host.deploy(f"a{len(times)}", long_source(len(times)), version="1.0.0")
                    host.instantiate(f"a{len(times)}")
                    times.append(now() - before)
            took, cpu_s = now() - begun_at, time.process_time() - cpu_at
            garbage.leave()
        cache.close()
        return {
            "per_s": len(times) / took,
            "cpu_ms": cpu_s / len(times) * 1000,
            "p99_ms": quantile(times, 0.99) * 1000,
            **lag.figures(),
        }


async def hog(_count: int, *, seconds: float, how: str, **_: Any) -> dict[str, float]:
    """How late others are."""
    async with host_of(0, step_max_s=0.1) as (host, _garbage):
        await host.deploy("steady", STEADY, version="1.0.0")
        if how != "none":
            await host.deploy("hog", {"spins": SPINS, "swallows": SWALLOWS}[how], version="1.0.0")
        others = [asyncio.create_task(host.execute("steady", max(2.0, seconds))) for _ in range(200)]
        await asyncio.sleep(0.5)
        figures = {"hogs": 0.0, "refused": 0.0}
        while how != "none" and not figures["refused"]:
            try:
                figures["hogs"] += (await host.execute("hog", None)).status == "failed"
            except AgentQuarantined:
                figures["refused"] += 1
        late = [delay * 1000 for other in others for delay in (await other).output]
        return {**figures, "p50_ms": quantile(late, 0.5), "p99_ms": quantile(late, 0.99), "max_ms": max(late)}


PARTS: dict[str, Callable[..., Coroutine[Any, Any, dict[str, float]]]] = {
    "instances": instances,
    "parked": parked,
    "burst": burst,
    "shared": shared,
    "distinct": distinct,
    "hog": hog,
}


def in_a_process(arguments: argparse.Namespace, part: str, **options: Any) -> dict[str, float]:
    """One row, measured by a process of its own."""
    given = {"count": arguments.executions, "seconds": arguments.seconds, "loop": arguments.loop, **options}
    command = [sys.executable, "-m", "benchmarks.micro.density", "--row", json.dumps({"part": part, **given})]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=900)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def row(given: dict[str, Any]) -> None:
    """Measure one row, as JSON on standard output."""
    options = {"traced": False, "definitions": 1, "how": "", **given}
    work = PARTS[options.pop("part")]
    run = uvloop.run if options.pop("loop") == "uvloop" else asyncio.run
    print(json.dumps(run(work(options.pop("count"), **options))))


def table(head: str, lines: list[list[str]]) -> None:
    columns = head.split(" | ")
    print(f"\n| {head} |\n|{'---|' * len(columns)}")
    for line in lines:
        print(f"| {' | '.join(line)} |")
    sys.stdout.flush()


def bytes_table(arguments: argparse.Namespace) -> dict[str, Any]:
    rows = {
        "an instance": ("instances", {}),
        "a waiting execution, its caller gone": ("parked", {"how": "left"}),
        "a waiting execution and its caller": ("parked", {"how": "awaited"}),
        "a submitted execution and its record": ("parked", {"how": "submitted"}),
    }
    found = {}
    for name, (part, options) in rows.items():
        traced = in_a_process(arguments, part, traced=True, **{**options, "count": TRACED})
        grown = in_a_process(arguments, part, **options)
        found[name] = {"traced": traced["bytes"], "rss": grown["bytes"]}
    table(
        "bytes each | tracemalloc | RSS",
        [[name, f"{figures['traced']:,.0f}", f"{figures['rss']:,.0f}"] for name, figures in found.items()],
    )
    return found


def burst_table(arguments: argparse.Namespace) -> dict[str, Any]:
    found = {str(count): in_a_process(arguments, "burst", definitions=count) for count in (1, 100, 5_000)}
    head = (
        "definitions | MB over base | submitted in s | all waiting after s | loop lag p99 / max ms"
        " | longest gc pause ms | completed | in s, lag max ms | cancelled | in s, lag max ms"
    )
    table(
        head,
        [
            [
                f"{each['definitions']:,.0f}",
                f"{each['held_mb']:.0f}",
                f"{each['submit_s']:.2f}",
                f"{each['all_wait_s']:.2f}",
                f"{each['lag_p99_ms']:.1f} / {each['lag_max_ms']:.1f}",
                f"{each['gc_longest_ms']:.1f}",
                f"{each['completed']:,.0f}",
                f"{each['complete_s']:.2f}, {each['complete_lag_max_ms']:.0f}",
                f"{each['cancelled']:,.0f}",
                f"{each['cancel_s']:.2f}, {each['cancel_lag_max_ms']:.0f}",
            ]
            for each in found.values()
        ],
    )
    return found


def rates_table(arguments: argparse.Namespace) -> dict[str, Any]:
    found = {
        "instances of one definition": in_a_process(arguments, "shared"),
        "distinct sources, compiled": in_a_process(arguments, "distinct", how="compiled"),
        "distinct sources, read from disk": in_a_process(arguments, "distinct", how="read"),
    }
    table(
        "instantiations | per s | CPU of one, ms | p99 of one, ms",
        [
            [name, f"{figures['per_s']:,.0f}", f"{figures['cpu_ms']:.4f}", f"{figures['p99_ms']:.3f}"]
            for name, figures in found.items()
        ],
    )
    return found


def hog_table(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {"none": "nobody", "spins": "one that never awaits", "swallows": "one that swallows its interruption"}
    found = {how: in_a_process(arguments, "hog", how=how) for how in names}
    table(
        "200 agents beside (step_max_s 0.1) | late p50 / p99 / max ms | hogs ended | then refused",
        [
            [
                names[how],
                f"{each['p50_ms']:.1f} / {each['p99_ms']:.1f} / {each['max_ms']:.0f}",
                f"{each['hogs']:.0f}",
                "yes" if each["refused"] else "-",
            ]
            for how, each in found.items()
        ],
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--executions", type=int, default=50_000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each rate")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        return row(arguments.row)
    results = {
        "bytes": bytes_table(arguments),
        "burst": burst_table(arguments),
        "rates": rates_table(arguments),
        "hog": hog_table(arguments),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return None


if __name__ == "__main__":
    main()
