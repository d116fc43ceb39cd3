"""Two-phase transactions end the same way on every shard, whoever is killed, slow or unreachable."""

import asyncio
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace

import psycopg
import pytest

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.postgres.two_phase import Part
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import ConfigError, DatabaseUnavailable, StatementFailed, StatementRefused
from headrace.events import Event, TransactionsInDoubt, TransactionsRecovered

SHARDS = ("shard-0", "shard-1")
INSERT = "INSERT INTO parts VALUES ('a')"


class Notes:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[EmbeddedPostgres]:
    """One Postgres whose databases are the shards, so that the names of their parts must not collide."""
    with started(EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), name="pg")) as server:
        yield server


@pytest.fixture
def config(server) -> DatabaseConfig:
    """Two shards with an empty table each."""
    shards = []
    with psycopg.connect(server.url, autocommit=True) as connection:
        for gid, database in connection.execute("SELECT gid, database FROM pg_prepared_xacts").fetchall():
            with psycopg.connect(server.url.replace("/headrace?", f"/{database}?"), autocommit=True) as owner:
                owner.execute(f"ROLLBACK PREPARED '{gid}'")
        for name in SHARDS:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            connection.execute(f'CREATE DATABASE "{name}"')
            shards.append(ShardConfig(name=name, dsn=server.url.replace("/headrace?", f"/{name}?")))
    for shard in shards:
        with psycopg.connect(shard.dsn) as connection:
            connection.execute("CREATE TABLE parts (said text)")
    return DatabaseConfig(shards=tuple(shards), connections_max=4, acquire_timeout_s=20.0)


@pytest.fixture
def impatient(config) -> DatabaseConfig:
    """What is not decided after a second counts as abandoned."""
    return replace(config, two_phase_abandoned_s=1.0)


def keys(database: Database) -> list[str]:
    """One key of each shard."""
    return [next(k for k in map(str, range(1000)) if database.locate(k).shard == name) for name in SHARDS]


async def said(database: Database) -> list[list[str]]:
    return [[row[0] for row in await node.fetch("SELECT said FROM parts")] for node in database.nodes.values()]


async def write(database: Database, *writes: tuple[str, str], fails: bool = False) -> None:
    """One two-phase transaction on both shards: statements and their keys."""
    async with database.transaction(keys=keys(database), two_phase=True) as transaction:
        for key, sql in writes:
            await transaction.execute(sql, key=key)
        if fails:
            raise ValueError("mine")


async def in_doubt(database: Database) -> int:
    node = next(iter(database.nodes.values()))
    return (await node.fetch("SELECT count(*) FROM pg_prepared_xacts"))[0][0]


async def until(condition) -> None:
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "is_committed"),
    [
        ("one part is prepared", False),
        ("all parts are prepared", False),
        ("it is decided", True),
        ("one part is committed", True),
    ],
)
async def test_a_killed_process_leaves_no_half(config, impatient, step, is_committed):
    """Before the decision it never happened, after it it has, on both shards, as soon as anybody runs again."""
    async with Database(config) as database:
        both = keys(database)
    shards = [f"{shard.name}={shard.dsn}" for shard in config.shards]
    command = [sys.executable, "-m", "tests.faults.database.two_phase_process", step, *both, *shards]
    process = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    _, words = await process.communicate()
    assert process.returncode == -signal.SIGKILL, words.decode()

    notes, parts = Notes(), 1 if "one part" in step else 2
    with psycopg.connect(config.shards[0].dsn) as connection:
        assert connection.execute("SELECT count(*) FROM pg_prepared_xacts").fetchone() == (parts,)
    async with Database(impatient, observer=notes) as database:

        async def is_told() -> bool:
            return sum(event.committed + event.rolled_back for event in notes.of(TransactionsRecovered)) == parts

        await until(is_told)
        assert await in_doubt(database) == 0
        assert await said(database) == ([[step], [step]] if is_committed else [[], []])
    ended = notes.of(TransactionsRecovered)
    assert sum(event.committed for event in ended) == (parts if is_committed else 0)
    assert sum(event.rolled_back for event in ended) == (0 if is_committed else parts)


