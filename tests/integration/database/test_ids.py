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
    async with Database(DatabaseConfig(shards=shards)) as database, Ids(database) as ids:
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
    nodes, made, forks = [], [], []
    for maker in makers:
        nodes.append(int(await maker.stdout.readline()))
        for _ in range(20):
            made += map(int, (await maker.stdout.readline()).split())
        forks.append(await maker.stdout.readline())
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
    async with asyncio.timeout(10):
        while holders < 3:
            async with Ids(database) as ids:
                if ids.node == 0:
                    made += await ids.take(5000)
                    holders += 1
    assert made == sorted(set(made))


async def test_ids_are_roughly_in_the_order_of_time(database):
    """Of two processes, an id that is made a tenth of a second later is larger."""
    async with Ids(database) as one, Ids(database) as other:
        for maker, later in ((one, other), (other, one)):
            earlier = parts_of(await maker.next()).ms
            async with asyncio.timeout(5):
                while parts_of(following := await later.next()).ms < earlier + 100:
                    await asyncio.sleep(0.01)
            assert following > await maker.next() - (200 << 22)


async def test_a_process_that_was_paused_too_long_makes_nothing_under_its_old_number(database):
    """Its lease has ended; the other process has the number, and it gets a new one, or is refused meanwhile."""
    clock, notes = FakeClock(), Notes()
    async with Ids(database, lease_s=1.0, wait_max_s=0.0, clock=clock, observer=notes) as paused:
        before = await paused.next()
        async with asyncio.timeout(10):
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
    async with Ids(database, lease_s=1.0, wait_max_s=0.1) as ids:
        await home.execute("ALTER TABLE headrace_id_nodes RENAME TO elsewhere")
        assert await ids.next() > 0
        refused = None
        async with asyncio.timeout(10):
            while refused is None:
                try:
                    await ids.next()
                    await asyncio.sleep(0.01)
                except IdsUnavailable as error:
                    refused = error.message
        assert refused == "No id can be made within 0.1 s: the lease of node number 0 ended and was not renewed."
        await home.execute("ALTER TABLE elsewhere RENAME TO headrace_id_nodes")
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await ids.next() > 0
                    break
                except IdsUnavailable:
                    await asyncio.sleep(0.01)


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
