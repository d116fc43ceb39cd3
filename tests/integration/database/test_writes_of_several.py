"""Writes on several shards that are cut or given up between their commits: who has them is known, or said."""

import asyncio
from dataclasses import replace

import psycopg
import pytest

from headrace.clock import SystemClock
from headrace.database import Database, Reference, Sharded
from headrace.database.postgres.sessions import wrote_at
from headrace.errors import BackendError, OutcomeUnknown, StatementFailed

KEYS = tuple(range(40))
INSERT = f"INSERT INTO t (k) VALUES {', '.join(f'({key})' for key in KEYS)}"
# Shards commit in the order shard-1, shard-0.
LATE = """
CREATE FUNCTION late() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM {wait}; RETURN NEW; END';
CREATE CONSTRAINT TRIGGER late AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED FOR EACH ROW
WHEN (NEW.k IN ({keys})) EXECUTE FUNCTION late()"""


@pytest.fixture
async def two(database, database_config):
    """Two shards with a sharded table."""
    async with Database(replace(database_config, tables={"t": Sharded(key="k")}, lock_timeout_s=25.0)) as two:
        await two.execute("CREATE TABLE t (k int, v int CHECK (v < 5))", everywhere=True)
        yield two


def first_key(two, shard):
    return next(key for key in KEYS if two.locate(key).shard == shard)


async def slow_commit(two, shard, wait):
    """From now on a commit of the shard waits for this call."""
    for statement in LATE.format(wait=wait, keys=first_key(two, shard)).split(";\n"):
        await two.nodes[shard].execute(statement)


async def committing(node):
    """The backend that was made to wait in its commit, once there is one; others commit now and then as well."""
    waits = "wait_event IN ('PgSleep', 'advisory')"
    sql = f"SELECT pid FROM pg_stat_activity WHERE state = 'active' AND query = 'COMMIT' AND {waits}"
    async with asyncio.timeout(15):
        while not (rows := await node.fetch(sql)):
            await asyncio.sleep(0.01)
    return rows[0].pid


async def counts(two):
    return [(await two.nodes[name].fetch("SELECT count(*) FROM t"))[0][0] > 0 for name in ("shard-0", "shard-1")]


@pytest.mark.parametrize(
    ("shard", "said", "kept"),
    [
        ("shard-0", "^Committed on shard-1; unknown on shard-0: ", [False, True]),
        ("shard-1", "^Unknown on shard-1; not committed on shard-0: ", [False, False]),
    ],
)
async def test_a_commit_that_is_cut_is_told_with_where_the_others_are(two, shard, said, kept):
    """Each shard is named with what is known of it; what is not committed was surely undone."""
    await slow_commit(two, shard, "pg_sleep(20)")
    writing = asyncio.ensure_future(two.execute(INSERT, everywhere=True))
    node = two.nodes[shard]
    await node.fetch("SELECT pg_terminate_backend($1, 10000)", (await committing(node),))

    with pytest.raises(OutcomeUnknown, match=said):
        await writing

    assert await counts(two) == kept


async def test_a_caller_who_leaves_between_the_commits_does_not_stop_them(two, postgres_urls):
    """Half of it would be kept, and nobody would know which."""
    await slow_commit(two, "shard-0", "pg_advisory_xact_lock_shared(9)")
    async with await psycopg.AsyncConnection.connect(postgres_urls[0], autocommit=True) as holder:
        await holder.execute("SELECT pg_advisory_lock(9)")
        writing = asyncio.ensure_future(two.execute(INSERT, everywhere=True))
        await committing(two.nodes["shard-0"])
        writing.cancel()
        await asyncio.wait({writing}, timeout=0.2)
    with pytest.raises(asyncio.CancelledError):
        await writing

    assert await counts(two) == [True, True]


