"""The agent host in memory: deploy, execute, idempotency, time limits, pressure."""

import asyncio
import builtins
import subprocess
import sys
import threading

import pytest

from headrace.agents import AgentHost, AgentsConfig
from headrace.agents.execution import Execution
from headrace.agents.stores.memory import MemoryStore
from headrace.clock import SystemClock
from headrace.errors import (
    AgentInvalid,
    AgentNotFound,
    DatabaseUnavailable,
    ExecutionConflict,
    ExecutionNotFound,
    InvalidRequest,
    Overloaded,
    ResultNotRecorded,
    VersionConflict,
    VersionNotFound,
)
from headrace.events import AgentDeployed, ExecutionNotRecorded

ECHO = "async def Agent(input, context): return input"
GATED = """
import asyncio
import subprocess
import sys
started, gate = asyncio.Event(), asyncio.Event()
runs = []
class Agent:
    async def execute(self, input, context):
        runs.append(input)
        started.set()
        await gate.wait()
        return len(runs)
"""


def module_of(host, agent_id="a", version="1.0.0"):
    """The agent's own module, to open its gates."""

    return sys.modules[host._shelf.find(("default", agent_id, version)).definition.module]


async def test_an_agent_runs_and_its_execution_is_kept():
    """The result of execute is what execution finds later."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        execution = await host.execute("a", {"x": 1})
        kept = await host.execution("a", execution.id)
    assert (kept.status, kept.output, kept.version) == ("completed", {"x": 1}, "1.0.0")
    assert kept.finished_at is not None


async def test_a_synchronous_agent_runs_beside_the_loop():
    """Its blocking does not stop the others."""
    text = (
        "import threading\ngate = threading.Event()\n"
        "class Agent:\n    def execute(self, input, context):\n        gate.wait(60)\n        return 1"
    )
    async with AgentHost() as host:
        await host.deploy("slow", text, version="1.0.0")
        await host.deploy("a", ECHO, version="1.0.0")
        slow = asyncio.create_task(host.execute("slow", None))
        quick = await host.execute("a", 1)
        assert not slow.done()
        assert quick.status == "completed"
        module_of(host, "slow").gate.set()
        assert (await slow).output == 1


async def test_the_agents_own_error_is_a_result():
    """A failing agent is a failed execution, not a failing host."""
    async with AgentHost() as host:
        await host.deploy("a", "async def Agent(input, context): raise ValueError('no rows')", version="1.0.0")
        execution = await host.execute("a", None)
    assert (execution.status, execution.error) == ("failed", "ValueError: no rows")


async def test_an_agent_over_its_time_is_stopped():
    """The execution says timeout, and the agent's clean-up has run."""
    text = """
import asyncio
import subprocess
import sys
cleaned = []
class Agent:
    async def execute(self, input, context):
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append(True)
"""
    async with AgentHost() as host:
        await host.deploy("a", text, version="1.0.0")
        execution = await host.execute("a", None, timeout=0.05)
        assert execution.status == "timeout"
        assert "0.05 s and was stopped" in execution.error
        assert module_of(host).cleaned == [True]


async def test_an_agent_that_will_not_stop_is_left_behind():
    """Whoever swallows the cancellation is reported after the grace, and does not hold its caller."""
    text = """
import asyncio
import subprocess
import sys
gate = asyncio.Event()
class Agent:
    async def execute(self, input, context):
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
"""
    async with AgentHost(AgentsConfig(cancel_grace_s=0.05)) as host:
        await host.deploy("a", text, version="1.0.0")
        execution = await host.execute("a", None, timeout=0.05)
        assert execution.status == "timeout"
        assert "has not stopped yet" in execution.error
        module_of(host).gate.set()


async def test_the_same_execution_id_runs_once():
    """Twenty callers at once, and one later, get one result of one run."""
    async with AgentHost() as host:
        await host.deploy("a", GATED, version="1.0.0")
        callers = [asyncio.create_task(host.execute("a", 1, execution_id="same")) for _ in range(20)]
        while not module_of(host).started.is_set():
            await asyncio.sleep(0)
        module_of(host).gate.set()
        results = await asyncio.gather(*callers)
        later = await host.execute("a", 1, execution_id="same")
        assert module_of(host).runs == [1]
    assert {result.output for result in [*results, later]} == {1}


