"""The record of a run, its output as JSON, and the CPU meter."""

import asyncio
import time

import msgspec
import pytest

from headrace.agents.execution import JSON_DEPTH_MAX, Context, Execution, Metered, Progress, encoded, failure, timed_id
from headrace.testing import FakeClock


def spin(seconds):
    """Use the CPU."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        time.thread_time()


async def test_only_its_own_steps_are_counted():
    """CPU that other tasks use between two steps is not the agent's."""

    async def agent():
        spin(0.02)
        await asyncio.sleep(0.01)
        spin(0.02)
        return "done"

    async def other():
        spin(0.5)

    metered = Metered(agent())

    async def run():
        return await metered

    result, _ = await asyncio.gather(run(), other())
    assert result == "done"
    assert 0.04 <= metered.cpu_s < 0.5


async def test_cancellation_reaches_the_agent():
    """The agent's own clean-up runs before the cancellation goes on."""
    cleaned = []

    async def agent():
        try:
            await asyncio.sleep(10)
        finally:
            cleaned.append(True)

    async def run():
        return await Metered(agent())

    task = asyncio.create_task(run())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert cleaned == [True]


async def test_an_exception_thrown_in_can_be_handled_inside():
    """A timeout that the agent handles is not an error of the meter."""

    async def agent():
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(10)
        except TimeoutError:
            return "handled"

    async def run():
        return await Metered(agent())

    assert await run() == "handled"


def test_an_output_is_encoded_once():
    """What can be JSON becomes JSON, NUL characters included."""
    outcome = encoded({"a": [1, None, "\x00"]}, bytes_max=100)
    assert (outcome.status, outcome.output_json) == ("completed", b'{"a":[1,null,"\\u0000"]}')


@pytest.mark.parametrize(
    ("output", "named"), [(object(), "cannot be written as JSON"), ("x" * 200, "202 bytes"), ("\ud800", "JSON")]
)
def test_an_output_that_cannot_go_back_fails_the_execution(output, named):
    """The error says why, and it is the agent's failure, not the server's."""
    outcome = encoded(output, bytes_max=100)
    assert outcome.status == "failed"
    assert named in outcome.error


def test_errors_lose_what_no_text_column_can_hold():
    """NUL and lone surrogates are replaced, the rest stays."""
    outcome = failure(ValueError("a\x00b\ud800c"))
    assert outcome.error == "ValueError: a\N{REPLACEMENT CHARACTER}b?c"


def test_the_context_tells_and_takes():
    """An agent sees who it is and how long it has; its progress lands in the record."""
    clock = FakeClock(monotonic=10.0)
    execution = Execution(id="e", agent_id="a", version="1.0.0", status="running", tenant="t")
    context = Context(execution, clock, deadline=15.0)
    clock.advance(2)
    context.progress(1, 4, "reading")
    assert (context.agent_id, context.version, context.execution_id, context.tenant) == ("a", "1.0.0", "e", "t")
    assert context.remaining_s() == 3.0
    assert execution.progress == Progress(1, 4, "reading")


@pytest.mark.parametrize("wrap", [b"[%b]", b'{"[":%b}', b'["]",%b,"\\\\"]', b'[[],"\\"]",%b]'])
def test_an_output_is_only_so_deep(wrap):
    """Deeper ones are refused where they come in, so that nobody fails who reads them later; brackets in text are no
    depth, and neither are many beside each other."""
    inside = b"[" + b",".join([b"[]"] * 500) + b"]"
    for _ in range(JSON_DEPTH_MAX - 2):
        inside = wrap % inside
    assert encoded(msgspec.Raw(inside), bytes_max=1 << 20).status == "completed"
    refused = encoded(msgspec.Raw(wrap % inside), bytes_max=1 << 20)
    assert (refused.status, "deeper than" in refused.error) == ("failed", True)


def test_an_output_is_one_line():
    """A `msgspec.Raw` with line breaks too, so that it cannot end a line of whoever streams it."""
    assert encoded(msgspec.Raw(b'{"a":\r\n1}'), bytes_max=100).output_json == b'{"a":  1}'


def test_ids_are_in_the_order_of_time():
    """To the microsecond: what was made later sorts behind, also within a millisecond; and no two are alike."""
    walls = [1_763_000_000.000_100, 1_763_000_000.000_200, 1_763_000_000.001, 1_763_000_001.0]
    ids = [timed_id(wall) for wall in walls]
    assert ids == sorted(ids)
    assert {len(each) for each in ids} == {32}
    assert len({timed_id(walls[0]) for _ in range(1_000)}) == 1_000


@pytest.mark.parametrize(
    ("status", "passed_s", "expected"), [("running", 4, False), ("cancelling", 4, True), ("running", 6, True)]
)
def test_an_agent_sees_that_nobody_wants_its_result(status, passed_s, expected):
    """Cancelled, or past its deadline."""
    clock = FakeClock()
    context = Context(Execution(id="e", agent_id="a", version="1", status=status), clock, clock.monotonic() + 5)
    clock.advance(passed_s)
    assert context.should_stop is expected
