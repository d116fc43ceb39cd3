import asyncio

import pytest

from headrace.cli.bench.alarm import GRANULARITY_S, Alarm
from headrace.clock import SystemClock


@pytest.fixture(params=["timerfd", "loop timer"])
def platform(request, monkeypatch) -> str:
    """Both ways to wake up: that of Linux, and that of everything else."""
    if request.param == "loop timer":
        monkeypatch.setattr("sys.platform", "darwin")
    return request.param


async def test_an_alarm_rings_once_and_not_before_its_time(platform):
    """After the delay that was set, once, until it is set again."""
    now = SystemClock().monotonic
    rings: list[float] = []
    rang = asyncio.Event()

    def ring() -> None:
        rings.append(now())
        rang.set()

    alarm = Alarm(asyncio.get_running_loop(), ring)
    start = now()
    alarm.set(0.03)
    await rang.wait()

    assert len(rings) == 1
    # Half a millisecond: the loop's own timers round to the clock's resolution.
    assert rings[0] - start >= 0.0295
    rang.clear()
    alarm.set(0.0)
    await rang.wait()
    assert rings[1] - rings[0] >= GRANULARITY_S * 0.9
    alarm.close()


async def test_setting_an_alarm_again_replaces_its_time(platform):
    """There is one time at which it rings."""
    rang = asyncio.Event()
    alarm = Alarm(asyncio.get_running_loop(), rang.set)

    alarm.set(3_600.0)
    alarm.set(0.001)

    async with asyncio.timeout(60):
        await rang.wait()
    alarm.close()


async def test_a_closed_alarm_is_silent(platform):
    """Closing it cancels what was set; closing it twice does no harm."""
    rang = asyncio.Event()
    after = asyncio.Event()
    alarm = Alarm(asyncio.get_running_loop(), rang.set)

    alarm.set(0.005)
    alarm.close()
    alarm.close()
    asyncio.get_running_loop().call_later(0.02, after.set)
    await after.wait()

    assert not rang.is_set()
