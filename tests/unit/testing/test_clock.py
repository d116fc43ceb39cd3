"""FakeClock: time moves when told, and in the order of the alarms."""

import asyncio

import pytest

from headrace.testing import FakeClock


def test_it_stands_still_until_advanced():
    """Both times move by exactly what they are told."""
    clock = FakeClock(monotonic=5.0, wall=100.0)
    clock.advance(2.5)
    assert (clock.monotonic(), clock.wall()) == (7.5, 102.5)


def test_monotonic_time_never_goes_back():
    """A negative advance is refused."""
    with pytest.raises(ValueError, match="never goes back"):
        FakeClock().advance(-1)


def test_a_wall_jump_leaves_monotonic_time_alone():
    """An NTP step moves the wall clock only."""
    clock = FakeClock(monotonic=5.0)
    clock.set_wall(7.0)
    assert (clock.monotonic(), clock.wall()) == (5.0, 7.0)


async def test_sleepers_wake_in_the_order_of_their_alarms():
    """run_for passes through each alarm at its own time."""
    clock = FakeClock(monotonic=0.0)
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append((name, clock.monotonic()))

    tasks = [asyncio.create_task(sleeper("late", 3)), asyncio.create_task(sleeper("early", 1))]
    await clock.run_for(10)
    await asyncio.gather(*tasks)
    assert woken == [("early", 1.0), ("late", 3.0)]
    assert clock.monotonic() == 10.0


async def test_a_cancelled_sleeper_is_forgotten():
    """Cancelling a sleep neither wakes it nor counts it."""
    clock = FakeClock()
    task = asyncio.create_task(clock.sleep(5))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    clock.advance(10)
    assert clock.sleepers == 0
