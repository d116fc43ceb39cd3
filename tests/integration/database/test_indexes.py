"""Index advice on real servers: two shards with HypoPG and pg_stat_statements, and one without either."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import psycopg
import pytest

from headrace.database import Database, DatabaseConfig, Index, IndexAdvice, IndexConfig, Query, ShardConfig, Workload
from headrace.database.indexes.advice import IndexChange, State, Verdict
from headrace.database.indexes.extend import Limits
from headrace.database.indexes.workload import Sample
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import CallerError, IndexBuildFailed
from headrace.events import Event, IndexBuilt, IndexDropped, IndexLeftoverDropped

Told = TypeVar("Told", bound=Event)
DEBIAN = Path("/usr/lib/postgresql/15/bin")
# Autovacuum would now and then hold a table, or count in what is told of it.
SETTINGS = {"fsync": False, "shared_preload_libraries": "pg_stat_statements", "jit": False, "autovacuum": False}
# The rare rows are the last ones made, on pages all over the table: the planner thinks that an index on `made` soon
# meets ten of them.
ORDERS = """
DROP TABLE IF EXISTS orders;
CREATE TABLE orders (id bigint PRIMARY KEY, tenant int, made int, kind text, total numeric, gone date);
INSERT INTO orders SELECT n, n % 500, n, CASE WHEN n > 99000 THEN 'rare' ELSE 'often' END, n, NULL
    FROM generate_series(1, 100000) AS n ORDER BY hashint4(n::int);
"""
BY_TENANT = "SELECT total FROM orders WHERE tenant = $1 ORDER BY made DESC LIMIT 5"
TRAPPED = "SELECT id FROM orders WHERE kind = 'rare' ORDER BY made LIMIT 10"
BAD = IndexAdvice.creating(Index("orders", ("made",)))


class Events:
    """Everything that was told."""

    def __init__(self) -> None:
        self._told: list[Event] = []
        self.on = self._told.append

    def of(self, kind: type[Told]) -> list[Told]:
        return [each for each in self._told if isinstance(each, kind)]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Two Postgres with HypoPG and pg_stat_statements."""
    if not shutil.which("postgres", path=str(DEBIAN)):
        pytest.skip(f"there is no Postgres with HypoPG in {DEBIAN}")
    directory = tmp_path_factory.mktemp("hypopg")
    with (
        started(EmbeddedPostgres(directory / "a", name="a", binaries=DEBIAN, settings=SETTINGS)) as one,
        started(EmbeddedPostgres(directory / "b", name="b", binaries=DEBIAN, settings=SETTINGS)) as other,
    ):
        for server in (one, other):
            with psycopg.connect(server.url, autocommit=True) as connection:
                connection.execute("CREATE EXTENSION hypopg")
                connection.execute("CREATE EXTENSION pg_stat_statements")
        yield one.url, other.url


def fill(*urls: str) -> None:
    """A hundred thousand orders on each, no index but the primary key, and statistics that begin now."""
    for url in urls:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(ORDERS)
            connection.execute("DROP TABLE IF EXISTS headrace_index_history")
            connection.execute("VACUUM ANALYZE orders")
            # Else it would hand in its counts when it ends, which may be after they were set to nothing.
            connection.execute("SELECT pg_stat_force_next_flush()")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SELECT pg_stat_reset()")
            if connection.execute("SELECT to_regclass('pg_stat_statements')").fetchone()[0]:
                connection.execute("SELECT pg_stat_statements_reset()")


