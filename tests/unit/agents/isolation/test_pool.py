"""The pool of isolated workers, with real ones: results, deadlines, limits, growth, renewal and refusal."""

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import psutil
import pytest

from headrace.agents.definition import Source
from headrace.agents.execution import Progress
from headrace.agents.isolation import (
    Achievable,
    IsolationConfig,
    MissingPart,
    ProcessPool,
    WorkerKey,
    frames,
    probe,
)
from headrace.agents.isolation import (
    pool as pool_module,
)
from headrace.agents.isolation.process import WorkerProcess
from headrace.agents.isolation.running import Stopped
from headrace.errors import (
    AgentInvalid,
    AgentNotFound,
    InvalidRequest,
    IsolationUnavailable,
    NotOpen,
    VersionConflict,
)
from headrace.events import Event

achievable = probe()
pytestmark = pytest.mark.skipif(achievable.level != "process", reason=f"this kernel lacks {achievable.missing}")

KEY = WorkerKey("tenant", "agent", "1")

ECHO = """
import asyncio, contextvars, os, sys, threading, time

class Agent:
    async def execute(self, input, context):
        match input:
            case "identity":
                return [context.agent_id, context.version, context.tenant, context.execution_id]
            case "remaining":
                return context.remaining_s()
            case "progress":
                for done in range(3):
                    context.progress(done, 3, "step")
                await asyncio.sleep(0)
                return None
            case "print":
                print("to stdout")
                print("to stderr", file=sys.stderr)
                return None
            case "wait":
                await asyncio.sleep(60)
            case "fail":
                raise ValueError("wrong")
            case "exit":
                raise SystemExit(3)
            case "process":
                return os.getpid()
            case "emit":
                for number in range(100):
                    context.emit({"number": number})
                return None
            case "emit much":
                for _ in range(100):
                    context.emit("x" * 1000)
                return None
            case "remember":
                context.state["calls"] = context.state.get("calls", 0) + 1
                return context.attempt
            case "remember too much":
                context.state["large"] = object()
                return None
            case "object":
                return object()
            case "surrogate":
                print("\\ud800")
                raise ValueError("\\ud800\\x00")
        return input
"""

