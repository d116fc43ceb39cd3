"""What an isolated agent costs, and what its host feels of one that attacks it.

    python -m benchmarks.scenario.isolation cold [--count 200]
    python -m benchmarks.scenario.isolation warm [--count 20000] [--at-once 32]
    python -m benchmarks.scenario.isolation memory [--workers 20]
    python -m benchmarks.scenario.isolation attacks [--seconds 3] [--only NAME ...]

From the root of a checkout, on Linux. `cold` is from the request for a worker to an agent that is loaded in it, once
with and once without a warm worker at hand; `warm` is the time of a call that does nothing; `memory` needs the right
to read the workers' smaps (root, mostly); `attacks` measures how late a timer of the host's event loop is while each
runs again and again; for comparison in a quiet process, and beside an ordinary process that spins.
"""

import argparse
import asyncio
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from headrace.agents.definition import Source
from headrace.agents.isolation import IsolationConfig, Limits, ProcessPool, WorkerKey, probe
from headrace.clock import SystemClock
from headrace.errors import HeadraceError

now = SystemClock.monotonic
TICK_S = 0.005
NOTHING = "async def Agent(input, context): return None"
TYPICAL = '''
import asyncio, dataclasses, datetime, json, re

@dataclasses.dataclass
class Step:
    name: str
    started: datetime.datetime | None = None

class Agent:
    """An agent of some length, so that loading it is not free."""

    pattern = re.compile(r"https?://[^ ]+")

    async def execute(self, input, context):
        steps = [Step(str(index)) for index in range(3)]
        for index, step in enumerate(steps):
            context.progress(index, len(steps), step.name)
            await asyncio.sleep(0)
        return {"links": self.pattern.findall(str(input)), "steps": [step.name for step in steps]}
'''
FRAME = """
import asyncio, ctypes, os, signal, socket, threading, time

def flood():
    for descriptor in range(3, 12):
        try:
            for _ in range(100_000):
                os.write(descriptor, bytes(7) + b"\\xff" * 65536)
        except OSError:
            continue

{head} execute_(input, context):
    {body}
class Agent:
    {head} execute(self, input, context):
        {call}
"""
ATTACKS = {
    "/etc/passwd": "open('/etc/passwd')",
    "socket": "socket.socket()",
    "fork bomb": "[os.fork() for _ in range(1000)]",
    "thread bomb": "[threading.Thread(target=time.sleep, args=(9,), daemon=True).start() for _ in range(1000)]",
    "ptrace": "ctypes.CDLL(None).syscall(101, 16, 1, 0, 0)",
    "kill the parent": "os.kill(os.getppid() or 1, signal.SIGKILL)",
    "2 GB": "bytearray(2 << 30)",
    "endless loop": "all(True for _ in iter(int, 1))",
    "1 GB of stdout": "[print('x' * (1 << 20)) for _ in range(1024)]",
    "1 GB past Python": "[os.write(1, bytes(1 << 20)) for _ in range(1024)]",
    "1 GB of result": "return ['x' * 1000] * (1 << 20)",
    "flood of frames": "flood()",
    "flood of progress": "[context.progress(index, 1) for index in range(10**7)]",
    "SIGSTOP": "os.kill(os.getpid(), signal.SIGSTOP)",
    "crash": "ctypes.string_at(0)",
}


def source(text: str, version: str) -> Source:
    return Source(agent_id="agent", version=version, text=text)


def key(version: str) -> WorkerKey:
    return WorkerKey("tenant", "agent", version)


def told(name: str, times_s: list[float], unit: float, sign: str) -> None:
    times = sorted(times_s)
    median, late, most = (times[min(len(times) - 1, int(len(times) * q))] * unit for q in (0.5, 0.99, 1.0))
    print(f"{name:32} median {median:8.2f} {sign}  p99 {late:8.2f} {sign}  max {most:8.2f} {sign}", flush=True)


async def cold(options: argparse.Namespace) -> None:
    configs = {
        "cold, no warm worker": IsolationConfig(warm_min=0, warm_max=1, warm_horizon_s=1e-9),
        "cold, a warm worker at hand": IsolationConfig(warm_min=2, warm_max=2),
    }
    for name, config in configs.items():
        async with ProcessPool(config) as pool:
            times = []
            for number in range(options.count):
                while pool.statistics().warm < config.warm_min:
                    await asyncio.sleep(0.002)
                started = now()
                await pool.start(key(str(number)), source(TYPICAL, str(number)))
                times.append(now() - started)
                await pool.stop(key(str(number)))
            told(name, times, 1e3, "ms")


