"""Following an execution: its events in order, and between them how it is doing."""

import asyncio
import sys

import pytest

from headrace.server.event_stream import EventStreams
from headrace.server.protocols.executions import Executions, Words

STEPS = """
import asyncio
seen = [asyncio.Event() for _ in range(3)]
async def Agent(input, context):
    for n in range(3):
        context.progress(n + 1, 3)
        context.emit(n)
        await seen[n].wait()
    return "done"
"""
PARKED = """
import asyncio
async def Agent(input, context):
    context.emit("parked")
    await asyncio.Event().wait()
"""


class Plain(Words):
    """Writes what comes as it comes, and sets the event of each step that was seen."""

    def __init__(self, steps=()):
        self.told = []
        self.steps = steps

    def said(self, event):
        self.told.append(("said", event.id))
        return b"said\n"

    def seen(self, execution):
        self.told.append(("seen", execution.status, execution.progress and execution.progress.done))
        if execution.progress is not None:
            self.steps[execution.progress.done - 1].set()
        return b"seen\n"

    def end(self, execution):
        self.told.append(("end", execution.status))
        return b"end\n"


class Reader:
    """The other end of a stream."""

    def __init__(self):
        self.text = b""
        self.gone = asyncio.Event()
        self.got = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        self.text += message.get("body", b"")
        self.got.set()

    async def wait_for(self, text):
        async with asyncio.timeout(60):
            while text not in self.text:
                self.got.clear()
                await self.got.wait()


@pytest.fixture
def executions(doors):
    """Over the host of a service."""
    return Executions(doors.headrace.rooms.agents, EventStreams())


async def test_events_come_in_order_and_the_state_between_them(doors, executions):
    """Each event once, a state only when it has changed, the end last; no step is left before it was seen."""
    await doors.deploy("steps", STEPS)
    agent = doors.headrace.rooms.agents._shelf.find(("default", "steps", "1.0.0")).definition.module
    execution = await executions.begin("steps", None, tenant="default")
    words, reader = Plain(sys.modules[agent].seen), Reader()
    async with asyncio.timeout(60):
        await executions.streamed(execution, words, is_left_cancelled=False)(reader.receive, reader.send)

    assert [told for told in words.told if told[0] == "said"] == [("said", 1), ("said", 2), ("said", 3)]
    seen = [told for told in words.told if told[0] == "seen"]
    assert [told[2] for told in seen if told[2] is not None] == [1, 2, 3]
    assert len(set(seen)) == len(seen)
    assert words.told[-1] == ("end", "completed")


@pytest.mark.parametrize(("is_left_cancelled", "status"), [(True, "cancelled"), (False, "running")])
async def test_who_leaves_stops_the_work_or_not(doors, executions, is_left_cancelled, status):
    """As the protocol has it; nothing of the stream is left in either case."""
    await doors.deploy("parked", PARKED)
    execution = await executions.begin("parked", None, tenant="default", execution_id="left")
    reader = Reader()
    following = asyncio.create_task(
        executions.streamed(execution, Plain(), is_left_cancelled=is_left_cancelled)(reader.receive, reader.send)
    )
    await reader.wait_for(b"said")
    reader.gone.set()
    async with asyncio.timeout(60):
        await following

    found = await executions.find("parked", "left", tenant="default")
    assert found.status == status
    assert b"end" not in reader.text


async def test_an_end_is_waited_for_so_long_and_no_longer(doors, executions):
    """Then the execution is told as it is."""
    await doors.deploy("parked", PARKED)
    execution = await executions.begin("parked", None, tenant="default", execution_id="parked")
    async with asyncio.timeout(60):
        while (await executions.find("parked", "parked", tenant="default")).status != "running":
            await asyncio.sleep(0.01)

    assert (await executions.end_of(execution, within_s=0.3)).status == "running"
    await executions.cancel(execution)
    ended = await executions.end_of(execution, within_s=60)
    assert ended.status == "cancelled"
    assert await executions.end_of(ended, within_s=0) is ended


async def test_who_is_gone_before_the_first_word_has_left_too(doors, executions):
    """An ASGI server may say so by an error of the first send."""
    await doors.deploy("parked", PARKED)
    execution = await executions.begin("parked", None, tenant="default", execution_id="early")
    reader = Reader()

    async def broken(message):
        raise OSError("the client is gone")

    async with asyncio.timeout(60):
        await executions.streamed(execution, Plain(), is_left_cancelled=True)(reader.receive, broken)

    assert (await executions.find("parked", "early", tenant="default")).status == "cancelled"