SYNC = """
import threading
class Agent:
    def execute(self, input, context):
        print("in a thread")
        context.progress(1, 1)
        return threading.current_thread() is not threading.main_thread()
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
    # Longer than a busy machine keeps a worker from running: one that obeys is never killed here.
    async with ProcessPool(IsolationConfig(cancel_grace_s=10.0)) as pool:
        await pool.start(KEY, source(ECHO))
        yield pool


# -- results ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 1, "text", [1, {"a": None}], {"deep": [[[]]]}])
async def test_a_result_comes_back_as_json(pool: ProcessPool, value: Any) -> None:
    """What goes in as JSON comes out as JSON, with what it took."""
    outcome = await run(pool, value)

    assert (outcome.status, json.loads(outcome.output_json), outcome.error) == ("completed", value, None)
    assert outcome.cpu_ms > 0
    assert outcome.memory_bytes > 1 << 20


async def test_the_context_says_what_it_says_in_the_host(pool: ProcessPool) -> None:
    """Ids and the remaining time reach the agent."""
    identity = await run(pool, "identity")
    remaining = await run(pool, "remaining", deadline_s=60.0)

    assert json.loads(identity.output_json) == ["agent", "1", "tenant", "exec-1"]
    assert 30.0 < json.loads(remaining.output_json) < 60.0


async def test_progress_is_told_and_the_newest_wins(pool: ProcessPool) -> None:
    """Reports are gathered on their way; the last one always arrives before the result."""
    seen: list[Progress] = []

    await pool.execute(KEY, b'"progress"', execution_id="e", deadline_s=60, on_progress=seen.append)

    assert seen[-1] == Progress(2, 3, "step")


async def test_events_are_told_in_their_order(pool: ProcessPool) -> None:
    """What an agent emits arrives whole and before its result."""
    seen: list[bytes] = []

    await pool.execute(KEY, b'"emit"', execution_id="e", deadline_s=60, on_event=seen.append)

    assert [json.loads(event)["number"] for event in seen] == list(range(100))


async def test_events_that_come_too_fast_drive_out_the_oldest(pool: ProcessPool) -> None:
    """An agent never waits for its listeners; what is lost is counted."""
    seen: list[bytes] = []

    outcome = await pool.execute(KEY, b'"emit much"', execution_id="e", deadline_s=60, on_event=seen.append)

    assert outcome.status == "completed"
    assert 0 < len(seen) < 100
    assert outcome.dropped_bytes == 1002 * (100 - len(seen))


async def test_an_instance_remembers(pool: ProcessPool) -> None:
    """A state goes in, and comes out as the agent left it; without one there is nothing to remember in."""
    first = await pool.execute(KEY, b'"remember"', execution_id="e", deadline_s=60, state_json=b"{}", attempt=2)
    assert first.output_json == b"2"
    second = await pool.execute(KEY, b'"remember"', execution_id="e", deadline_s=60, state_json=first.state_json)
    without = await run(pool, "remember")
    failed = await pool.execute(KEY, b'"remember too much"', execution_id="e", deadline_s=60, state_json=b"{}")

    assert json.loads(second.state_json or b"") == {"calls": 2}
    assert "has no instance" in without.error
    assert (failed.status, failed.state_json) == ("failed", None)


async def test_what_is_printed_is_told(pool: ProcessPool) -> None:
    """stdout and stderr arrive with their names."""
    seen: list[tuple[str, str]] = []

    await pool.execute(
        KEY, b'"print"', execution_id="e", deadline_s=60, on_output=lambda stream, text: seen.append((stream, text))
    )

    assert seen == [("stdout", "to stdout\n"), ("stderr", "to stderr\n")]


@pytest.mark.parametrize(
    ("input", "error"),
    [
        ("fail", "ValueError: wrong"),
        ("exit", "SystemExit: 3"),
        ("object", "The output cannot be written as JSON"),
        ("surrogate", "ValueError: ??"),
    ],
)
async def test_an_exception_is_a_failed_execution(pool: ProcessPool, input: str, error: str) -> None:
    """Whatever an agent raises is its own result; its worker goes on."""
    (pid,) = pool.pids(KEY)

    outcome = await run(pool, input)

    assert outcome.status == "failed"
    assert outcome.error.startswith(error.replace("??", ""))
    assert pool.pids(KEY) == [pid]


async def test_a_synchronous_agent_runs_in_a_thread(pool: ProcessPool) -> None:
    """It prints and reports like an asynchronous one, and many run at once up to the limit of threads."""
    key = KEY._replace(agent_id="sync")
    seen = [""] * 40
    await pool.start(key, source(SYNC, agent_id="sync"))

    async def work(number: int) -> Any:
        def hear(_: str, text: str) -> None:
            seen[number] += text  # the line may come in two parts, with another thread's between them

        return await pool.execute(key, b"0", execution_id=f"e{number}", deadline_s=60, on_output=hear)

    outcomes = await asyncio.gather(*map(work, range(40)))

    assert {outcome.output_json for outcome in outcomes} == {b"true"}
    assert seen == ["in a thread\n"] * 40


async def test_a_function_can_be_the_agent(pool: ProcessPool) -> None:
    """As in the host."""
    key = KEY._replace(agent_id="function")

    await pool.start(key, source("async def work(input, context): return input * 2", entrypoint="work"))

    assert (await run(pool, 21, key=key)).output_json == b"42"


# -- ends ---------------------------------------------------------------------------------------------------------


async def test_a_deadline_ends_an_execution_and_not_its_worker(pool: ProcessPool) -> None:
    """An agent that awaits is cancelled at its deadline; the others of its worker go on."""
    (pid,) = pool.pids(KEY)

    outcome = await run(pool, "wait", deadline_s=0.05)

    assert (outcome.status, outcome.error) == ("timeout", "It ran longer than 0.05 s and was stopped.")
    assert pool.pids(KEY) == [pid]
    assert (await run(pool, 1)).status == "completed"


async def test_cancelling_the_call_cancels_the_execution(pool: ProcessPool) -> None:
    """The call comes back cancelled when the work has stopped; nothing of it is left."""
    call = asyncio.ensure_future(run(pool, "wait", deadline_s=60))
    await until(lambda: pool.statistics().executing == 1)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert pool.statistics().executing == 0
    assert pool.statistics().killed == 0


@pytest.mark.parametrize("first", ["the result", "the cancellation"])
async def test_a_cancellation_that_meets_the_result_loses_nothing_of_it(pool: ProcessPool, first: str) -> None:
    """What the work took is counted, whichever of the two came a moment before the other."""
    (worker,) = (pool._workers[pid] for pid in pool.pids(KEY))

    async def taken() -> float:
        try:
            await run(pool, "wait")
        except Stopped as stopped:
            return stopped.outcome.cpu_ms
        raise AssertionError

    call = asyncio.ensure_future(taken())
    await until(lambda: pool.statistics().executing == 1)
    if first == "the cancellation":
        call.cancel()
    worker._take(frames.Done(next(iter(worker.running)), "completed", b"1", None, 5.0, 0))
    if first == "the result":
        call.cancel()

    assert await call == 5.0


async def test_a_cancellation_that_arrives_with_its_execution_is_obeyed(pool: ProcessPool) -> None:
    """Read in one go, the two end the execution before its first step, and not the worker with all its others."""
    (pid,) = pool.pids(KEY)
    os.kill(pid, signal.SIGSTOP)
    other, call = (asyncio.ensure_future(run(pool, input, deadline_s=60)) for input in (1, "wait"))
    await until(lambda: pool.statistics().executing == 2)
    call.cancel()
    await asyncio.sleep(0)  # the cancellation is sent

    os.kill(pid, signal.SIGCONT)
    with pytest.raises(asyncio.CancelledError):
        await call

    assert (await other).status == "completed"
    assert pool.pids(KEY) == [pid]


async def test_a_thread_that_looks_whether_it_should_stop_saves_its_worker(pool: ProcessPool) -> None:
    """A synchronous agent that returns when it is told to is cancelled or overdue, and no worker is killed."""
    key = KEY._replace(agent_id="attentive")
    text = """
