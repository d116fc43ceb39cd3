"""Open rooms carry out every action, and say why when they cannot."""

import asyncio
import os
import signal

import pytest

from headrace.actions import Action, ClearCache, ResizeMemory, RollbackAgent, ScaleWorkers
from headrace.app import WORKERS_MAX, Rooms, asked_for_workers
from headrace.config import CacheConfig, Config
from headrace.errors import BugError, CallerError, VersionNotFound


@pytest.fixture
async def rooms():
    """Rooms of one process, without Redis and Postgres."""
    async with Rooms(Config()) as rooms:
        yield rooms


async def test_the_cache_is_cleared(rooms):
    """What was cached is loaded anew."""
    await rooms.cache.set("greeting", "hello")
    assert await rooms.cache.get("greeting") == "hello"

    await rooms.apply(ClearCache())

    assert await rooms.cache.get("greeting", default=None) is None


async def test_the_memory_tier_is_resized(rooms):
    """At most so many entries stay."""
    for number in range(100):
        await rooms.cache.set(f"number-{number}", number)
    assert rooms.cache.statistics().entries >= 100

    await rooms.apply(ResizeMemory(entries_max=16))

    assert rooms.cache.statistics().entries <= 16


async def test_an_agent_is_rolled_back(rooms):
    """The earlier version is in service; one that was never deployed cannot be."""
    for version in ("1.0.0", "2.0.0"):
        await rooms.agents.deploy("a", f"async def Agent(input, context): return {version!r}", version=version)
    assert (await rooms.agents.agent("a")).version == "2.0.0"

    await rooms.apply(RollbackAgent(agent_id="a", version="1.0.0"))

    assert (await rooms.agents.agent("a")).version == "1.0.0"
    with pytest.raises(VersionNotFound):
        await rooms.apply(RollbackAgent(agent_id="a", version="3.0.0"))


async def test_workers_are_asked_for(tmp_path):
    """The supervisor gets a number and one signal."""
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, asked.set)
    rooms = await asyncio.to_thread(lambda: Rooms(Config(), directory=tmp_path, supervisor_pid=os.getpid()))
    try:
        async with rooms:
            assert await asyncio.to_thread(asked_for_workers, tmp_path) is None
            await rooms.apply(ScaleWorkers(workers=7))
            async with asyncio.timeout(10):
                await asked.wait()
            assert await asyncio.to_thread(asked_for_workers, tmp_path) == 7
            for workers in (0, WORKERS_MAX + 1):
                with pytest.raises(CallerError, match=f"not {workers}"):
                    await rooms.apply(ScaleWorkers(workers=workers))
            assert await asyncio.to_thread(asked_for_workers, tmp_path) == 7
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


async def test_without_a_supervisor_nothing_is_scaled(rooms):
    """It says what would help."""
    with pytest.raises(CallerError, match="headrace up"):
        await rooms.apply(ScaleWorkers(workers=2))


async def test_without_a_memory_tier_there_is_nothing_to_resize():
    """It says what would help."""
    async with Rooms(Config(cache=CacheConfig(memory=None))) as rooms:
        with pytest.raises(CallerError, match=r"cache\.memory"):
            await rooms.apply(ResizeMemory(entries_max=10))


async def test_an_action_that_nobody_carries_out_is_a_bug(rooms):
    """It is not passed over."""

    class Unheard(Action, frozen=True):
        """Of no use."""

    with pytest.raises(BugError, match="Unheard"):
        await rooms.apply(Unheard())
