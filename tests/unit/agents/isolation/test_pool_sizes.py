"""How many workers a pool has, when they are replaced, and what it tells of them; with real ones."""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest

from headrace.agents.definition import Source
from headrace.agents.isolation import (
    IsolationConfig,
    Limits,
    ProcessPool,
    WorkerKey,
    probe,
)
from headrace.clock import SystemClock
from headrace.errors import (
    ConfigError,
    Overloaded,
    WorkerFailed,
)
from headrace.events import Event, WorkerKilled, ZygoteEnded

achievable = probe()
pytestmark = pytest.mark.skipif(achievable.level != "process", reason=f"this kernel lacks {achievable.missing}")

KEY = WorkerKey("tenant", "agent", "1")

ECHO = """
import asyncio
async def Agent(input, context):
    if input == "wait":
        await asyncio.sleep(60)
    return input
"""


def source(text: str, **changes: Any) -> Source:
    return Source(**{"agent_id": KEY.agent_id, "version": KEY.version, "text": text, **changes})


class Noted:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)


async def until(condition: Callable[[], bool], *, within_s: float = 60.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


async def run(pool: ProcessPool, input: Any, *, deadline_s: float = 60.0, key: WorkerKey = KEY) -> Any:
    return await pool.execute(key, json.dumps(input).encode(), execution_id="exec-1", deadline_s=deadline_s)


@pytest.fixture
async def pool() -> AsyncIterator[ProcessPool]:
    async with ProcessPool(IsolationConfig(cancel_grace_s=0.2)) as pool:
        await pool.start(KEY, source(ECHO))
        yield pool


# -- how many -----------------------------------------------------------------------------------------------------


async def test_one_worker_runs_many_at_once_and_more_workers_come_when_it_is_full() -> None:
    """Workers grow with what runs at once, up to their limit; above it calls are refused, not queued."""
    config = IsolationConfig(workers_per_agent_max=2)
    async with ProcessPool(config, limits=Limits(concurrent=3)) as pool:
        await pool.start(KEY, source(ECHO))
        calls = [asyncio.ensure_future(run(pool, "wait")) for _ in range(3)]
        await until(lambda: pool.statistics().executing == 3)
        assert len(pool.pids(KEY)) == 1

        calls += [asyncio.ensure_future(run(pool, "wait")) for _ in range(3)]
        await until(lambda: pool.statistics().executing == 6)
        with pytest.raises(Overloaded):
            await run(pool, 1)

        assert len(pool.pids(KEY)) == 2
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_the_worker_that_was_idle_longest_makes_room_for_another_agent() -> None:
    """Workers are bounded over all agents; an agent whose worker went starts again at its next call."""
    config = IsolationConfig(workers_max=3, warm_min=0, warm_max=1)
    async with ProcessPool(config) as pool:
        keys = [KEY._replace(version=str(number)) for number in range(5)]
        for key in keys:
            await pool.start(key, source(ECHO, version=key.version))
            await until(lambda: len(pool.pids()) <= 3)

        outcomes = [await run(pool, 1, key=key) for key in keys]

    assert {outcome.status for outcome in outcomes} == {"completed"}


async def test_a_worker_that_does_not_read_is_given_no_more() -> None:
    """What waits for it in the host's memory is bounded by the largest input; who comes then is told to come back."""
    async with ProcessPool(IsolationConfig(input_bytes_max=1 << 20, workers_per_agent_max=1)) as pool:
        await pool.start(KEY, source(ECHO))
        (pid,) = pool.pids(KEY)
        os.kill(pid, signal.SIGSTOP)
        large = "x" * 1_000_000
        calls = [asyncio.ensure_future(run(pool, large, deadline_s=60)) for _ in range(2)]
        await until(lambda: pool.statistics().executing == 2)

        with pytest.raises(Overloaded):
            await run(pool, large)
        os.kill(pid, signal.SIGCONT)

        assert {outcome.status for outcome in await asyncio.gather(*calls)} == {"completed"}
        assert (await run(pool, 1)).status == "completed"


async def test_a_tenant_leaves_workers_to_others() -> None:
    """Above its share a tenant gives up an idle worker of its own, or has to come back; others are let in."""
    async with ProcessPool(IsolationConfig(workers_per_tenant_max=2, warm_min=0)) as pool:
        greedy = [KEY._replace(version=str(number)) for number in range(4)]
        for key in greedy[:3]:
            await pool.start(key, source(ECHO, version=key.version))
        await until(lambda: sum(map(len, map(pool.pids, greedy))) == 2)
        calls = [asyncio.ensure_future(run(pool, "wait", key=key)) for key in greedy[1:3]]
        await until(lambda: pool.statistics().executing == 2)

        with pytest.raises(Overloaded, match="'tenant' has 2 isolated workers"):
            await pool.start(greedy[3], source(ECHO, version="3"))
        other = KEY._replace(tenant="other")
        await pool.start(other, source(ECHO))

        assert (await run(pool, 1, key=other)).status == "completed"
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_workers_that_all_run_refuse_another_agent() -> None:
    """Nothing idle can make room: the newcomer is told to come back."""
    async with ProcessPool(IsolationConfig(workers_max=2, warm_min=0, warm_max=1)) as pool:
        calls = []
        for version in "12":
            key = KEY._replace(version=version)
            await pool.start(key, source(ECHO, version=version))
            calls.append(asyncio.ensure_future(run(pool, "wait", key=key)))
            await until(lambda: pool.statistics().executing == len(calls))

        with pytest.raises(Overloaded):
            await pool.start(KEY._replace(version="3"), source(ECHO, version="3"))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


class SlowClock(SystemClock):
    """Whatever happens while it is asked, has happened within a twentieth of the time."""

    def monotonic(self) -> float:
        """A time that hardly passes."""
        return super().monotonic() / 20


async def test_warm_workers_follow_the_arrivals() -> None:
    """One is kept when nothing comes, more when many agents come; all of them are hardened and without an agent."""
    async with ProcessPool(IsolationConfig(warm_min=1, warm_max=4), clock=SlowClock()) as pool:
        await until(lambda: pool.statistics().warm == 1)
        for number in range(30):
            key = KEY._replace(version=str(number))
            await pool.start(key, source(ECHO, version=key.version))
            await pool.stop(key)

        await until(lambda: pool.statistics().warm > 1)
        assert pool.statistics().warm <= 4


async def test_an_idle_worker_is_retired() -> None:
    """After its idle time it goes, which counts as replaced; the next call brings another."""
    async with ProcessPool(IsolationConfig(idle_s=0.05, watch_s=0.02)) as pool:
        await pool.start(KEY, source(ECHO))
        await until(lambda: not pool.pids(KEY))

        assert (await run(pool, 1)).status == "completed"
        assert pool.statistics().replaced >= 1
        assert pool.statistics().killed == 0


class LaterClock(SystemClock):
    """Is ahead of the others by as much as it is told, and counts its pauses."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.pauses = 0

    def monotonic(self) -> float:
        """So much later."""
        return super().monotonic() + self.ahead_s

    async def sleep(self, seconds: float) -> None:
        """Note a pause."""
        await super().sleep(seconds)
        self.pauses += 1


async def test_a_worker_that_waited_long_for_its_agent_is_not_idle_with_it() -> None:
    """Its idle time begins when it has one; else it would be retired before its first execution."""
    clock = LaterClock()
    async with ProcessPool(IsolationConfig(idle_s=60.0, watch_s=0.02), clock=clock) as pool:
        await until(lambda: pool.statistics().warm == 1)
        clock.ahead_s = 100.0
        await pool.start(KEY, source(ECHO))
        pids, before = pool.pids(KEY), clock.pauses
        await until(lambda: clock.pauses >= before + 3)

        assert pool.pids(KEY) == pids
        assert pool.statistics().replaced == 0


@pytest.mark.parametrize("due", [{"calls_max": 3}, {"age_s": 0.05}, {"resident_bytes_max": 1}])
async def test_a_worker_is_replaced_when_it_is_due(due: dict[str, Any]) -> None:
    """After its calls, its age or its memory another worker takes over, and no execution is lost."""
    async with ProcessPool(IsolationConfig(watch_s=0.02, **due)) as pool:
        await pool.start(KEY, source(ECHO))

        async def call_until_replaced() -> None:
            while not pool.statistics().replaced:
                assert (await run(pool, 1)).status == "completed"

        await asyncio.wait_for(call_until_replaced(), 60)

        assert (await run(pool, 1)).status == "completed"
        assert pool.statistics().killed == pool.statistics().interrupted == 0


async def test_limits_are_of_a_version(pool: ProcessPool) -> None:
    """They hold in its worker, which was made before they were known."""
    text = "import resource\nasync def Agent(input, context): return resource.getrlimit(resource.RLIMIT_NOFILE)"
    for version, files in (("low", 20), ("high", 500)):
        key = KEY._replace(version=version)
        await pool.start(key, source(text, version=version), Limits(files=files))

        assert json.loads((await run(pool, 0, key=key)).output_json) == [files, files]


class PatientClock(SystemClock):
    """Notes how long it was asked to sleep, and only yields for pauses that are not the pool's own rhythm."""

    def __init__(self, rhythm_s: float) -> None:
        self.rhythm_s = rhythm_s
        self.asked_s: list[float] = []

    async def sleep(self, seconds: float) -> None:
        """Note a pause."""
        if seconds == self.rhythm_s:
            await super().sleep(seconds)
        else:
            self.asked_s.append(seconds)
            await super().sleep(0)


async def test_an_agent_that_ends_its_workers_again_and_again_is_slowed_down() -> None:
    """The first deaths are free, then each costs a longer pause; a completed execution forgives them."""
    config = IsolationConfig()
    clock = PatientClock(config.watch_s)
    text = "import os\nasync def Agent(input, context): return input or os._exit(1)"
    async with ProcessPool(config, clock=clock) as pool:
        await pool.start(KEY, source(text))
        for _ in range(6):
            assert (await run(pool, 0)).status == "failed"
        assert (await run(pool, 1)).status == "completed"
        assert (await run(pool, 0)).status == "failed"
        assert (await run(pool, 1)).status == "completed"

    assert clock.asked_s == [0.02, 0.04, 0.08, 0.16]


async def test_a_deadline_holds_while_there_is_no_worker() -> None:
    """An execution that no worker was ready for in time is a timeout and never begins."""
    async with ProcessPool() as pool:
        await pool.start(KEY, source("import time\ntime.sleep(1)\nimport os\nasync def Agent(i, c): os._exit(1)"))
        await run(pool, 0)

        outcome = await run(pool, 0, deadline_s=0.05)

    assert (outcome.status, outcome.error) == ("timeout", "No worker was ready for it within 0.05 s.")


# -- what is told -------------------------------------------------------------------------------------------------


async def test_deaths_are_told() -> None:
    """An observer hears of a worker that died with its executions, and of a zygote that did."""
    noted = Noted()
    async with ProcessPool(observer=noted) as pool:
        await pool.start(KEY, source("import os\nasync def Agent(input, context): os._exit(5)"))
        await run(pool, 0)
        assert pool.zygote_pid is not None
        os.kill(pool.zygote_pid, 9)
        await until(lambda: pool.statistics().zygotes == 2)

    killed = [event for event in noted.events if isinstance(event, WorkerKilled)]
    ended = [event for event in noted.events if isinstance(event, ZygoteEnded)]
    assert killed == [WorkerKilled("agent", "1", "tenant", "it exited with 5", 0)]
    assert ended[0].reason == "it died"


async def test_the_zygote_holds_no_driver_and_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a worker is forked from knows no database, no Redis, no configuration and no environment of the host."""
    monkeypatch.setenv("HEADRACE_SECRET", "a secret of the host")
    text = """
import os, sys
async def Agent(input, context):
    return [sorted(sys.modules), dict(os.environ), sys.argv, sys.orig_argv]
"""
    async with ProcessPool() as pool:
        await pool.start(KEY, source(text))
        modules, environment, argv, orig_argv = json.loads((await run(pool, 0)).output_json)
        assert pool.zygote_pid is not None
        zygote_environment = psutil.Process(pool.zygote_pid).environ()

    assert not {"redis", "psycopg", "headrace.cache", "headrace.database", "headrace.config"} & set(modules)
    assert "HEADRACE_SECRET" not in {*environment, *zygote_environment}
    assert len(argv) == len(orig_argv) == 1


async def test_a_limit_that_cannot_be_kept_is_refused() -> None:
    """Limits are checked where they are written, not when a worker dies of them."""
    with pytest.raises(ConfigError):
        ProcessPool(limits=Limits(files=0))


async def test_without_a_zygote_a_call_fails_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """While no worker can be made, whoever needs one is told within the limit of a start."""
    config = IsolationConfig(warm_min=0, start_timeout_s=0.2, zygote_backoff_first_s=60, zygote_backoff_max_s=60)
    async with ProcessPool(config) as pool:
        assert pool.zygote_pid is not None
        os.kill(pool.zygote_pid, 9)

        with pytest.raises(WorkerFailed, match="did not fork a worker"):
            await pool.start(KEY, source(ECHO))