import time
class Agent:
    def execute(self, input, context):
        while not context.should_stop:
            time.sleep(0.005)
        return "a part"
"""
    await pool.start(key, source(text, agent_id="attentive"))
    call = asyncio.ensure_future(run(pool, 1, key=key))
    await until(lambda: pool.statistics().executing == 1)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    overdue = await run(pool, 1, key=key, deadline_s=0.1)

    assert (overdue.status, overdue.output_json) == ("timeout", None)
    assert pool.statistics().killed == 0


EXITS = "import os\nasync def Agent(input, context): os._exit(7)"
EXITS_AFTERWARDS = """
import asyncio, os
async def Agent(input, context):
    asyncio.get_running_loop().call_later(0.5, os._exit, 7)
    return 1
"""


async def dead_unseen(pool: ProcessPool, text: str) -> "tuple[WorkerProcess, asyncio.Future[Any]]":
    """A worker that has ended in its first execution, of which the loop has not heard yet; and that execution."""
    key = KEY._replace(agent_id="exits")
    await pool.start(key, source(text, agent_id="exits"))
    (pid,) = pool.pids(key)
    os.kill(pid, signal.SIGSTOP)
    call = asyncio.ensure_future(run(pool, 1, key=key))
    await until(lambda: pool.statistics().executing == 1)
    os.kill(pid, signal.SIGCONT)
    while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        continue  # without a turn of the loop
    return pool._workers[pid], call


@pytest.mark.parametrize(
    ("text", "output", "error"),
    [(EXITS, None, "Its worker ended: it exited with 7."), (EXITS_AFTERWARDS, b"1", None)],
)
async def test_a_worker_that_had_ended_when_it_was_killed_tells_how_it_ended(
    pool: ProcessPool, text: str, output: bytes | None, error: str | None
) -> None:
    """A kill that comes too late is not the reason, whatever it was meant for; nor did it end in peace."""
    worker, call = await dead_unseen(pool, text)

    worker.kill("it closed its connection")
    outcome = await call

    assert (outcome.output_json, outcome.error) == (output, error)
    await until(lambda: pool.statistics().killed == 1)


async def test_a_worker_that_said_nonsense_is_not_believed_for_having_ended_before_it_was_killed(
    pool: ProcessPool,
) -> None:
    """What came behind the nonsense is not taken."""
    worker, call = await dead_unseen(pool, EXITS)

    done = frames.Done(next(iter(worker.running)), "completed", b"1", None, 0.0, 0)
    worker._hear(b"\x01\x00\x00\x00\xc1" + frames.framed(done))
    outcome = await call

    assert outcome.status == "failed"
    assert "Its worker ended: it sent a frame that cannot be read" in str(outcome.error)
    assert pool.statistics().killed == 1


async def test_a_pause_of_the_whole_machine_is_no_step_of_an_agent() -> None:
    """What was under way before it has until the next look to end; a step that goes on then is a hog's."""
    text = """
import time
async def Agent(input, context):
    time.sleep(input)
    return "done"
"""
    async with ProcessPool(IsolationConfig(watch_s=60.0)) as pool:
        await pool.start(KEY, source(text))
        (worker,) = (pool._workers[pid] for pid in pool.pids(KEY))
        ends = []
        for number, seconds in ((1, 0.5), (2, 60)):
            call = asyncio.ensure_future(run(pool, seconds, deadline_s=60))
            await until(lambda number=number: worker._page.read()[1] == number)
            for look in range(number):
                worker.watch(time.monotonic() + 1000 + look)
            ends.append(await call)

    assert [end.status for end in ends] == ["completed", "failed"]
    assert "kept its event loop" in ends[1].error


