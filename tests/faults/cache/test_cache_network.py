"""A network between the cache and Redis that holds up, delays, tears and refuses, while both ends are well."""

import asyncio
import itertools
from collections.abc import AsyncIterator

import pytest

from headrace.cache import Cache, RemoteConfig
from headrace.events import TierUnavailable
from headrace.testing import TcpProxy
from tests.redis_servers import CLOCK, IMPATIENT_S, PATIENT, at_once, impatient, set_patience, until


@pytest.fixture
async def proxy(server) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(server.socket) as proxy:
        yield proxy


@pytest.fixture
async def far(proxy, witness) -> AsyncIterator[Cache]:
    """A cache behind the bad network, without copies in memory."""
    remote = RemoteConfig(url=f"redis://{proxy.address}/0", **PATIENT)
    async with Cache(remote=remote, memory=None, observer=witness) as cache:
        yield cache


async def usable(cache: Cache) -> None:
    """Return when values reach the shared tier again."""
    async with asyncio.timeout(60):
        for number in itertools.count():
            await cache.set("probe", number)
            if await cache.get("probe") == number:
                return
            await asyncio.sleep(0.02)


async def test_a_silent_network_costs_one_timeout(far, proxy, witness):
    """While nothing passes, calls answer within the timeout, then at once; when it passes again, so do they."""
    await far.set("k", 1)
    async with impatient(far):
        proxy.deaf()
        started = CLOCK.monotonic()
        assert await far.get("k", "away") == "away"
        assert CLOCK.monotonic() - started < 50 * IMPATIENT_S
        await until(lambda: witness.seen(TierUnavailable), "the silence is noticed")
        assert [at_once(far.get("k", "away")) for _ in range(50)] == ["away"] * 50
        proxy.heal()
    await usable(far)
    assert await far.get("k") == 1


async def test_a_delete_whose_reply_is_lost_is_made_sure_of(far, proxy, open_cache):
    """With the outcome unknown the key is not believed until the delete was delivered again."""
    near = await open_cache(memory=None)
    await far.set("k", "old")
    proxy.deaf(to_server=False)
    deleting = asyncio.get_running_loop().create_task(far.delete("k"))
    while await near.get("k") is not None:
        await asyncio.sleep(0.01)
    await near.set("k", "new")
    set_patience(far, IMPATIENT_S)
    proxy.cut()
    await deleting
    assert await far.get("k") is None
    proxy.heal()
    set_patience(far, PATIENT["timeout"])
    await usable(far)
    await until(lambda: not far._shared.owed.is_owed, "the delete was delivered again")
    assert await far.get("k") == await near.get("k")


async def test_torn_replies_are_never_a_wrong_value(far, proxy):
    """Connections that end in the middle of a reply give the value or nothing, whatever byte it is."""
    values = {f"k{number}": f"value of {number}" * 20 for number in range(20)}
    await far.set_many(values)
    for after_bytes in range(0, 3000, 150):
        proxy.cut(after_bytes=after_bytes)
        found = await asyncio.gather(*map(far.get, values))
        assert all(value in {None, values[key]} for key, value in zip(values, found, strict=True))
        await usable(far)
    assert await far.get_many(values) == values
    assert proxy.accepted > 10


async def test_a_slow_network_is_not_a_dead_one(proxy):
    """Below the timeout every call arrives, and those made together take one delay, not many."""
    remote = RemoteConfig(url=f"redis://{proxy.address}/0", **PATIENT)
    async with Cache(remote=remote, memory=None) as cache:
        await cache.set_many({f"k{number}": number for number in range(100)})
        proxy.delay(0.2)
        started = CLOCK.monotonic()
        assert await asyncio.gather(*(cache.get(f"k{number}") for number in range(100))) == list(range(100))
        assert 0.35 < CLOCK.monotonic() - started < 15  # one by one it would be 40 s


async def test_a_refused_connection_is_tried_again(far, proxy):
    """With nobody listening calls degrade at once; they work again soon after somebody does."""
    await far.set("k", 1)
    await proxy.stop()
    assert await far.get_or_load("k", lambda: "loaded") == "loaded"
    await proxy.start()
    await usable(far)
