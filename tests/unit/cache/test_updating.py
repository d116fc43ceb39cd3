"""Updates of a cache that has memory alone; with a shared tier see the integration tests."""

from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec import UNSET

from headrace.cache import Cache, CachePolicy, SyncCache
from headrace.errors import Overloaded
from headrace.testing import FakeClock


def count_up(old: object) -> object:
    return 1 if old is UNSET else old + 1  # type: ignore[operator]


def test_threads_lose_no_count():
    """Eight threads count on one key while others write beside it, and every count is there."""
    with SyncCache() as cache, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda turn: (cache.update("n", count_up), cache.set(f"k{turn % 3}", turn)), range(800)))
        assert cache.get("n") == 800


async def test_an_update_keeps_expiry_and_tags():
    """The life of a value goes on through its updates; its tags still remove it."""
    clock = FakeClock()
    async with Cache(clock=clock) as cache:
        await cache.set("n", 1, ttl=10, tags=["t"])
        clock.advance(6)
        assert await cache.update("n", count_up) == 2
        clock.advance(3.5)
        assert await cache.get("n") == 2
        clock.advance(1)
        assert await cache.get("n") is None
        await cache.set("n", 1, tags=["t"])
        await cache.update("n", count_up)
        await cache.invalidate_tag("t")
        assert await cache.get("n") is None


async def test_a_new_value_lives_by_its_policy_or_by_the_call():
    """Without a value before it, an update is a `set`."""
    clock = FakeClock()
    async with Cache(clock=clock, policies=[CachePolicy(ttl=5, jitter=0, stale_max=0)]) as cache:
        await cache.update("policy", count_up)
        await cache.update("call", count_up, ttl=20)
        clock.advance(6)
        assert await cache.get_many(["policy", "call"]) == {"call": 1}


async def test_a_stale_value_does_not_count():
    """What is past its TTL and kept only to stand in is no value to an update."""
    clock = FakeClock()
    async with Cache(clock=clock, policies=[CachePolicy(ttl=5, jitter=0, stale_max=60)]) as cache:
        await cache.set("n", 41)
        clock.advance(6)
        assert await cache.update("n", count_up) == 1


async def test_a_ttl_of_zero_removes():
    """The outcome of an update may be that nothing is kept."""
    async with Cache() as cache:
        await cache.set("n", 1)
        await cache.update("n", count_up, ttl=0)
        assert await cache.get("n", "gone") == "gone"


async def test_a_write_in_between_is_not_overwritten():
    """A value that is set while the update decides is decided on again."""
    async with Cache() as cache:
        await cache.set("n", 1)
        seen = []

        def change(old: int) -> int:
            seen.append(old)
            if len(seen) == 1:
                _set(cache, "n", 10)
            return old + 1

        assert await cache.update("n", change) == 11
        assert seen == [1, 10]


def _set(cache: Cache, key: str, value: object) -> None:
    """With memory alone a coroutine of the cache has nothing to wait for."""
    with pytest.raises(StopIteration):
        cache.set(key, value).send(None)


async def test_a_key_that_others_change_for_ever_is_an_error():
    """The number of attempts is bounded."""
    async with Cache() as cache:
        with pytest.raises(Overloaded, match="while it was being updated"):
            await cache.update("n", lambda old: _set(cache, "n", 1))
