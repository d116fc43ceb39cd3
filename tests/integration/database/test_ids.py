"""Ids from real leases: several processes, forks, pauses, a home shard that goes away."""

import asyncio
import sys
from dataclasses import replace

import pytest

from headrace.database import Database
from headrace.database.ids import Ids, parts_of
from headrace.errors import ConfigError, IdsUnavailable, NotOpen
from headrace.events import IdNodeLost
from headrace.testing import FakeClock

MAKER = """
import asyncio, os, sys
from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.ids import Ids
from headrace.errors import NotOpen

async def main():
    shards = tuple(ShardConfig(name=f"shard-{n}", dsn=url) for n, url in enumerate(sys.argv[1:]))
    config = DatabaseConfig(shards=shards, acquire_timeout_s=20.0)
    async with Database(config) as database, Ids(database, lease_s=300.0) as ids:
        print(ids.node, flush=True)
        for _ in range(20):
            print(*await ids.take(500))
        child = os.fork()
        if not child:
            try:
                ids.next().send(None)
            except NotOpen:
                os._exit(7)
            os._exit(0)
        print("fork", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        sys.stdin.readline()

asyncio.run(main())
"""


class Notes:
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def on(self, event):
        self.events.append(event)


async def test_processes_never_make_the_same_id(database, postgres_urls):
    """Three at once, 10,000 ids each, every one under a node number of its own; a fork of one makes none."""
    makers = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", MAKER, *postgres_urls, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        for _ in range(3)
    ]

    async def told(maker):
        return [await maker.stdout.readline() for _ in range(22)]

    lines = await asyncio.gather(*map(told, makers))  # none of them waits for another to be read
    nodes, forks = [int(each[0]) for each in lines], [each[-1] for each in lines]
    made = [int(number) for each in lines for line in each[1:-1] for number in line.split()]
    for maker in makers:
        await maker.communicate(b"\n")
        assert maker.returncode == 0
    assert sorted(nodes) == [0, 1, 2]
    assert len(made) == len(set(made)) == 30_000
    assert {parts_of(each).node for each in made} == {0, 1, 2}
    assert forks == [b"fork 7\n"] * 3


async def test_a_number_that_was_given_back_starts_above_its_last_id(database):
    """It is free at once, or when time has caught up with a burst; its next holder repeats no id of the one before."""
    made, holders = [], 0
    async with asyncio.timeout(60):
        while holders < 3:
            async with Ids(database) as ids:
                if ids.node == 0:
                    made += await ids.take(5000)
                    holders += 1
    assert made == sorted(set(made))


async def test_ids_are_roughly_in_the_order_of_time(database):
    """Of two processes, an id that is made a tenth of a second later is larger; but for how long a lease took."""
    now = asyncio.get_running_loop().time
    began = now()
    async with Ids(database, lease_s=300.0) as one, Ids(database, lease_s=300.0) as other:
        took_s = now() - began
        for maker, later in ((one, other), (other, one)):
            asked = now()
            earlier = await maker.next()
            made = now()
            while now() < made + 0.1 + took_s:
                await asyncio.sleep(0.01)
            following = await later.next()
            assert following > earlier
            assert parts_of(following).ms - parts_of(earlier).ms < (now() - asked + took_s) * 1000 + 100


async def test_waiting_for_a_lease_does_not_set_its_clock_ahead(database):
    """Its time begins when it is asked for, which others who lease at the same moment may hold up for long."""
    home, clock = database.nodes[database.shard_map.home], FakeClock()
    waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"

    async def made_late():
        async with Ids(database, clock=clock, lease_s=300.0) as ids:
            return await ids.next()

    async with Ids(database) as first, asyncio.TaskGroup() as group:
        async with home.transaction() as holder:
            await holder.fetch("SELECT pg_advisory_xact_lock($1)", 0x69647300)
            late = group.create_task(made_late())
            async with asyncio.timeout(20):
                while not (await holder.fetch(waits))[0][0]:
                    await asyncio.sleep(0.01)
            clock.advance(100.0)
        assert parts_of(await late).ms < parts_of(await first.next()).ms + 90_000


async def test_a_process_that_was_paused_too_long_makes_nothing_under_its_old_number(database):
    """Its lease has ended; the other process has the number, and it gets a new one, or is refused meanwhile."""
    clock, notes = FakeClock(), Notes()
    async with Ids(database, lease_s=1.0, wait_max_s=0.0, clock=clock, observer=notes) as paused:
        before = await paused.next()
        async with asyncio.timeout(60):
            while True:  # it neither renews nor wakes: its clock stands still
                async with Ids(database) as other:
                    if other.node == 0:
                        theirs = await other.take(100)
                        break
                await asyncio.sleep(0.05)
            clock.advance(0.4)
            while IdNodeLost(0) not in notes.events or paused.node is None:
                await asyncio.sleep(0.01)
            after = await paused.take(100)
        assert len({before, *theirs, *after}) == 201


async def test_ids_are_refused_when_the_lease_cannot_be_renewed(database):
    """Until the lease ends they are made, afterwards refused, and made again when it can be renewed."""
    home = database.nodes[database.shard_map.home]
    clock = FakeClock()
    async with Ids(database, lease_s=1.0, wait_max_s=0.1, clock=clock) as ids:
        await home.execute("ALTER TABLE headrace_id_nodes RENAME TO elsewhere")
        clock.advance(0.9)
        async with asyncio.timeout(60):
            while not clock.sleepers:  # until the renewal has failed, and pauses
                await asyncio.sleep(0.01)
        assert await ids.next() > 0
        clock.advance(0.1)
        asked = asyncio.gather(ids.next(), return_exceptions=True)
        while not asked.done():
            await asyncio.sleep(0)
            clock.advance(0.05)
        [refused] = await asked
        assert isinstance(refused, IdsUnavailable)
        assert (
            refused.message == "No id can be made within 0.1 s: the lease of node number 0 ended and was not renewed."
        )
        await home.execute("ALTER TABLE elsewhere RENAME TO headrace_id_nodes")
        async with asyncio.timeout(60):
            while True:
                asked = asyncio.gather(ids.next(), return_exceptions=True)
                while not asked.done():
                    await asyncio.sleep(0.01)
                    if clock.sleepers == 2:  # else the lease that is just asked for would end on its way
                        clock.advance(0.05)
                [answer] = await asked
                if not isinstance(answer, IdsUnavailable):
                    assert answer > 0
                    break


async def test_there_is_no_thousand_and_twenty_fifth(database):
    """All numbers are leased: refused when it opens, not by making ids twice."""
    async with Ids(database):
        home = database.nodes[database.shard_map.home]
        await home.execute(
            "INSERT INTO headrace_id_nodes SELECT n, gen_random_uuid(), 2^53::bigint FROM generate_series(1, 1023) n"
        )
        with pytest.raises(IdsUnavailable, match="All 1024 node numbers are leased"):
            await Ids(database).__aenter__()


async def test_closed_ids_make_none(database):
    """Before they are opened and after."""
    ids = Ids(database)
    with pytest.raises(NotOpen):
        await ids.next()
    async with ids:
        await ids.next()
    with pytest.raises(NotOpen):
        await ids.next()
    with pytest.raises(ConfigError, match="lease_s=0"):
        Ids(database, lease_s=0)


async def test_ids_know_the_home_of_the_map(database, database_config):
    """All processes lease from one shard, in whatever order they name the shards."""
    backwards = replace(database_config, shards=tuple(reversed(database_config.shards)))
    async with Database(backwards) as other, Ids(database) as one, Ids(other) as two:
        assert (one.node, two.node) == (0, 1)