async def test_an_execution_id_stands_for_one_input():
    """Reusing it for something else is refused."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        await host.execute("a", {"x": 1, "y": 2}, execution_id="e")
        assert (await host.execute("a", {"y": 2, "x": 1}, execution_id="e")).output == {"x": 1, "y": 2}
        with pytest.raises(ExecutionConflict):
            await host.execute("a", {"x": 2}, execution_id="e")


async def test_a_caller_who_leaves_does_not_end_the_execution():
    """A disconnected client finds the result later."""
    async with AgentHost() as host:
        await host.deploy("a", GATED, version="1.0.0")
        caller = asyncio.create_task(host.execute("a", 1, execution_id="e"))
        while not host.running:
            await asyncio.sleep(0)
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        module_of(host).gate.set()
        result = await host.execute("a", 1, execution_id="e")
    assert (result.status, result.output) == ("completed", 1)


async def test_submit_returns_at_once():
    """The execution is on record as queued, then as running, then as completed."""
    async with AgentHost() as host:
        await host.deploy("a", GATED, version="1.0.0")
        submitted = await host.submit("a", 1)
        assert submitted.status == "queued"
        await module_of(host).started.wait()
        assert (await host.execution("a", submitted.id)).status == "running"
        module_of(host).gate.set()
        finished = await host.execute("a", 1, execution_id=submitted.id)
    assert finished.status == "completed"


async def test_running_executions_finish_on_their_version():
    """A deployment while one runs serves the next call, not the running one."""
    async with AgentHost() as host:
        await host.deploy("a", GATED, version="1.0.0")
        old = asyncio.create_task(host.execute("a", 1))
        while not host.running:
            await asyncio.sleep(0)
        module = module_of(host)
        await host.deploy("a", ECHO, version="1.1.0")
        assert (await host.execute("a", "new")).version == "1.1.0"
        module.gate.set()
        assert (await old).version == "1.0.0"
        await host.rollback("a", "1.0.0")
        assert (await host.agent("a")).version == "1.0.0"


async def test_a_broken_version_never_serves():
    """The version in service stays when the new one does not load."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(AgentInvalid):
            await host.deploy("a", "class Agent: pass", version="1.1.0")
        assert (await host.execute("a", 1)).version == "1.0.0"


async def test_a_version_stands_for_one_source():
    """Deploying it again unchanged is harmless, with another source it is refused."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(VersionConflict):
            await host.deploy("a", ECHO + "\n", version="1.0.0")


async def test_what_does_not_exist_is_not_found():
    """Agent, version and execution each have their own error."""
    async with AgentHost() as host:
        with pytest.raises(AgentNotFound):
            await host.execute("nobody", None)
        with pytest.raises(AgentNotFound):
            await host.status("nobody")
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(VersionNotFound):
            await host.rollback("a", "9.9.9")
        with pytest.raises(ExecutionNotFound):
            await host.execution("a", "none")


@pytest.mark.parametrize("timeout", [0, -1, 601])
async def test_a_timeout_has_bounds(timeout):
    """Zero, negative and too long are refused before anything runs."""
    async with AgentHost() as host:
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(InvalidRequest, match="timeout"):
            await host.execute("a", None, timeout=timeout)


async def test_under_pressure_the_less_urgent_goes_first():
    """The last places are kept for high priority, and beyond them everybody is told to come back."""
    async with AgentHost(AgentsConfig(executions_max=10)) as host:
        await host.deploy("a", GATED, version="1.0.0")
        running = [asyncio.create_task(host.execute("a", n)) for n in range(8)]
        while host.running < 8:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await host.execute("a", 0, priority="low")
        running += [asyncio.create_task(host.execute("a", n, priority="high")) for n in range(2)]
        while host.running < 10:
            await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await host.execute("a", 0, priority="high")
        module_of(host).gate.set()
        await asyncio.gather(*running)
        assert host.running == 0


async def test_totals_count_how_executions_ended():
    """The status adds them up."""
    async with AgentHost() as host:
        await host.deploy("a", "async def Agent(input, context): return 1 / input", version="1.0.0")
        for value in (1, 2, 0):
            await host.execute("a", value)
        totals = (await host.status("a")).executions
    assert (totals.completed, totals.failed, totals.timeout) == (2, 1, 0)


async def test_progress_of_a_watched_execution_is_on_record():
    """While it runs, its newest report can be read."""
    text = """