async def test_it_commits_everywhere(config):
    """Its rows are on both shards, nothing stays prepared, and no decision is kept that nobody needs."""
    async with Database(config) as database:
        await write(database, *((key, INSERT) for key in keys(database)))
        assert await said(database) == [["a"], ["a"]]
        assert await in_doubt(database) == 0
        for node in database.nodes.values():
            assert await node.fetch("SELECT * FROM headrace_decisions") == []


async def test_an_error_undoes_it_everywhere(config):
    """Of the block, of a statement, and of a constraint that is checked when a part is prepared."""
    async with Database(config) as database:
        await database.nodes["shard-1"].execute(
            "ALTER TABLE parts ADD CONSTRAINT once UNIQUE (said) DEFERRABLE INITIALLY DEFERRED"
        )
        first, second = keys(database)
        with pytest.raises(ValueError, match="mine"):
            await write(database, (first, INSERT), fails=True)
        with pytest.raises(StatementFailed, match=r"shard-0.*nowhere"):
            await write(database, (second, INSERT), (first, "INSERT INTO nowhere VALUES (1)"))
        with pytest.raises(StatementFailed, match=r"shard-1.*once"):
            await write(database, (first, INSERT), (second, INSERT), (second, INSERT))
        assert await said(database) == [[], []]
        assert await in_doubt(database) == 0


async def test_a_slow_process_and_its_recovery_agree(impatient):
    """Another process undoes what it takes for abandoned; the one that comes late to its decision is told so."""
    async with Database(impatient) as slow, Database(impatient) as other:
        decide = slow._two_phase._decide

        async def sleep_before(part, *, is_committed, **more):
            async def is_undone() -> bool:
                await other._two_phase.recover()
                return await in_doubt(other) == 0

            await until(is_undone)
            return await decide(part, is_committed=is_committed, **more)

        slow._two_phase._decide = sleep_before
        with pytest.raises(DatabaseUnavailable, match="undone"):
            await write(slow, *((key, INSERT) for key in keys(slow)))
        assert await said(other) == [[], []]


async def test_several_shards_need_to_be_asked_for(config):
    """Without two_phase=True it is refused before anything is sent, and so is a statement of a third shard."""
    async with Database(config) as database:
        both = keys(database)
        with pytest.raises(StatementRefused, match=r"2 shards \(shard-0, shard-1\)"):
            database.transaction(keys=both)
        async with database.transaction(keys=both[:1]) as transaction:
            with pytest.raises(StatementRefused, match="belongs to shard shard-1"):
                await transaction.execute(INSERT, key=both[1])


async def test_what_stays_prepared_is_told_of(config):
    """A part whose decision shard nobody here knows is left alone; its age is an event."""
    with psycopg.connect(config.shards[0].dsn, autocommit=True) as connection:
        connection.execute("BEGIN")
        connection.execute("INSERT INTO parts VALUES ('x')")
        connection.execute(f"PREPARE TRANSACTION 'headrace:elsewhere:{32 * '0'}:shard-0'")
    notes = Notes()
    async with Database(replace(config, two_phase_alert_s=0.5), observer=notes) as database:

        async def is_told() -> bool:
            return bool(notes.of(TransactionsInDoubt))

        await until(is_told)
        assert await in_doubt(database) == 1
    assert notes.of(TransactionsInDoubt)[0].shard == "shard-0"


async def test_a_server_that_cannot_prepare_is_named(config, unable):
    """Its setting is 0: the error says which, on which shard, and what to do."""
    shards = (config.shards[0], ShardConfig(name="shard-1", dsn=unable.url))
    async with Database(replace(config, shards=shards)) as database:
        with pytest.raises(ConfigError, match="Shard shard-1 has max_prepared_transactions = 0") as caught:
            await write(database)
    assert "restart" in caught.value.fix


@pytest.fixture
def unable(tmp_path) -> Iterator[EmbeddedPostgres]:
    """A Postgres without prepared transactions."""
    server = EmbeddedPostgres(tmp_path / "unable", name="unable", settings={"max_prepared_transactions": 0})
    with started(server):
        yield server


