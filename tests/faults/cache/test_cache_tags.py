"""Writes under a tag that is being invalidated, or whose invalidation the server has not taken yet."""

import asyncio

import pytest

from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy
from headrace.errors import CacheUnavailable
from headrace.testing import ChaosRemote
from tests.redis_servers import PATIENT, until

STRICT = [CachePolicy(strategy=Strategy.WRITE_THROUGH, stale_max=0)]


@pytest.fixture
async def chaos(server):
    async with ChaosRemote(server.url) as chaos:
        yield chaos


@pytest.fixture
async def strict(chaos):
    """A cache that raises when the shared tier does not take a value; nothing in memory hides what was taken."""
    async with Cache(remote=RemoteConfig(url=chaos.url, **PATIENT), memory=None, policies=STRICT) as cache:
        yield cache


async def test_writes_and_invalidations_of_one_tag_do_not_disturb_each_other(strict):
    """On a healthy server no write fails because its own process invalidates its tag at that moment."""

    async def write(key: str) -> None:
        for number in range(50):
            await strict.set(key, number, tags=["t"])

    async def invalidate() -> None:
        for _ in range(100):
            await strict.invalidate_tag("t")

    await asyncio.gather(*(write(f"k{number}") for number in range(20)), *(invalidate() for _ in range(3)))

    assert strict.statistics().writes_dropped == 0
    await strict.set("k", "last", tags=["t"])
    assert await strict.get("k") == "last"


async def test_a_write_that_follows_an_invalidation_on_its_way_stands(strict):
    """What is written after `invalidate_tag` was called is not taken by it, even if its answer is not there yet."""
    await strict.set("old", 1, tags=["t"])
    invalidating = asyncio.get_running_loop().create_task(strict.invalidate_tag("t"))
    await asyncio.sleep(0)
    assert not invalidating.done()

    await asyncio.gather(*(strict.set(f"k{number}", number, tags=["t"]) for number in range(50)))
    await invalidating

    assert await strict.get_many([f"k{number}" for number in range(50)]) == {f"k{n}": n for n in range(50)}
    assert await strict.get("old") is None


async def test_a_write_delivers_what_its_tag_owes(strict, chaos):
    """An invalidation that the server did not take goes before the next write under that tag, which then stands."""
    await strict.set("old", 1, tags=["t"])
    chaos.refuse("SET", times=1)
    await strict.invalidate_tag("t")

    assert chaos.refused == 1
    await strict.set("new", 2, tags=["t"])
    assert (await strict.get("old"), await strict.get("new")) == (None, 2)


async def test_a_tag_that_stays_owed_refuses_the_write(strict, chaos):
    """While the server takes no invalidation, a strict write under that tag raises, and nothing old comes back."""
    await strict.set("k", "old", tags=["t"])
    chaos.refuse("SET")
    await strict.invalidate_tag("t")

    with pytest.raises(CacheUnavailable, match="did not take"):
        await strict.set("k", "new", tags=["t"])
    assert await strict.get("k") is None
    await until(lambda: not strict._shared._tags_on_way, "no attempt that will be refused is on its way")
    chaos.heal()
    await strict.set("k", "new", tags=["t"])
    assert await strict.get("k") == "new"