@pytest.fixture
def config(servers: tuple[str, str]) -> DatabaseConfig:
    """Two shards."""
    fill(*servers)
    shards = tuple(ShardConfig(name=name, dsn=url) for name, url in zip(("a", "b"), servers, strict=True))
    return DatabaseConfig(shards=shards, connections_max=4, acquire_timeout_s=20.0)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The embedded Postgres, which has no extension."""
    with started(
        EmbeddedPostgres(
            tmp_path_factory.mktemp("plain") / "p", name="p", settings={"fsync": False, "autovacuum": False}
        )
    ) as one:
        yield one.url


def indexes_of(url: str) -> set[str]:
    """The names of the indexes of orders."""
    with psycopg.connect(url) as connection:
        return {row[0] for row in connection.execute("SELECT indexname FROM pg_indexes WHERE tablename = 'orders'")}


async def settled(database: Database) -> IndexChange:
    """The only change, once it was seen to; the Database itself may be at it just when it is asked to."""
    async with asyncio.timeout(60):
        while True:
            await database.indexes.recover()
            [change] = await database.indexes.history()
            if change.state is not State.BUILDING:
                return change
            await asyncio.sleep(0.05)


async def work(database: Database) -> None:
    """What the application does all day."""
    for tenant in range(50):
        await database.fetch(BY_TENANT, tenant, key=tenant)


async def test_the_observed_statements_get_their_index(config):
    """Advised with an estimate from what pg_stat_statements saw, made on every shard, measured, and noted."""
    events = Events()
    async with Database(config, observer=events) as database:
        await work(database)
        advice = await database.indexes.advise()
        changes = await database.indexes.apply([each for each in advice if each.verdict is Verdict.CREATE])
        history = await database.indexes.history()

    [created] = [each for each in advice if each.verdict is Verdict.CREATE]
    assert created.index.columns[0] == "tenant"
    assert created.gain > 0.8
    assert created.queries[0].cost_after < created.queries[0].cost_before
    assert "pg_stat_statements" in created.evidence[0]
    assert [(each.shard, each.state) for each in changes] == [("a", State.KEPT), ("b", State.KEPT)]
    assert all(each.after_ms < each.before_ms for each in changes)
    assert {(each.shard, each.state) for each in history} == {("a", State.KEPT), ("b", State.KEPT)}
    assert all(created.name in indexes_of(shard.dsn) for shard in config.shards)
    assert {each.shard for each in events.of(IndexBuilt)} == {"a", "b"}


async def test_advice_that_was_followed_is_not_given_again(config):
    """The index is there."""
    async with Database(config) as database:
        await work(database)
        await database.indexes.apply((await database.indexes.advise())[0])
        again = await database.indexes.advise()

    assert not [each for each in again if each.verdict is Verdict.CREATE]


async def test_looking_changes_nothing(config):
    """Neither the indexes, nor a journal, nor what the planner of a connection believes."""
    async with Database(config) as database:
        await work(database)
        await database.indexes.advise()
        plans = [row[0] for row in await database.fetch("EXPLAIN SELECT 1 FROM orders WHERE tenant = 1", key=1)]
        tables = await database.fetch("SELECT 1 FROM pg_class WHERE relname = 'headrace_index_history'", key=1)

    assert not any("Index" in line for line in plans)
    assert tables == []
    assert indexes_of(config.shards[0].dsn) == {"orders_pkey"}


async def test_the_budget_is_that_of_all_shards(config):
    """An index that would fit one shard alone is rejected with its size on both."""
    async with Database(config) as database:
        whole = await database.indexes.advise([Query(BY_TENANT, samples=(Sample(BY_TENANT, (7,)),))])
        size = next(each.size_bytes for each in whole if each.verdict is Verdict.CREATE)
        tight = await database.indexes.advise(
            [Query(BY_TENANT, samples=(Sample(BY_TENANT, (7,)),))], budget_bytes=10_000
        )

    assert size > 1_000_000
    assert not [each for each in tight if each.verdict is Verdict.CREATE]
    assert any("does not fit" in each.reason for each in tight)


async def test_a_table_that_is_written_to_is_spared(config):
    """Ten thousand new rows in the time of a few reads cost more than the reads save."""
    async with Database(config) as database:
        await work(database)
        for shard in config.shards:
            with psycopg.connect(shard.dsn, autocommit=True) as connection:
                connection.execute(
                    "INSERT INTO orders SELECT n + 200000, 1, n, 'often', 1 FROM generate_series(1, 10000) n"
                )
                connection.execute("SELECT pg_stat_force_next_flush()")
        advice = await database.indexes.advise(limits=Limits(write_cost=1000.0))

    assert not [each for each in advice if each.verdict is Verdict.CREATE]
    assert any("its writes would cost" in each.reason for each in advice)


async def test_an_index_that_makes_it_worse_is_dropped_again(config):
    """The planner believes in it, the measurement does not; it never reaches the second shard."""
    events = Events()
    async with Database(config, observer=events) as database:
        advice = await database.indexes.advise([TRAPPED], limits=Limits(indexes_max=1))
        changes = await database.indexes.apply(BAD, [TRAPPED])

    believed = next(each for each in advice if each.index == BAD.index)
    assert believed.gain > 0.5
    [change] = changes
    assert change.state is State.DROPPED
    assert change.reason.startswith("slower")
    assert change.after_ms > change.before_ms
    assert [(each.shard, each.name) for each in events.of(IndexDropped)] == [(change.shard, BAD.name)]
    assert all(indexes_of(shard.dsn) == {"orders_pkey"} for shard in config.shards)


async def test_an_index_that_nobody_uses_is_dropped_again(config):
    """It would only cost writes."""
    async with Database(config) as database:
        [change] = await database.indexes.apply(
            IndexAdvice.creating(Index("orders", ("total",))), ["SELECT count(*) FROM orders WHERE tenant = 5"]
        )

    assert change.state is State.DROPPED
    assert "no measured statement uses it" in change.reason


async def test_an_index_that_is_there_is_left_as_it_is(config):
    """It is not built, not measured, and not dropped; the history does not have it."""
    advice = IndexAdvice.creating(Index("orders", ("total",)))
    for shard in config.shards:
        with psycopg.connect(shard.dsn, autocommit=True) as connection:
            connection.execute(advice.sql)
    async with Database(config) as database:
        changes = await database.indexes.apply(advice, [TRAPPED])
        history = await database.indexes.history()

    assert [(each.state, each.reason) for each in changes] == [(State.KEPT, "it was there already")] * 2
    assert history == []
    assert all(indexes_of(shard.dsn) == {"orders_pkey", advice.name} for shard in config.shards)


async def test_where_one_shard_is_worse_off_none_keeps_it(config):
    """The first shard liked it; the second has other rows."""
    sql = "SELECT count(*) FROM orders WHERE tenant = 5"
    with psycopg.connect(config.shards[1].dsn, autocommit=True) as connection:
        connection.execute("DELETE FROM orders WHERE id > 50")
        connection.execute("VACUUM FULL ANALYZE orders")
    async with Database(config) as database:
        changes = await database.indexes.apply(IndexAdvice.creating(Index("orders", ("tenant",))), [sql])

    assert [(each.shard, each.state) for each in changes] == [("a", State.DROPPED), ("b", State.DROPPED)]
    assert changes[0].reason.startswith("on b: no measured statement uses it")
    assert all(indexes_of(shard.dsn) == {"orders_pkey"} for shard in config.shards)


async def test_a_superfluous_index_is_dropped_and_one_that_is_missed_restored(config):
    """A copy may go; an index that a statement needs comes back as it was."""
    for shard in config.shards:
        with psycopg.connect(shard.dsn, autocommit=True) as connection:
            connection.execute("CREATE INDEX needed ON orders (tenant, made)")
            connection.execute("CREATE INDEX surplus ON orders (tenant)")
    sql = "SELECT count(*) FROM orders WHERE tenant = 5 AND made > 5"
    async with Database(config) as database:
        advice = {each.name: each for each in await database.indexes.advise([sql])}
        gone = await database.indexes.apply(advice["surplus"], [sql])
        dropping = {
            "sql": "DROP INDEX CONCURRENTLY needed",
            "undo": "CREATE INDEX CONCURRENTLY needed ON orders (tenant, made)",
        }
        missed = await database.indexes.apply(
            IndexAdvice(verdict=Verdict.DROP, name="needed", table="orders", reason="a trial", **dropping), [sql]
        )

    assert advice["surplus"].reason == "a beginning of needed"
    assert [each.state for each in gone] == [State.DROPPED] * 2
    assert [each.state for each in missed] == [State.RESTORED]
    assert all(indexes_of(shard.dsn) == {"orders_pkey", "needed"} for shard in config.shards)


async def test_a_build_that_waits_too_long_leaves_nothing(config):
    """A transaction that holds the table ends the attempt; what it leaves goes when that transaction has ended."""
    events = Events()
    with psycopg.connect(config.shards[0].dsn) as holder:
        holder.execute("UPDATE orders SET total = 0 WHERE id = 1")
        async with Database(replace(config, lock_timeout_s=0.3), observer=events) as database:
            with pytest.raises(IndexBuildFailed, match="lock timeout"):
                await database.indexes.apply(IndexAdvice.creating(Index("orders", ("tenant",))), [TRAPPED])
            [begun] = await database.indexes.history()
            holder.rollback()
            change = await settled(database)

    assert (begun.state, change.state) == (State.BUILDING, State.FAILED)
    assert "dropped as soon as that ends" in begun.reason
    assert indexes_of(config.shards[0].dsn) == {"orders_pkey"}
    assert [each.shard for each in events.of(IndexLeftoverDropped)] == [change.shard]


async def test_an_apply_that_is_cancelled_is_taken_back(config):
    """In the middle of a build that somebody holds up: what it left goes when that one has ended."""
    advice = IndexAdvice.creating(Index("orders", ("tenant",)))
    invalid = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"
    with psycopg.connect(config.shards[0].dsn) as holder, psycopg.connect(config.shards[0].dsn) as looker:
        looker.autocommit = True
        holder.execute("UPDATE orders SET total = 0 WHERE id = 1")
        async with Database(replace(config, lock_timeout_s=5.0)) as database:
            applying = asyncio.get_running_loop().create_task(database.indexes.apply(advice, [TRAPPED]))
            async with asyncio.timeout(30):
                while looker.execute(invalid).fetchone() != (1,):
                    await asyncio.sleep(0.01)
            applying.cancel()
            with pytest.raises(asyncio.CancelledError):
                await applying
            holder.rollback()
            change = await settled(database)

    assert change.state is State.FAILED
    assert indexes_of(config.shards[0].dsn) == {"orders_pkey"}


async def test_an_index_is_changed_by_one_at_a_time(config):
    """The other caller is told at once, and nothing is built twice."""
    advice = IndexAdvice.creating(Index("orders", ("tenant", "made")))
    sql = "SELECT total FROM orders WHERE tenant = 5 ORDER BY made DESC LIMIT 5"
    both = []
    with psycopg.connect(config.shards[0].dsn) as holder:
        holder.execute("UPDATE orders SET total = 0 WHERE id = 1")  # the first is held up until the other was told
        async with Database(replace(config, connections_max=8, lock_timeout_s=60.0)) as database:
            for applying in asyncio.as_completed([database.indexes.apply(advice, [sql]) for _ in range(2)]):
                both += await asyncio.gather(applying, return_exceptions=True)
                holder.rollback()

    told, done = both
    assert isinstance(told, IndexBuildFailed)
    assert "another process is changing" in str(told)
    assert {each.state for each in done} == {State.KEPT}


async def test_what_others_need_is_not_advised_to_be_dropped(plain):
    """The index behind a foreign key, and a partition's part of an index, though nobody has read them."""
    with psycopg.connect(plain, autocommit=True) as connection:
        connection.execute("CREATE TABLE parents (id int PRIMARY KEY)")
        connection.execute("CREATE TABLE children (id int PRIMARY KEY, parent int, of int, parent_id int)")
        connection.execute("ALTER TABLE children ADD CONSTRAINT of_parent FOREIGN KEY (parent_id) REFERENCES parents")
        connection.execute("CREATE INDEX by_parent ON children (parent_id, of); CREATE INDEX by_of ON children (of)")
        connection.execute("CREATE TABLE days (id int, day date) PARTITION BY RANGE (day)")
        connection.execute("CREATE TABLE days_1 PARTITION OF days FOR VALUES FROM ('2026-01-01') TO ('2027-01-01')")
        connection.execute("CREATE INDEX by_day ON days (day)")
    try:
        async with Database(
            DatabaseConfig(shards=(ShardConfig(name="p", dsn=plain),), acquire_timeout_s=20.0)
        ) as database:
            advice = await database.indexes.advise(["SELECT 1 FROM children WHERE id = 1"], unused_after_s=0.0)
    finally:
        with psycopg.connect(plain, autocommit=True) as connection:
            connection.execute("DROP TABLE children, parents, days")

    assert {each.name for each in advice if each.verdict is Verdict.DROP} == {"by_of"}
    [kept] = [each for each in advice if each.name == "by_parent"]
    assert "of_parent" in kept.reason


