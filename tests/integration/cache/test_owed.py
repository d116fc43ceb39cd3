"""Callers beside an invalidation that is owed, and a server that cannot be told of it yet."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from msgspec import UNSET

from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy
from headrace.errors import CacheUnavailable
from headrace.testing import TcpProxy
from tests.redis_servers import CLOCK, PATIENT, is_idle, until

STRICT = CachePolicy(strategy=Strategy.WRITE_THROUGH, ttl=60, jitter=0, stale_max=0)
CALLS = {
    "set": lambda cache: cache.set("k", 1),
    "set with tags": lambda cache: cache.set("k", 1, tags=["t"]),
    "set_many": lambda cache: cache.set_many({"k": 1, "l": 2}),
    "update": lambda cache: cache.update("k", lambda _: 1),
    "update of another key": lambda cache: cache.update("free", lambda _: 1),
}


@pytest.fixture(params=["lost", "never reached"])
async def cut_off(request, server) -> AsyncIterator[Cache]:
    """A strict cache without a server."""
    if request.param == "never reached":
        server.stop()
    async with Cache(remote=RemoteConfig(url=server.url, **PATIENT), policies=[STRICT]) as cache:
        server.stop()
        await until(lambda: cache._shared._remote._only._down is not None, "calls fail at once")
        yield cache


@pytest.mark.parametrize("owed", ["nothing", "key", "tag", "clear"])
@pytest.mark.parametrize("call", CALLS)
async def test_a_refused_call_gives_the_loop_its_turn(cut_off, call, owed):
    """Who tries again at once, and for ever, does not keep the loop from connecting and delivering."""
    match owed:
        case "key":
            await cut_off.delete("k")
        case "tag":
            await cut_off.invalidate_tag("t")
        case "clear":
            await cut_off.clear()
    turn = asyncio.Event()
    asyncio.get_running_loop().call_soon(turn.set)
    with pytest.raises(CacheUnavailable):
        await CALLS[call](cut_off)
    assert turn.is_set()


async def test_who_tries_again_at_once_gets_through(cut_off, server):
    """A caller that never pauses between its tries is served soon after the server is back, what is owed first."""
    await cut_off.clear()
    await asyncio.to_thread(server.start)
    give_up_at = CLOCK.monotonic() + 60
    for call in CALLS.values():
        while CLOCK.monotonic() < give_up_at:
            try:
                await call(cut_off)
                break
            except CacheUnavailable:
                continue
    assert CLOCK.monotonic() < give_up_at, "the server is back, and nobody got through"
    assert not cut_off._shared.owed.is_owed
    assert await cut_off.get("k") == 1


async def test_an_update_before_the_names_are_known_touches_no_others(server, monkeypatch):
    """With a key owed, and the generation not learnt yet, nothing outside the namespace is removed."""
    server.stop()
    async with Cache(remote=RemoteConfig(url=server.url, **PATIENT)) as cache:
        await cache.delete("k")

        async def learn_nothing() -> None:
            """The answer is on its way."""

        learn = cache._shared.learn_generation
        monkeypatch.setattr(cache._shared, "learn_generation", learn_nothing)
        await asyncio.to_thread(server.start)
        server.call("SET", "k}", "another application's")
        await until(lambda: cache._shared.is_available, "connected")
        with pytest.raises(CacheUnavailable):
            await cache.update("k", lambda _: 1)
        assert server.call("GET", "k}") == b"another application's"
        await learn()
        assert await cache.update("k", lambda old: old) is UNSET


@pytest.mark.parametrize("how", ["clear", "pattern"])
async def test_an_invalidation_that_its_caller_gives_up_is_delivered_at_once(server, monkeypatch, how):
    """What a cancelled caller leaves owed does not wait for the next look around."""
    monkeypatch.setattr("headrace.cache.shared.GENERATION_CHECK_S", 3600.0)
    async with TcpProxy(server.socket) as proxy:
        remote = RemoteConfig(url=f"redis://{proxy.address}/0", tracking=False, **PATIENT)
        async with Cache(remote=remote, policies=[STRICT]) as cache:
            await cache.set("k", 1)
            await until(lambda: is_idle(cache) and not cache._shared._wake.is_set(), "nothing is on its way")
            proxy.deaf()
            name = "*" if how == "clear" else "k*"
            calling = asyncio.ensure_future(cache.clear() if how == "clear" else cache.invalidate_pattern(name))
            await until(lambda: cache._shared._on_way.brings(name), "it is on its way")
            calling.cancel()
            await asyncio.wait([calling])
            assert cache._shared.owed.is_owed
            proxy.heal()
            await until(lambda: not cache._shared.owed.is_owed, "it was delivered")
            assert await cache.get("k") is None


async def test_a_pattern_that_was_delivered_meanwhile_is_not_walked_for_again(open_cache):
    """Several patterns are owed, and the caller of one calls again while another is delivered: one walk is enough."""
    cache = await open_cache(remote={"tracking": False})
    shared = cache._shared
    shared._upkeep.cancel()  # nobody else delivers
    await asyncio.wait([shared._upkeep])
    await cache.set("second:1", 1)
    shared.owed.add_pattern("first:*")
    shared.owed.add_pattern("second:*")
    walk, walks = shared._remote.unlink_matching, []

    async def noted(entries, kind):
        walks.append(entries)
        if len(walks) == 1:
            assert await cache.invalidate_pattern("second:*") == 1
        return await walk(entries, kind)

    shared._remote.unlink_matching = noted
    await shared.deliver_owed()
    assert len(walks) == 2
    assert not shared.owed.is_owed
