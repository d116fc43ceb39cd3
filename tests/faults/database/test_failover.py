"""A primary that is killed or replaced while it is written to: nothing acknowledged is lost or there twice."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.database import Database, DatabaseConfig
from headrace.database.postgres.outcomes import NOTE, Marker
from headrace.errors import DatabaseUnavailable, OutcomeUnknown
from headrace.events import Event, LeaderChanged, LeaderRefused, OutcomeResolved
from tests.failovers import Load, Pair, ask, frozen, has_caught_up, kill, pair, write, writing


class Notes:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Pair]:
    """A standby that may be behind."""
    with pair(tmp_path, synchronous=False) as servers:
        yield servers


@pytest.fixture
def synchronous(tmp_path: Path) -> Iterator[Pair]:
    """A standby that has everything which was acknowledged."""
    with pair(tmp_path, synchronous=True) as servers:
        yield servers


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


def key_on(database: Database, shard: str) -> str:
    return next(name for name in map(str, range(1000)) if database.locate(name).shard == shard)


@pytest.mark.slow
@pytest.mark.parametrize("resolve_unknown", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
async def test_a_killed_primary_loses_no_acknowledged_write(synchronous, resolve_unknown, grouped):
    """Its standby is promoted: what was acknowledged is there once, what was refused is not, what is unknown at most
    once; asked, the new primary knows of each. The other shard goes on as if nothing had happened."""
    notes, load, beside = Notes(), Load(), Load()
    config = DatabaseConfig(
        shards=synchronous.shards,
        connections_max=8,
        acquire_timeout_s=60.0,
        waiting_max=100_000,
        resolve_unknown=resolve_unknown,
        resolve_wait_s=60.0,
    )
    async with Database(config, observer=notes) as database:
        moving, still = key_on(database, "moving"), key_on(database, "still")
        async with (
            writing(database, moving, load, grouped=grouped),
            writing(database, still, beside, grouped=grouped),
        ):
            await until(lambda: len(load.acknowledged) > 100)
            await asyncio.to_thread(kill, synchronous.first)
            others = len(beside.acknowledged)
            await until(lambda: len(beside.acknowledged) > others + 100)
            await asyncio.to_thread(ask, synchronous.second, "SELECT pg_promote()")
            before = len(load.acknowledged)
            await until(lambda: len(load.acknowledged) > before + 100)
        statistics = database.statistics().shards["moving"]
    found = Counter(n for (n,) in ask(synchronous.second, "SELECT n FROM notes"))

    assert load.acknowledged <= found.keys()
    assert set(found.values()) == {1}
    assert not load.refused & found.keys()
    assert found.keys() <= load.acknowledged | load.unknown
    assert (beside.unknown, beside.refused) == (set(), set())
    assert [event.timeline for event in notes.of(LeaderChanged)] == [2]
    assert statistics.unknown == 0 or not resolve_unknown
    assert statistics.resolved == len(notes.of(OutcomeResolved))
    if resolve_unknown:
        assert load.unknown == set()


async def test_a_lost_write_is_not_taken_for_another_with_its_number(servers):
    """An asynchronous standby takes over without the last transactions, whose numbers it gives out again."""
    config = DatabaseConfig(
        shards=servers.shards[:1], acquire_timeout_s=20.0, resolve_unknown=True, resolve_wait_s=60.0
    )
    async with Database(config) as database:
        node = database.nodes["moving"]
        await database.fetch("SELECT 1")
        # What opening wrote is on both: the numbers that are given out from here on are those of the lost write.
        await until(lambda: has_caught_up(servers.first, servers.second))
        ask(servers.second, "ALTER SYSTEM SET primary_conninfo = 'host=/nowhere'")
        ask(servers.second, "SELECT pg_reload_conf()")
        await until(lambda: not ask(servers.second, "SELECT pid FROM pg_stat_wal_receiver"))
        with psycopg.connect(servers.first.url, cursor_factory=psycopg.RawCursor) as connection:
            connection.execute("INSERT INTO notes VALUES (1)")
            marker = Marker()
            mark = marker.mark(connection.execute(NOTE, marker.next()).fetchall())
        await asyncio.to_thread(kill, servers.first)
        await asyncio.to_thread(ask, servers.second, "SELECT pg_promote()")
        for _ in range(20):
            ask(servers.second, "INSERT INTO notes VALUES (9)")
        assert ask(servers.second, f"SELECT pg_xact_status('{mark.xid}'::xid8)") == [("committed",)]

        with pytest.raises(DatabaseUnavailable, match="did not happen"):
            await node.was_kept(mark, OutcomeUnknown("lost"))


async def test_a_primary_that_was_replaced_is_not_written_to(servers):
    """Both accept writes: the one with the higher timeline gets them, whichever stands first in the list."""
    notes = Notes()
    config = DatabaseConfig(shards=servers.shards[:1], acquire_timeout_s=20.0)
    async with Database(config, observer=notes) as database:
        await database.execute("INSERT INTO notes VALUES (0)")
        await asyncio.to_thread(ask, servers.second, "SELECT pg_promote()")
        await until(lambda: notes.of(LeaderChanged))
        for n in range(1, 20):
            await database.execute("INSERT INTO notes VALUES ($1)", n)
    assert ask(servers.first, "SELECT max(n) FROM notes") == [(0,)]
    assert ask(servers.second, "SELECT max(n) FROM notes") == [(19,)]


async def test_a_replaced_primary_stays_refused_when_the_new_one_is_down(servers):
    """Its data is not what was acknowledged last, so its keys are unavailable, and the error says why."""
    notes = Notes()
    config = DatabaseConfig(shards=servers.shards[:1], acquire_timeout_s=5.0)
    async with Database(config, observer=notes) as database:
        await database.fetch("SELECT 1")  # it knows who leads
        await asyncio.to_thread(ask, servers.second, "SELECT pg_promote()")
        await until(lambda: notes.of(LeaderChanged))
        await asyncio.to_thread(kill, servers.second)
        await until(lambda: notes.of(LeaderRefused))
        with pytest.raises(DatabaseUnavailable):
            await database.execute("INSERT INTO notes VALUES (1)")
    assert ask(servers.first, "SELECT count(*) FROM notes") == [(0,)]
    assert "of timeline 1, and there is one of timeline 2" in notes.of(LeaderRefused)[0].reason


async def test_a_frozen_primary_does_not_hold_up_its_successor(servers):
    """It neither answers nor hangs up: what is under way on it is cut when another one leads, and is unknown."""
    load = Load()
    config = DatabaseConfig(shards=servers.shards[:1], acquire_timeout_s=20.0, connections_max=4)
    async with Database(config) as database:
        await asyncio.gather(*(write(database, "0", n, load, grouped=False) for n in range(8)))
        with frozen(servers.first):
            held = asyncio.gather(*(write(database, "0", n, load, grouped=False) for n in range(8, 12)))
            await asyncio.to_thread(ask, servers.second, "SELECT pg_promote()")
            await held
            await asyncio.gather(*(write(database, "0", n, load, grouped=False) for n in range(12, 30)))
    assert load.refused | load.unknown <= set(range(8, 12))
    assert set(range(12, 30)) <= load.acknowledged
    assert {n for (n,) in ask(servers.second, "SELECT n FROM notes")} >= set(range(12, 30))