async def test_what_was_rejected_is_not_applied(config):
    """By its verdict, not by its figures."""
    async with Database(config) as database:
        rejected = IndexAdvice(verdict=Verdict.REJECT, name="x", table="orders", sql="", reason="no use")
        with pytest.raises(CallerError, match="was rejected: no use"):
            await database.indexes.apply(rejected)


async def test_changing_an_index_takes_connections(config):
    """Two would wait for each other."""
    async with Database(replace(config, connections_max=2)) as database:
        with pytest.raises(CallerError, match="connections_max is 2"):
            await database.indexes.apply(BAD)


async def test_without_statements_there_is_no_advice(plain):
    """It is said where they could come from."""
    fill(plain)
    async with Database(
        DatabaseConfig(shards=(ShardConfig(name="p", dsn=plain),), acquire_timeout_s=20.0)
    ) as database:
        with pytest.raises(CallerError, match="no statement on a table") as caught:
            await database.indexes.advise()

    assert "pg_stat_statements" in caught.value.fix


async def test_without_hypopg_no_gain_is_made_up(plain):
    """Own statements, candidates without a figure, and the measurement of `apply` as the only proof."""
    fill(plain)
    config = DatabaseConfig(
        shards=(ShardConfig(name="p", dsn=plain),),
        indexes=IndexConfig(sample_every=2),
        connections_max=4,
        acquire_timeout_s=20.0,
    )
    async with Database(config) as database:
        await work(database)
        advice = await database.indexes.advise()
        [change] = await database.indexes.apply(advice[0])

    assert advice[0].verdict is Verdict.CREATE
    assert advice[0].gain is None
    assert advice[0].index.columns == ("tenant", "made")
    assert any(line.startswith("estimate unavailable") for line in advice[0].evidence)
    assert "statements seen by this process" in advice[0].evidence[0]
    assert change.state is State.KEPT
    assert change.after_ms < change.before_ms