import asyncio
import subprocess
import sys
gate = asyncio.Event()
class Agent:
    async def execute(self, input, context):
        context.progress(3, 10, "third")
        await gate.wait()
"""
    async with AgentHost() as host:
        await host.deploy("a", text, version="1.0.0")
        submitted = await host.submit("a", None)
        while (found := await host.execution("a", submitted.id)).progress is None:
            await asyncio.sleep(0.01)
        module_of(host).gate.set()
    assert (found.status, found.progress.done, found.progress.note) == ("running", 3, "third")


async def test_least_recently_used_definitions_are_unloaded():
    """Memory is bounded, and an unloaded agent loads again when it is asked for."""
    async with AgentHost(AgentsConfig(definitions_max=2)) as host:
        for name in ("a", "b", "c"):
            await host.deploy(name, ECHO, version="1.0.0")
        assert len(host._shelf) == 2
        assert (await host.execute("a", 5)).output == 5


@pytest.mark.parametrize("kind", ["async def", "class"])
async def test_an_agent_that_exits_fails_alone(kind):
    """sys.exit in an agent is its own failure; the host and the others go on."""
    text = "import sys\nasync def Agent(input, context): sys.exit(3)"
    if kind == "class":
        text = "import sys\nclass Agent:\n    def execute(self, input, context): sys.exit(3)"
    async with AgentHost() as host:
        await host.deploy("a", text, version="1.0.0")
        await host.deploy("b", ECHO, version="1.0.0")
        execution = await host.execute("a", None)
        assert (execution.status, execution.error) == ("failed", "SystemExit: 3")
        assert (await host.execute("b", 1)).output == 1


async def test_closing_lets_short_executions_end_and_interrupts_long_ones():
    """Both are on record before the store closes, so a client who was told 202 learns what became of it."""
    kept = {}

    class Store(MemoryStore):
        async def finish(self, execution, *, owner=None, change=None):
            kept[execution.id] = execution.status
            return execution

    text = "import asyncio\nasync def Agent(input, context): await asyncio.sleep(input)"
    host = AgentHost(AgentsConfig(drain_s=1.0, cancel_grace_s=0.1), store=Store(clock=SystemClock()))
    async with host:
        await host.deploy("a", text, version="1.0.0")
        short = await host.submit("a", 0.05)
        long = await host.submit("a", 60)
        while host.started < 2:
            await asyncio.sleep(0)
    assert kept == {short.id: "completed", long.id: "interrupted"}


async def test_closing_is_bounded_even_for_agents_that_never_stop():
    """Whoever swallows every cancellation is interrupted on record, and does not hold the host."""
    text = """
import asyncio
import subprocess
import sys
released = False
class Agent:
    async def execute(self, input, context):
        while not released:
            try:
                await asyncio.sleep(0.02)
            except asyncio.CancelledError:
                continue
