"""What executions emit: in order, bounded, resumable, from threads too."""

import asyncio
import sys

import pytest

from headrace.agents import AgentHost, AgentsConfig
from headrace.agents.execution import Execution
from headrace.agents.running.streams import Streams
from headrace.agents.stores.memory import MemoryStore
from headrace.clock import SystemClock
from headrace.errors import ExecutionNotFound

TALKS = """
import asyncio
gate, begun = asyncio.Event(), asyncio.Event()
async def Agent(input, context):
    for n in range(input):
        context.emit({"n": n})
    begun.set()
    await gate.wait()
    context.emit("last")
"""


def module_of(host, agent_id="a", version="1.0.0"):
    return sys.modules[host._shelf.find(("default", agent_id, version)).definition.module]


async def everything(host, execution_id, **options):
    return [event async for event in host.events(execution_id, **options)]


async def test_events_come_in_order_and_end_with_the_execution():
    """A reader that was there from the start gets all of them."""
    async with AgentHost() as host:
        await host.deploy("a", TALKS, version="1.0.0")
        call = asyncio.create_task(host.execute("a", 3, execution_id="e"))
        await asyncio.sleep(0)
        while host.started < 1:
            await asyncio.sleep(0)
        reader = asyncio.create_task(everything(host, "e"))
        await module_of(host).begun.wait()
        module_of(host).gate.set()
        events = await reader
        await call
    assert [(event.id, bytes(event.data), event.dropped) for event in events] == [
        (1, b'{"n":0}', 0),
        (2, b'{"n":1}', 0),
        (3, b'{"n":2}', 0),
        (4, b'"last"', 0),
    ]


async def test_a_reader_goes_on_after_the_last_event_that_it_got():
    """While it runs and when it has ended; nothing comes twice."""
    async with AgentHost() as host:
        await host.deploy("a", TALKS, version="1.0.0")
        await host.submit("a", 3, execution_id="e")
        reader = host.events("e")
        first = [await anext(reader), await anext(reader)]
        await reader.aclose()
        module_of(host).gate.set()
        rest = await everything(host, "e", after=first[-1].id)
        late = await everything(host, "e", after=3)
    assert [event.id for event in [*first, *rest]] == [1, 2, 3, 4]
    assert [event.id for event in late] == [4]


async def test_a_slow_reader_is_told_how_much_it_missed():
    """The buffer is bounded by number and by bytes; the oldest go first."""
    for limits, kept in [({"events_max": 10}, 10), ({"events_bytes_max": 90}, 11)]:
        async with AgentHost(AgentsConfig(**limits)) as host:
            await host.deploy("a", TALKS, version="1.0.0")
            await host.submit("a", 100, execution_id="e")
            while not host.started:
                await asyncio.sleep(0)
            await module_of(host).begun.wait()
            reader = host.events("e", after=5)
            first, second = await anext(reader), await anext(reader)
            module_of(host).gate.set()
            rest = [event async for event in reader]
        assert (first.id, first.dropped, second.dropped) == (101 - kept, 101 - kept - 6, 0)
        assert rest[-1].id == 101


async def test_an_asynchronous_generator_emits_what_it_yields():
    """Its output is what it yielded last; it is closed when it is cancelled."""
    text = """
import asyncio
closed = []
class Agent:
    async def execute(self, input, context):
        try:
            for n in range(input):
                yield n
            if input > 5:
                await asyncio.sleep(60)
        finally:
            closed.append(True)
"""
    async with AgentHost() as host:
        await host.deploy("a", text, version="1.0.0")
        result = await host.execute("a", 3, execution_id="e")
        endless = asyncio.create_task(host.execute("a", 9, execution_id="f"))
        reader = host.events("e")
        assert result.output == 2
        assert [bytes(event.data) async for event in reader] == [b"0", b"1", b"2"]
        while host.started < 2:
            await asyncio.sleep(0)
        assert [(await anext(stream)).id for stream in [host.events("f")]] == [1]
        await host.cancel("f")
        assert (await endless).status == "cancelled"
        assert module_of(host).closed == [True, True]


async def test_a_thread_may_emit():
    """Readers are woken on the loop."""
    text = (
        "class Agent:\n    def execute(self, input, context):\n"
        "        for n in range(50):\n            context.emit(n)\n"
    )
    async with AgentHost() as host:
        await host.deploy("a", text, version="1.0.0")
        await host.submit("a", None, execution_id="e")
        events = await everything(host, "e")
    assert [event.id for event in events] == list(range(1, 51))


async def test_what_cannot_be_an_event_fails_in_the_agent():
    """Where the mistake is."""
    async with AgentHost(AgentsConfig(event_bytes_max=100)) as host:
        for name, value in [("a", "object()"), ("b", "'x' * 200")]:
            await host.deploy(name, f"async def Agent(input, context): context.emit({value})", version="1.0.0")
            result = await host.execute(name, None)
            assert (result.status, "An emitted event" in result.error) == ("failed", True)


async def test_a_second_attempt_counts_from_far_above():
    """Readers go on with it without mistaking its events for those of the first."""
    text = (
        "async def Agent(input, context):\n    context.emit(context.attempt)\n    context.emit('end')\n"
        "    if context.attempt == 1: raise OSError\n"
    )
    async with AgentHost(AgentsConfig(retry_first_s=0.01, queue_poll_s=0.05)) as host:
        await host.deploy("a", text, version="1.0.0", idempotent=True)
        await host.submit("a", None, execution_id="e")
        events = await everything(host, "e")
    assert [event.id for event in events] == [1, 2, 2**32 + 1, 2**32 + 2]
    assert {event.dropped for event in events} == {0}


async def test_an_execution_that_does_not_exist_says_nothing():
    """It is not found, under its agent's name neither."""
    async with AgentHost() as host:
        await host.deploy("a", TALKS, version="1.0.0")
        with pytest.raises(ExecutionNotFound):
            await everything(host, "none")
        await host.submit("a", 0, execution_id="e")
        with pytest.raises(ExecutionNotFound):
            await everything(host, "e", agent_id="b")
        module_of(host).gate.set()


async def test_events_are_written_in_bounded_statements(monkeypatch):
    """However much was said meanwhile, and nothing of it twice."""
    monkeypatch.setattr("headrace.agents.running.streams._WRITE_BYTES_MAX", 100)
    clock, batches = SystemClock(), []

    class Store(MemoryStore):
        async def keep_events(self, shard, events, **more):
            batches.append(sum(len(event.data_json) for event in events))
            await super().keep_events(shard, events, **more)

    store = Store(clock=clock)
    streams = Streams(store, AgentsConfig(), clock=clock)
    said = [
        Execution(id=str(n), agent_id="a", version="1", status="running", started_at=clock.wall()) for n in range(6)
    ]
    for execution in said:
        for _ in range(2):
            streams.emit(execution, "x" * 28, is_durable=True)
    await streams.write()
    await streams.write()
    assert batches == [120, 120, 120]
    assert [len(await store.events("default", execution.id, after=0, limit=9)) for execution in said] == [2] * 6