async def test_a_closed_pool_interrupts_and_leaves_no_process() -> None:
    """What runs when the pool closes is interrupted, and every process is gone."""
    async with ProcessPool() as pool:
        await pool.start(KEY, source(ECHO))
        call = asyncio.ensure_future(run(pool, "wait"))
        await until(lambda: pool.statistics().executing == 1)
        pids = [*pool.pids(), pool.zygote_pid]

    outcome = await call

    assert (outcome.status, outcome.error) == ("interrupted", "Its worker ended before it did: the pool is closed.")
    assert not [pid for pid in pids if psutil.pid_exists(pid)]
    with pytest.raises(NotOpen):
        await run(pool, 1)


async def test_a_worker_that_ended_has_no_timer_left(pool: ProcessPool) -> None:
    """Nothing of a worker is looked at after its end, neither its pidfd nor its page."""
    loop, errors = asyncio.get_running_loop(), []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    (pid,) = pool.pids(KEY)
    await pool.stop(KEY)
    await until(lambda: not psutil.pid_exists(pid))

    ends_at = loop.time() + 0.4
    while loop.time() < ends_at and not errors:
        await asyncio.sleep(0.01)

    assert not errors


async def test_a_worker_that_nobody_waits_for_any_more_is_collected() -> None:
    """Whoever leaves while a worker is being made leaves no process, not even an ended one."""
    before = set(psutil.Process().children())
    async with ProcessPool(IsolationConfig(warm_min=0)) as pool:
        keys = [KEY._replace(version=str(number)) for number in range(10)]
        starting = [asyncio.ensure_future(pool.start(key, source(ECHO, version=key.version))) for key in keys]
        await until(lambda: pool.statistics().forks >= 1)  # the others are asked for, and on their way

    assert {type(each) for each in await asyncio.gather(*starting, return_exceptions=True)} <= {NotOpen, type(None)}
    assert set(psutil.Process().children()) <= before