"""
    async with asyncio.timeout(60):
        async with AgentHost(AgentsConfig(drain_s=0.05, cancel_grace_s=0.05)) as host:
            await host.deploy("a", text, version="1.0.0")
            submitted = await host.submit("a", None)
            while not host.started:
                await asyncio.sleep(0)
            module, run = module_of(host), host._runs.find(("default", submitted.id))
    assert run.execution.status == "interrupted"
    module.released = True
    await run.task


async def test_threads_are_never_oversubscribed():
    """Of many synchronous executions at once as many run as there are threads; the rest is refused at once."""
    text = (
        "import threading\ngate = threading.Event()\n"
        "class Agent:\n    def execute(self, input, context):\n        gate.wait(100)\n        return 1"
    )
    async with AgentHost(AgentsConfig(threads_max=3)) as host:
        await host.deploy("a", text, version="1.0.0")
        calls = [asyncio.create_task(host.execute("a", n)) for n in range(20)]
        while sum(call.done() for call in calls) < 17:
            await asyncio.sleep(0.001)
        module_of(host).gate.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(result, Overloaded) for result in results) == 17
        assert host.running == 0
        assert (await host.execute("a", 1)).status == "completed"


async def test_a_source_that_does_not_finish_loading_is_refused(monkeypatch):
    """It is given up after its time, and other deployments go on meanwhile."""
    gate = threading.Event()
    monkeypatch.setattr(builtins, "headrace_gate", gate, raising=False)
    text = "import builtins\nbuiltins.headrace_gate.wait(100)\n" + ECHO
    async with AgentHost(AgentsConfig(load_timeout_s=5.0)) as host:
        slow = asyncio.create_task(host.deploy("slow", text, version="1.0.0"))
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(AgentInvalid, match=r"not loaded after 5 s"):
            await slow
        gate.set()
        with pytest.raises(AgentNotFound):
            await host.execute("slow", None)


async def test_an_id_whose_caller_left_while_it_was_claimed_still_runs():
    """A claimed id always gets its run: the next caller finds a result, not a lease to wait for."""
    claiming, gate = asyncio.Event(), asyncio.Event()

    class Store(MemoryStore):
        async def submit(self, submission):
            held = await super().submit(submission)
            claiming.set()
            await gate.wait()
            return held

    host = AgentHost(store=Store(clock=SystemClock()))
    async with host:
        await host.deploy("a", ECHO, version="1.0.0")
        caller = asyncio.create_task(host.execute("a", 5, execution_id="e"))
        await claiming.wait()
        caller.cancel()
        await asyncio.gather(caller, return_exceptions=True)
        gate.set()
        assert (await host.execute("a", 5, execution_id="e")).output == 5
        assert host.running == 0


async def test_a_result_that_cannot_be_stored_is_told_to_everybody():
    """The caller learns that it ran, the observer that a record is missing."""
    events = []

    class Notes:
        def on(self, event):
            events.append(event)

    class Store(MemoryStore):
        async def finish(self, execution, *, owner=None, change=None):
            raise DatabaseUnavailable("away")

    host = AgentHost(observer=Notes(), store=Store(clock=SystemClock()))
    async with host:
        await host.deploy("a", ECHO, version="1.0.0")
        with pytest.raises(ResultNotRecorded, match="completed"):
            await host.execute("a", 5)
    assert [type(event) for event in events] == [AgentDeployed, ExecutionNotRecorded]


async def test_deploying_the_same_version_again_leaks_nothing():
    """The module that is replaced is forgotten."""

    async with AgentHost() as host:
        before = sum(name.startswith("headrace_agent") for name in sys.modules)
        for _ in range(5):
            await host.deploy("a", ECHO, version="1.0.0")
        assert sum(name.startswith("headrace_agent") for name in sys.modules) == before + 1


async def test_the_memory_of_a_host_without_database_is_bounded():
    """Of finished executions only the newest are kept."""
    store = MemoryStore(clock=SystemClock(), executions_max=3)
    for index in range(5):
        await store.finish(Execution(id=str(index), agent_id="a", version="1.0.0", status="completed"))
    with pytest.raises(ExecutionNotFound):
        await store.execution("default", "a", "1")
    assert (await store.execution("default", "a", "4")).id == "4"


def test_the_room_of_the_agents_is_imported_without_a_driver():
    """Neither Redis' nor Postgres' is loaded before a host is made that needs it."""
    listed = "import sys, headrace.agents; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True).stdout.split()
    assert "headrace" in loaded
    assert not {"redis", "hiredis", "psycopg", "psycopg_pool", "sqlglot", "cryptography"} & set(loaded)
