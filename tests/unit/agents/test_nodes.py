"""What a node does beside its work: it deletes what is old, as fast as it comes, in a part of its time."""

import asyncio
from dataclasses import replace

import pytest

from headrace.agents.admission import Admission
from headrace.agents.config import AgentsConfig
from headrace.agents.nodes import Membership
from headrace.agents.stores.memory import MemoryStore
from headrace.clock import SystemClock
from headrace.errors import DatabaseUnavailable
from headrace.events import NodeFenced, Silent
from headrace.testing import FakeClock


class Grows(MemoryStore):
    """A shard where 10,000 executions a second grow old, and that deletes 50,000 a second."""

    def __init__(self, time):
        super().__init__(clock=SystemClock())
        self.time = time
        self.began = time.monotonic()
        self.deleted = 0
        self.spent_s = 0.0
        self.fails = 0

    async def forget(self, shard, *, older_than_s, limit):
        if self.fails:
            self.fails -= 1
            raise DatabaseUnavailable("It is away.")
        count = min(limit, int(10_000 * (self.time.monotonic() - self.began)) - self.deleted)
        self.deleted += count
        took_s = 0.001 + count / 50_000
        self.spent_s += took_s
        await self.time.sleep(took_s)
        return count


def membership_of(store, time, observer, *, known=()):
    """One node, with what is under way on it."""
    return Membership(
        store,
        AgentsConfig(),
        Admission(lambda tenant: None, queued_max=1),
        name="n",
        clock=time,
        observer=observer,
        cancel=lambda key: None,
        interrupt=lambda owner: 0,
        known=lambda: list(known),
    )


@pytest.fixture
async def grows():
    """That shard, kept by one node."""
    time = FakeClock()
    store = Grows(time)
    membership = membership_of(store, time, Silent())
    await membership.open()
    yield store
    await membership.close()


async def passes(grows, seconds):
    """So much time."""
    await grows.time.run_for(seconds)


def left(grows):
    """What is old and there."""
    return 10_000 * (grows.time.monotonic() - grows.began) - grows.deleted


async def test_what_is_old_is_deleted_as_fast_as_it_comes(grows):
    """In a part of the time alone: at most a few minutes of it are left at any time."""
    await passes(grows, 1_000)
    assert left(grows) < 10_000 * 200
    assert grows.spent_s < 0.35 * 1_000


async def test_a_node_that_was_fenced_has_joined_again_when_that_is_told():
    """Whoever hears of it may give it work at once."""
    told = []

    class Notes:
        def on(self, event):
            told.append((type(event), membership.is_member(event.shard)))

    class Gone(MemoryStore):
        async def beat(self, shard, node, **more):
            return replace(await super().beat(shard, node, **more), is_member=False)

    time = FakeClock()
    store = Gone(clock=time)
    membership = membership_of(store, time, Notes())
    await membership.open()
    (shard,) = store.shards
    before = membership.owner(shard)
    await membership.beat(shard)
    after = membership.owner(shard)
    await membership.close()

    assert told == [(NodeFenced, True)]
    assert after != before


async def test_a_node_that_was_fenced_says_so_though_it_is_closed_before_it_has_joined():
    """What it ran has been stopped by then."""
    told, joins = [], asyncio.Event()

    class Notes:
        def on(self, event):
            told.append(type(event))

    class Gone(MemoryStore):
        async def beat(self, shard, node, **more):
            return replace(await super().beat(shard, node, **more), is_member=False)

        async def join(self, shard, node, **more):
            if is_away:
                joins.set()
                await asyncio.Event().wait()

    time, is_away = FakeClock(), False
    store = Gone(clock=time)
    membership = membership_of(store, time, Notes())
    await membership.open()
    is_away = True
    (shard,) = store.shards
    beat = asyncio.create_task(membership.beat(shard))
    await joins.wait()
    beat.cancel()
    await asyncio.wait([beat])
    await membership.close()

    assert told == [NodeFenced]


async def test_a_shard_that_was_away_is_looked_at_again(grows):
    """The backlog is deleted after it."""
    grows.fails = 3
    await passes(grows, 1_000)
    assert grows.fails == 0
    assert left(grows) < 10_000 * 200


class Leaves(MemoryStore):
    """A shard that notes who left."""

    def __init__(self):
        super().__init__(clock=SystemClock())
        self.gone = []

    async def leave(self, shard, node):
        self.gone.append(node)


@pytest.mark.parametrize("known", [[], [("tenant", "x-1")]], ids=["idle", "busy"])
async def test_a_node_leaves_when_all_of_it_has_stopped(known):
    """Then others need not wait for its lease to end; while an agent that was left behind goes on, they have to."""
    store = Leaves()
    membership = membership_of(store, FakeClock(), Silent(), known=known)
    await membership.open()
    await membership.close()
    assert len(store.gone) == (0 if known else 1)