async def test_statements_that_cannot_be_weighed_are_named(config):
    """The others are."""
    workload = Workload((Query("SELECT nothing FROM nowhere WHERE x = $1"), Query(BY_TENANT, calls=10)))
    async with Database(config) as database:
        advice = await database.indexes.advise(workload)

    assert advice[0].verdict is Verdict.CREATE
    assert "1 statements: given" in advice[0].evidence[0]


def headrace(config: Path, *arguments: str) -> tuple[int, str, str]:
    """A command: its exit code, and what it printed on both streams."""
    done = subprocess.run(
        [sys.executable, "-m", "headrace", "indexes", "--config", str(config), *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def files(config: DatabaseConfig, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A configuration, a good workload, and one that a bad index makes slower."""
    settings, good, bad = tmp_path / "headrace.toml", tmp_path / "good.sql", tmp_path / "bad.sql"
    settings.write_text(
        "[database]\nacquire_timeout_s = 20.0\n"
        + "".join(f'[[database.shards]]\nname = "{shard.name}"\ndsn = "{shard.dsn}"\n' for shard in config.shards)
    )
    good.write_text(
        "SELECT total FROM orders WHERE tenant = 7 ORDER BY made DESC LIMIT 5;\nSELECT count(*) FROM orders;"
    )
    bad.write_text(TRAPPED + ";")
    return settings, good, bad


async def test_the_command_advises_applies_and_remembers(files):
    """For people and for programs, with nothing done before it is asked for."""
    settings, good, _ = files

    code, told, said = await asyncio.to_thread(headrace, settings, "advise", "--workload", str(good))
    assert (code, said) == (0, "")
    assert "create" in told
    assert "costs by HypoPG" in told
    code, printed, _ = await asyncio.to_thread(headrace, settings, "apply", "--dry-run", "--workload", str(good))
    assert code == 0
    assert printed.startswith("CREATE INDEX CONCURRENTLY headrace_orders_tenant")
    assert (await asyncio.to_thread(headrace, settings, "history"))[1] == "Nothing was done.\n"
    code, printed, _ = await asyncio.to_thread(
        headrace, settings, "apply", "--budget", "100MiB", "--workload", str(good), "--json"
    )
    assert code == 0
    assert {(each["shard"], each["state"]) for each in json.loads(printed)} == {("a", "kept"), ("b", "kept")}
    code, printed, _ = await asyncio.to_thread(headrace, settings, "history", "--json")
    assert [each["state"] for each in json.loads(printed)] == ["kept", "kept"]


async def test_the_command_tells_when_something_was_taken_back(files, config):
    """With exit code 2, and the reason."""
    settings, _, bad = files
    for shard in config.shards:  # leaves only an index on `made` to advise
        with psycopg.connect(shard.dsn, autocommit=True) as connection:
            connection.execute("ALTER TABLE orders ALTER kind TYPE json USING to_json(kind)")
            connection.execute("ANALYZE orders")
    bad.write_text("SELECT id FROM orders WHERE kind::text = '\"rare\"' ORDER BY made LIMIT 10;")

    code, printed, _ = await asyncio.to_thread(headrace, settings, "apply", "--workload", str(bad))

    assert code == 2
    assert "slower, the statements that use it" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("advise", "--budget", "many"), "is no size"),
        (("apply", "strange", "--workload", "good.sql"), "Nothing is advised for strange"),
        (("advise", "--workload", "empty.sql"), "holds no statement"),
    ],
)
async def test_the_command_refuses_what_means_nothing(files, tmp_path, arguments, said):
    """With a word on how it is done."""
    (tmp_path / "empty.sql").write_text(" -- nothing\n")
    arguments = [str(tmp_path / each) if each.endswith(".sql") else each for each in arguments]

    code, _, told = await asyncio.to_thread(headrace, files[0], *arguments)

    assert code in {1, 2}
    assert said in told