async def test_a_caller_who_leaves_before_the_commits_has_written_nothing(two, postgres_urls):
    """As with every transaction: what is done on the first shard while the second one waits is undone."""
    await two.execute("INSERT INTO t VALUES (0), (1), (2), (3), (4), (5)", everywhere=True)
    slow = "UPDATE t SET v = 1 WHERE pg_advisory_xact_lock_shared(9) IS NOT NULL"
    waits = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'advisory' AND query = $1"
    async with await psycopg.AsyncConnection.connect(postgres_urls[1], autocommit=True) as holder:
        await holder.execute("SELECT pg_advisory_lock(9)")
        writing = asyncio.ensure_future(two.execute(slow, everywhere=True))
        async with asyncio.timeout(15):
            while not await two.nodes["shard-1"].fetch(waits, (slow,), read_only=True):
                await asyncio.sleep(0.01)

        writing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await writing

    assert await two.fetch("SELECT k FROM t WHERE v = 1") == []


async def test_its_writer_is_known_to_have_written_on_all_of_them(two):
    """So that replicas which lag are not read by it."""
    began = SystemClock().monotonic()
    await two.execute(INSERT, everywhere=True)
    assert min(wrote_at("shard-0"), wrote_at("shard-1")) > began


@pytest.mark.parametrize("bad_shard", ["shard-0", "shard-1"])
async def test_a_row_that_is_refused_leaves_none_on_any_shard(two, bad_shard):
    """Of many rows, too: the shards commit when all of them have all."""
    rows = [(key, 9 if key == first_key(two, bad_shard) else 1) for key in KEYS]
    with pytest.raises(StatementFailed):
        await two.execute_many("INSERT INTO t VALUES ($1, $2)", rows, everywhere=True)
    assert await counts(two) == [False, False]


@pytest.fixture
async def copied(database, database_config):
    """Two processes that write to a reference table, one of which was told of its shards the other way round."""
    config = replace(database_config, tables={"log": Reference()}, lock_timeout_s=25.0)
    other = replace(config, shards=config.shards[::-1])
    async with Database(config) as one, Database(other) as two:
        for node in database.nodes.values():
            await node.execute("CREATE TABLE log (n bigint, who text, made timestamptz)")
        yield one, two


async def copies(database):
    return [await node.fetch("SELECT n, who FROM log ORDER BY n, who") for node in database.nodes.values()]


async def test_writes_to_a_reference_table_come_to_every_copy_in_one_order(copied):
    """Also those that touch no row in common, so that no row's lock keeps one behind the other."""
    sql = "INSERT INTO log (n, who) SELECT count(*), $1 FROM log"
    for _ in range(25):
        await asyncio.gather(*(each.execute(sql, who) for each, who in zip(copied * 2, "abcd", strict=True)))
    one, other = await copies(copied[0])
    assert one == other
    assert [row.n for row in one] == list(range(100))


async def test_updates_of_one_row_of_a_reference_table_do_not_wait_in_a_circle(copied):
    """Whoever is first on the first shard is first on all."""
    await copied[0].execute("INSERT INTO log (n, who) VALUES (0, '')")
    sql = "UPDATE log SET n = n + 1, who = who || $1"
    for _ in range(25):
        await asyncio.gather(*(each.execute(sql, who) for each, who in zip(copied * 2, "abcd", strict=True)))
    one, other = await copies(copied[0])
    assert one == other
    assert one[0].n == 100


async def test_copies_that_would_get_different_values_are_left_as_they_are(copied):
    """A trigger may compute on every shard for itself; rows that are returned show it."""
    one, _ = copied
    for node in one.nodes.values():
        await node.execute(
            "CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS"
            " 'BEGIN NEW.made = clock_timestamp(); RETURN NEW; END'"
        )
        await node.execute("CREATE TRIGGER stamp BEFORE INSERT ON log FOR EACH ROW EXECUTE FUNCTION stamp()")
    with pytest.raises(BackendError, match="different rows"):
        await one.fetch("INSERT INTO log (n) VALUES (1) RETURNING n, made")
    assert await copies(one) == [[], []]