# -- what does not start ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("def (", "does not compile"),
        ("x = 1", "has no 'Agent'"),
        ("raise RuntimeError('no')", "fails when it is loaded: RuntimeError: no"),
        ("import os; os._exit(7)", "it exited with 7"),
        ("import ctypes; ctypes.string_at(0)", r"it crashed \(SIGSEGV\)"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("while True: pass", "did not load within 5 s"),
        ("bytearray(1 << 40)", "MemoryError"),
        ("open('/etc/passwd')", "Error"),
    ],
)
async def test_a_source_that_does_not_load_is_refused_with_the_reason(text: str, reason: str) -> None:
    """Its top level runs in a worker too; whatever happens there is `AgentInvalid`."""
    # Short only where it is to end: the others have what a busy machine needs to tell the reason.
    load_timeout_s = 5.0 if "5 s" in reason else 60.0
    async with ProcessPool(IsolationConfig(load_timeout_s=load_timeout_s)) as pool:
        with pytest.raises(AgentInvalid, match=reason):
            await pool.start(KEY, source(text))

        assert pool.statistics().agents == 0
        await pool.start(KEY, source(ECHO))


async def test_a_source_that_is_too_large_is_refused() -> None:
    """Before any worker sees it."""
    async with ProcessPool(IsolationConfig(source_bytes_max=10)) as pool:
        with pytest.raises(AgentInvalid, match="at most 10"):
            await pool.start(KEY, source("x" * 11))


async def test_a_version_stands_for_one_source(pool: ProcessPool) -> None:
    """Starting it again is harmless, starting another source under it is refused."""
    await pool.start(KEY, source(ECHO))

    with pytest.raises(VersionConflict):
        await pool.start(KEY, source(SYNC))


async def test_a_version_that_is_not_started_cannot_run(pool: ProcessPool) -> None:
    """Neither one that never was, nor one that was stopped; its worker goes."""
    with pytest.raises(AgentNotFound):
        await run(pool, 1, key=KEY._replace(version="2"))
    (pid,) = pool.pids(KEY)

    await pool.stop(KEY)

    with pytest.raises(AgentNotFound):
        await run(pool, 1)
    await until(lambda: not psutil.pid_exists(pid))


async def test_an_input_that_is_too_large_is_refused() -> None:
    """A bound on what may wait in the host for one worker."""
    async with ProcessPool(IsolationConfig(input_bytes_max=100)) as pool:
        await pool.start(KEY, source(ECHO))
        with pytest.raises(InvalidRequest, match="at most 100"):
            await run(pool, "x" * 100)


async def test_a_kernel_that_lacks_a_part_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no quiet downgrade: the pool does not open, and the error names what is missing."""
    lacking = Achievable(
        level="trusted", missing=(MissingPart("Landlock", "Function not implemented"),), landlock_abi=0
    )
    monkeypatch.setattr(pool_module, "probe", lambda: lacking)

    with pytest.raises(IsolationUnavailable, match=r"it lacks Landlock \(Function not implemented\)"):
        async with ProcessPool():
            raise AssertionError


async def test_a_part_that_fails_in_the_zygote_is_named_too() -> None:
    """A library directory that cannot be shown is a private root that cannot be built."""
    with pytest.raises(IsolationUnavailable, match="private root"):
        async with ProcessPool(IsolationConfig(readable=("/no/such/directory",))):
            raise AssertionError


async def test_a_host_that_lets_nobody_read_its_files_can_isolate() -> None:
    """Its umask, which services often have at 077, is not that of the root that workers see."""
    before = os.umask(0o077)
    try:
        async with ProcessPool() as pool:
            await pool.start(KEY, source(ECHO))
            outcome = await run(pool, 1)
    finally:
        os.umask(before)

    assert outcome.status == "completed"


async def test_a_busy_worker_that_yields_is_no_hog() -> None:
    """A step is from one await to the next: a loop that is never idle and always moves on is not killed."""
    text = """
import asyncio
async def Agent(input, context):
    while True:
        await asyncio.sleep(0)
"""
    async with ProcessPool(IsolationConfig(watch_s=60.0)) as pool:
        await pool.start(KEY, source(text))
        (worker,) = (pool._workers[pid] for pid in pool.pids(KEY))
        call = asyncio.ensure_future(run(pool, 0))
        await until(lambda: worker._page.read()[1] == 1)
        for look in range(5):  # each as if the step that goes on had begun long ago
            since, _ = worker._page.read()
            worker.watch(time.monotonic() + 1000 + look)
            await until(lambda since=since: worker._page.read()[0] not in (0.0, since))

        assert not call.done()
        assert (worker.killed_for, worker.is_leaving) == (None, False)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