async def test_an_error_that_was_swallowed_undoes_every_shard(config):
    """Postgres turns the PREPARE of a failed part into a ROLLBACK without a word; the other part must not stay."""
    async with Database(config) as database:
        first, second = keys(database)

        async def swallows():
            async with database.transaction(keys=[first, second], two_phase=True) as transaction:
                await transaction.execute(INSERT, key=first)
                await transaction.execute(INSERT, key=second)
                with pytest.raises(StatementFailed):
                    await transaction.execute("SELECT 1 / 0", key=second)

        with pytest.raises(StatementFailed, match="nothing of it was kept"):
            await swallows()
        assert await said(database) == [[], []]
        assert await in_doubt(database) == 0


async def test_a_single_connection_is_enough_for_recovery(config, impatient):
    """A server that is short of them leaves every pool one."""
    notes = Notes()
    async with Database(replace(config, connections_max=1)) as database:
        await write(database, *((key, INSERT) for key in keys(database)))
    with psycopg.connect(config.shards[1].dsn) as connection:
        connection.execute("INSERT INTO parts VALUES ('left')")
        connection.execute(f"PREPARE TRANSACTION 'headrace:shard-0:{32 * '7'}:shard-1'")
    async with Database(replace(impatient, connections_max=1), observer=notes) as database:

        async def is_told() -> bool:
            return bool(notes.of(TransactionsRecovered))

        await until(is_told)
        assert await in_doubt(database) == 0
        assert await said(database) == [["a"], ["a"]]
    assert [(event.committed, event.rolled_back) for event in notes.of(TransactionsRecovered)] == [(0, 1)]


async def test_a_decision_that_is_forgotten_while_it_is_asked_for_stops_no_recovery(config):
    """Its maker has ended all parts in that moment; recovery decides anew, finds nothing left, and goes on."""
    async with Database(config) as database:
        await write(database, *((key, INSERT) for key in keys(database)))
        node, gone = database.nodes["shard-0"], uuid.uuid4()
        with psycopg.connect(config.shards[0].dsn, autocommit=True) as other:
            other.execute("INSERT INTO headrace_decisions VALUES (%s, true)", (gone,))
            # As its maker would, between the insert that finds it there and the question for it.
            fetch = node.fetch

            async def forgets(sql, params=(), *, read_only=False):
                other.execute("DELETE FROM headrace_decisions WHERE id = %s AND is_committed", (gone,))
                return await fetch(sql, params, read_only=read_only)

            node.fetch = forgets
            try:
                part = Part("shard-0", gone, "shard-1")
                assert await database._two_phase._decide(part, is_committed=False) is False
            finally:
                del node.fetch


async def test_a_decision_that_no_shard_needs_any_more_is_forgotten(config):
    """A week later, and only when every shard of its transaction was asked; another one may still hold its part."""
    async with Database(config) as database:
        await write(database, *((key, INSERT) for key in keys(database)))
    done, far, young = (uuid.uuid4() for _ in range(3))
    insert = "INSERT INTO headrace_decisions VALUES (%s, true, now() - make_interval(days => %s), %s)"
    with psycopg.connect(config.shards[0].dsn, autocommit=True) as connection:
        for id, days, last in ((done, 8, "shard-1"), (far, 8, "shard-9"), (young, 6, "shard-1")):
            connection.execute(insert, (id, days, ["shard-0", last]))

        def left():
            return {id for (id,) in connection.execute("SELECT id FROM headrace_decisions").fetchall()}

        async with Database(config), asyncio.timeout(60):
            while done in left():
                await asyncio.sleep(0.05)
        assert left() == {far, young}


async def test_a_decision_names_its_shards(config):
    """As long as one of them has not carried it out, it is known which."""
    async with Database(config) as database:
        first, second = keys(database)
        node = database.nodes["shard-0"]
        async with database.transaction(keys=[first, second], two_phase=True) as transaction:
            await transaction.execute(INSERT, key=first)
            await transaction.execute(INSERT, key=second)
            forget, database._two_phase._forget = database._two_phase._forget, lambda part: asyncio.sleep(0)
        database._two_phase._forget = forget
        assert await node.fetch("SELECT shards FROM headrace_decisions") == [(["shard-0", "shard-1"],)]