async def warm(options: argparse.Namespace) -> None:
    async with ProcessPool(limits=Limits(concurrent=max(64, options.at_once))) as pool:
        await pool.start(key("1"), source(NOTHING, "1"))
        times: list[float] = []

        async def calls(count: int) -> None:
            for _ in range(count):
                started = now()
                await pool.execute(key("1"), b"null", execution_id="e", deadline_s=30)
                times.append(now() - started)

        await calls(1000)
        times.clear()
        await calls(options.count)
        told("warm, one after another", times, 1e6, "us")
        times.clear()
        started = now()
        await asyncio.gather(*(calls(options.count // options.at_once) for _ in range(options.at_once)))
        each_us = (now() - started) / len(times) * 1e6
        told(f"warm, {options.at_once} at once", times, 1e6, "us")
        print(f"{'':32} {each_us:.1f} us a call, {1e6 / each_us:,.0f} calls/s", flush=True)


async def memory(options: argparse.Namespace) -> None:
    async with ProcessPool() as pool:
        for number in range(options.workers):
            await pool.start(key(str(number)), source(TYPICAL, str(number)))
            await pool.execute(key(str(number)), b'"x"', execution_id="e", deadline_s=30)
        pids = [pid for number in range(options.workers) for pid in pool.pids(key(str(number)))]
        for field in ("Pss", "Private_Dirty", "Rss"):
            sizes = [smaps(pid, field) for pid in pids]
            print(f"{field:16} {sum(sizes) / len(sizes) / 1024:8.2f} MB a worker, of {len(sizes)}", flush=True)


def smaps(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise ValueError(field)


async def lateness(seconds: float) -> list[float]:
    """How late a timer of this loop is, again and again."""
    found, ends_at = [], now() + seconds
    while now() < ends_at:
        due = now() + TICK_S
        await asyncio.sleep(TICK_S)
        found.append(now() - due)
    return found


async def attacks(options: argparse.Namespace) -> None:
    config = IsolationConfig(cancel_grace_s=0.2)
    limits = Limits(memory_bytes=128 << 20, step_s=0.5)
    async with ProcessPool(config, limits=limits) as pool:
        told("quiet", await lateness(options.seconds), 1e3, "ms")
        spinning = await asyncio.create_subprocess_exec(sys.executable, "-c", "while True: pass")
        told("beside a process that spins", await lateness(options.seconds), 1e3, "ms")
        spinning.kill()
        await spinning.wait()
        for version, (name, text) in enumerate(chosen(options.only)):
            await pool.start(key(str(version)), source(text, str(version)))
            outcomes: list[str] = []
            attacking = asyncio.ensure_future(again_and_again(pool, key(str(version)), outcomes))
            late = await lateness(options.seconds)
            attacking.cancel()
            await asyncio.gather(attacking, return_exceptions=True)
            await pool.stop(key(str(version)))
            told(name, late, 1e3, "ms")
            print(f"{'':32} {len(outcomes)} times: {outcomes[-1] if outcomes else 'not once to its end'}", flush=True)
        statistics = pool.statistics()
        print(f"killed {statistics.killed}, hogs {statistics.hogs}, zygotes {statistics.zygotes}")


def chosen(only: list[str] | None) -> Iterator[tuple[str, str]]:
    for name, body in ATTACKS.items():
        if only is None or name in only:
            yield name, FRAME.format(head="async def", body=body, call="return await execute_(input, context)")
            if name == "endless loop":
                yield f"{name} in threads", FRAME.format(head="def", body=body, call="return execute_(input, context)")


async def again_and_again(pool: ProcessPool, attacker: WorkerKey, outcomes: list[str]) -> None:
    while True:
        try:
            outcome = await pool.execute(attacker, b"null", execution_id="e", deadline_s=1)
            outcomes.append(f"{outcome.status}: {outcome.error}"[:90])
        except HeadraceError as error:
            outcomes.append(error.message[:90])
            await asyncio.sleep(TICK_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    runs: dict[str, Callable[..., object]] = {"cold": cold, "warm": warm, "memory": memory, "attacks": attacks}
    verb = {name: verbs.add_parser(name) for name in runs}
    verb["cold"].add_argument("--count", type=int, default=200)
    verb["warm"].add_argument("--count", type=int, default=20_000)
    verb["warm"].add_argument("--at-once", type=int, default=32)
    verb["memory"].add_argument("--workers", type=int, default=20)
    verb["attacks"].add_argument("--seconds", type=float, default=3.0)
    verb["attacks"].add_argument("--only", nargs="*", choices=ATTACKS)
    for name, parsing in verb.items():
        parsing.set_defaults(run=runs[name])
    options = parser.parse_args()
    probe().require()
    asyncio.run(options.run(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
