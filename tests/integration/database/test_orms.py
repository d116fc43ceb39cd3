"""SQLAlchemy and Django beside headrace, on the same shards: the recipes of the guides, as they stand there."""

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import psycopg
import pytest
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from headrace.cache import Cache
from headrace.database import Database, DatabaseConfig, Ids, QueryPolicy, ReplicaConfig, ShardConfig, Sharded
from headrace.database.ids import parts_of
from headrace.database.planning.route import AllShards, OneShard
from headrace.database.postgres.nodes import Node
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import ConfigError, ShardMapOutdated, StatementRefused

GUIDES = Path(__file__).parents[3] / "docs/guides"
BLOCK = re.compile(r"^```py(?:thon)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
FENCE = """
CREATE FUNCTION fence() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'slot moved' USING ERRCODE = 'SH001'; END $$;
CREATE TRIGGER fence BEFORE INSERT ON orders FOR EACH ROW EXECUTE FUNCTION fence()
"""
POSITION = text("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")

HERE, THERE = "acme", "tyrell"
"""Two tenants, of shard-0 and of shard-1."""


def empty(urls: tuple[str, str]) -> None:
    """Take everything out of the shards."""
    for url in urls:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


def rows(url: str, sql: str = "SELECT tenant, total FROM orders ORDER BY 1, 2") -> list[tuple[object, ...]]:
    """What a shard holds, asked past everybody."""
    with psycopg.connect(url) as connection:
        return connection.execute(sql).fetchall()


@pytest.fixture
def config(database_config: DatabaseConfig, postgres_urls: tuple[str, str]) -> Iterator[DatabaseConfig]:
    """Two shards with nothing on them."""
    empty(postgres_urls)
    yield replace(database_config, tables={"orders": Sharded(key="tenant", batch_by="id")}, map_look_s=3600.0)
    empty(postgres_urls)


def moved(shard_map, tenant, to):
    """The next map, in which the slot of a tenant is elsewhere."""
    shards = list(shard_map.shards)
    shards[shard_map.slot(tenant)] = to
    return replace(shard_map, epoch=shard_map.epoch + 1, shards=tuple(shards))


class Recipe:
    """What the guide on SQLAlchemy defines, for shards of our own."""

    def __init__(self, config: DatabaseConfig) -> None:
        first, second, _ = BLOCK.findall((GUIDES / "orms.md").read_text())
        definitions, found = re.subn(r"^running = .*?^\)\n", "", first, flags=re.DOTALL | re.MULTILINE)
        functions = second.partition("for engine in")[0]
        assert found == 1
        assert functions.startswith("def spoken")
        self.module = ModuleType("recipe")
        self.module.config = config
        exec(compile(definitions + functions, "orms.md", "exec"), vars(self.module))

    def __getattr__(self, name):
        return getattr(self.module, name)

    async def dispose(self) -> None:
        for name in self.by_shard:
            self.by_shard[name].dispose()
            await self.async_by_shard[name].dispose()


@asynccontextmanager
async def following(config: DatabaseConfig) -> AsyncIterator[Recipe]:
    """The recipe on these shards, with its tables."""
    recipe = Recipe(config)
    try:
        for engine in recipe.by_shard.values():
            recipe.Base.metadata.create_all(engine)
        yield recipe
    finally:
        await recipe.dispose()


@pytest.fixture
async def db(config: DatabaseConfig) -> AsyncIterator[Database]:
    """The database, which has given each shard the map."""
    async with Database(config) as db:
        yield db


@pytest.fixture
async def recipe(config: DatabaseConfig, db: Database) -> AsyncIterator[Recipe]:
    """The recipe beside it."""
    async with following(config) as recipe:
        yield recipe


@asynccontextmanager
async def session_of(recipe, kind, tenant):
    """A session of either kind, the calls of which may be awaited."""
    if kind == "async":
        async with recipe.async_session_of(tenant) as session:
            yield session
    else:
        with recipe.session_of(tenant) as session:
            yield session


async def held(session, statement):
    """The values of a statement in a session of either kind."""
    found = session.scalars(statement)
    return (await found if hasattr(found, "__await__") else found).all()


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_each_reads_what_the_other_wrote(recipe, db, postgres_urls, kind):
    """On the shard that the map names and on no other, under ids that are one sequence for both."""
    async with Ids(db) as ids:
        for tenant in (HERE, THERE):
            async with session_of(recipe, kind, tenant) as session:
                session.add(recipe.Order(id=await ids.next(), tenant=tenant, total=1))
            await db.execute("INSERT INTO orders VALUES ($1, $2, 2)", await ids.next(), tenant)

    assert [rows(url) for url in postgres_urls] == [[(HERE, 1), (HERE, 2)], [(THERE, 1), (THERE, 2)]]
    totals = select(recipe.Order.total).order_by(recipe.Order.id)
    for tenant in (HERE, THERE):
        async with session_of(recipe, kind, tenant) as session:
            assert await held(session, totals) == [1, 2]
        assert [row.total for row in await db.fetch(*recipe.spoken(totals.where(recipe.Order.tenant == tenant)))] == [
            1,
            2,
        ]


async def test_a_row_in_the_wrong_session_is_refused(recipe, postgres_urls):
    """New, or made a stranger by a change of its tenant; nothing of its transaction stays."""
    both = [recipe.Order(id=number, tenant=tenant, total=1) for number, tenant in enumerate((HERE, THERE))]
    with pytest.raises(ValueError, match="'tyrell' does not belong to shard-0"), recipe.session_of(HERE) as session:
        session.add_all(both)
    with recipe.session_of(HERE) as session:
        session.add(recipe.Order(id=1, tenant=HERE, total=1))
    with pytest.raises(ValueError, match="'tyrell' does not belong"), recipe.session_of(HERE) as session:
        session.get(recipe.Order, 1).tenant = THERE

    assert [rows(url) for url in postgres_urls] == [[(HERE, 1)], []]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_session_by_an_older_map_does_nothing(recipe, db, postgres_urls, kind):
    """The shard tells it of the newer one, and the next attempt goes to the new home."""
    async with session_of(recipe, kind, HERE) as session:
        session.add(recipe.Order(id=1, tenant=HERE, total=1))
    await db._keeper.publish(moved(db.shard_map, HERE, "shard-1"))

    with pytest.raises(ShardMapOutdated, match="lives on shard-1 since the shard map of epoch 2"):
        async with session_of(recipe, kind, HERE):
            raise AssertionError("the block began")
    async with session_of(recipe, kind, HERE) as session:
        session.add(recipe.Order(id=2, tenant=HERE, total=2))

    assert [rows(url) for url in postgres_urls] == [[(HERE, 1)], [(HERE, 2)]]


async def test_a_slot_that_moves_meanwhile_is_kept_by_its_fence(recipe, db, postgres_urls):
    """Whoever confirmed before the change is stopped by the shard, before any effect, and succeeds on the new home."""

    def write():
        with recipe.session_of(HERE) as session:
            session.add(recipe.Order(id=1, tenant=HERE, total=1))

    with psycopg.connect(postgres_urls[0], autocommit=True) as mover:
        mover.execute(FENCE)
    with pytest.raises(DBAPIError) as caught:
        write()
    assert caught.value.orig.sqlstate == "SH001"
    await db._keeper.publish(moved(db.shard_map, HERE, "shard-1"))
    with pytest.raises(ShardMapOutdated):
        write()
    write()

    assert [rows(url) for url in postgres_urls] == [[], [(HERE, 1)]]


async def test_exchanged_connection_strings_are_refused(config, db):
    """A session on the wrong Postgres ends before its block begins."""
    first, second = config.shards
    shards = (replace(first, dsn=second.dsn), replace(second, dsn=first.dsn))
    async with following(replace(config, shards=shards)) as recipe:
        with pytest.raises(ConfigError, match="dsn of 'shard-0' leads to the Postgres that holds shard 'shard-1'"):
            recipe.session_of(HERE).__enter__()


async def test_another_plan_than_the_one_in_force_is_refused(config, db):
    """Other weights would look for rows on other shards."""
    first, second = config.shards
    async with following(replace(config, shards=(first, replace(second, weight=2.0)))) as recipe:
        with pytest.raises(ConfigError, match="would be looked for on another shard"):
            recipe.session_of(HERE).__enter__()


async def test_nothing_is_written_before_anybody_has_agreed(config):
    """A shard on which no Database was opened has no map, and a session on it no block."""
    async with following(config) as recipe:
        with pytest.raises(ProgrammingError, match="headrace_shard_map"):
            recipe.session_of(HERE).__enter__()


async def test_a_dead_shard_fails_its_own_keys_alone(config, db):
    """Sessions of the others begin, because nobody but their own shard is asked."""
    first, second = config.shards
    async with following(config) as ready:
        dead = replace(config, shards=(first, replace(second, dsn="host=127.0.0.1 port=1")))
        recipe = Recipe(dead)
        with pytest.raises(OperationalError):
            recipe.session_of(THERE).__enter__()
        with recipe.session_of(HERE) as session:
            assert session.scalars(select(ready.Order.id)).all() == []
        await recipe.dispose()


async def test_expressions_are_routed_by_their_keys(recipe, db):
    """As text that was written by hand is: to one shard, or over all and added up; a write over several is refused."""
    order, spoken = recipe.Order, recipe.spoken
    for number, tenant in enumerate((HERE, THERE)):
        statement = spoken(insert(order).values(id=number, tenant=tenant, total=10))
        assert await db.explain(*statement) == OneShard(db.locate(tenant).shard)
        assert await db.execute(*statement, grouped=True) == 1

    total = select(func.sum(order.total), func.count())
    assert isinstance(await db.explain(*spoken(total)), AllShards)
    assert await db.fetch(*spoken(total)) == [(20, 2)]
    several = select(order.id).where(order.tenant.in_([HERE, THERE])).order_by(order.id.desc()).limit(2)
    assert await db.fetch(*spoken(several)) == [(1,), (0,)]
    assert await db.execute(*spoken(update(order).where(order.tenant == HERE).values(total=order.total + 1))) == 1
    with pytest.raises(StatementRefused, match="everywhere=True"):
        await db.execute(*spoken(update(order).values(total=0)))
    assert await db.fetch(*spoken(total)) == [(21, 2)]


async def test_expressions_are_batched(recipe, db, monkeypatch):
    """Reads of one turn by the primary key are one statement, with a key of SQLAlchemy's making, too."""
    order, asked, fetch_as = recipe.Order, [], Node.fetch_as

    async def counted(node, row_kind, sql, params):
        asked.append(node.name)
        return await fetch_as(node, row_kind, sql, params)

    for number in range(20):
        await db.execute("INSERT INTO orders VALUES ($1, $2, $3)", number, HERE, number * 10)
    monkeypatch.setattr(Node, "fetch_as", counted)

    reads = (select(order.total).where(order.tenant == HERE, order.id == number) for number in range(20))
    found = await asyncio.gather(*(db.fetch_value(*recipe.spoken(each)) for each in reads))

    assert found == [number * 10 for number in range(20)]
    assert asked == ["shard-0"]


async def test_expressions_are_cached(config):
    """One expression with other values is another query; the same one is a hit."""
    async with Cache() as cache, Database(config, cache=cache) as db, following(config) as recipe:
        policy = QueryPolicy(staleness_max=60.0, ttl=60.0)
        for number in (1, 2):
            await db.execute("INSERT INTO orders VALUES ($1, $2, $1)", number, HERE)

        async def read(number):
            statement = select(recipe.Order.total).where(recipe.Order.tenant == HERE, recipe.Order.id == number)
            return await db.fetch_value(*recipe.spoken(statement), cache=policy)

        assert [await read(number) for number in (1, 2, 1, 2)] == [1, 2, 1, 2]
        assert db.statistics().queries.hits == 2


@pytest.fixture
def pair(tmp_path) -> Iterator[tuple[EmbeddedPostgres, EmbeddedPostgres]]:
    """A primary and a replica of it."""
    with (
        started(EmbeddedPostgres(tmp_path / "a", name="a")) as primary,
        started(EmbeddedPostgres(tmp_path / "b", name="b", replica_of=primary)) as replica,
    ):
        yield primary, replica


async def test_a_replica_shows_what_a_session_wrote(pair):
    """Given the session's position in the log; a replica that has not come so far is not asked."""
    primary, replica = pair
    near = ShardConfig(name="near", dsn=replica.url, replica_of="eu")
    alone = DatabaseConfig(
        shards=(ShardConfig(name="eu", dsn=primary.url),),
        replicas=ReplicaConfig(look_s=0.05, lag_max_s=600.0),
        acquire_timeout_s=20.0,
    )
    count = "SELECT count(*), pg_is_in_recovery() FROM orders"

    async def read(db):
        return await db.fetch_one(count, read_only=True, replica="any")

    async def until_there(db, expected):
        async with asyncio.timeout(60):
            while tuple(await read(db)) != expected:
                await asyncio.sleep(0.02)

    async with Database(replace(alone, shards=(*alone.shards, near))) as db, following(alone) as recipe:
        with psycopg.connect(replica.url, autocommit=True) as standby:
            with recipe.session_of(HERE) as session:
                before = session.scalar(POSITION)
            with db.session({"eu": before}):
                await until_there(db, (0, True))
            standby.execute("SELECT pg_wal_replay_pause()")
            with recipe.session_of(HERE) as session:
                session.add(recipe.Order(id=1, tenant=HERE, total=1))
            with recipe.session_of(HERE) as session:
                position = session.scalar(POSITION)

            await until_there(db, (0, True))  # nothing was heard of it while the sessions held up this loop
            with db.session({"eu": position}):
                assert tuple(await read(db)) == (1, False)
                standby.execute("SELECT pg_wal_replay_resume()")
                await until_there(db, (1, True))


SETTINGS = """
from shop.shards import DATABASES

DATABASE_ROUTERS = ["shop.shards.ShardRouter"]
INSTALLED_APPS = ["shop", "notes"]
"""
NOTES = """
from django.db import models


class Note(models.Model):
    id = models.BigAutoField(primary_key=True)
    order = models.ForeignKey("shop.Order", models.CASCADE)
"""
BEGIN = """
import django
django.setup()
from django.db import connections
from headrace.errors import ConfigError, ShardMapOutdated
from notes.models import Note
from shop.models import Order, opened
from shop.shards import shard_of, shards


def refused(kind, call):
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError("it was not refused")


def write(shard_key, **fields):
    with shard_of(shard_key):
        return Order.objects.create(**{"tenant": shard_key, "total": 1, **fields})


try:
"""
END = """
finally:
    connections.close_all()
"""


MIGRATE = """
import django, importlib
django.setup()
from django.core.management import call_command
call_command("makemigrations", "shop", "notes", verbosity=0)
importlib.invalidate_caches()
for shard in ("shard-0", "shard-1"):
    call_command("migrate", database=shard, verbosity=0)
"""


class Project:
    """A Django project of the guide's files."""

    def __init__(self, directory: Path, config: DatabaseConfig) -> None:
        self.directory = directory
        for block in BLOCK.findall((GUIDES / "django-shards.md").read_text()):
            self.write(re.match(r"# (\S+)", block)[1], block)
        self.write("shop/settings.py", SETTINGS)
        self.write("notes/models.py", NOTES)
        for package in ("shop", "notes", "shop/migrations", "notes/migrations"):
            self.write(f"{package}/__init__.py", "")
        self.write(
            "headrace.toml",
            '[database]\nacquire_timeout_s = 20.0\n[database.tables]\nshop_order = { key = "tenant" }\n'
            + "".join(f'[[database.shards]]\nname = "{each.name}"\ndsn = "{each.dsn}"\n' for each in config.shards),
        )

    def write(self, path: str, source: str) -> None:
        (self.directory / path).parent.mkdir(parents=True, exist_ok=True)
        (self.directory / path).write_text(source)

    def python(self, *arguments: str) -> str:
        """What a process of the project prints; warnings are errors there, too."""
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "shop.settings",
            "HEADRACE_CONFIG": str(self.directory / "headrace.toml"),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(self.directory), os.environ.get("PYTHONPATH")])),
        }
        run = subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=self.directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert not run.stderr, run.stderr
        return run.stdout

    def does(self, *lines: str) -> list[object]:
        """What the lines of a view add to `said`."""
        body = "\n".join(f"    {line}" for line in ("said = []", *lines))
        return json.loads(self.python("-c", f"import json\n{BEGIN}{body}\n{END}\nprint(json.dumps(said))"))

    def migrate(self) -> None:
        """`makemigrations`, and `migrate` for each shard; in one process, because each takes long to start."""
        self.python("-c", MIGRATE)


@pytest.fixture
def project(tmp_path, config, db) -> Project:
    """A project whose tables are on every shard."""
    pytest.importorskip("django", reason="Django is not installed")
    project = Project(tmp_path, config)
    project.migrate()
    return project


ORDERS = "SELECT tenant, total FROM shop_order ORDER BY 1, 2"


async def test_django_and_headrace_read_what_the_other_wrote(project, db, postgres_urls):
    """On the tenant's shard, with ids of one sequence, and all shards at once past the ORM."""
    began = time.monotonic()
    said = project.does(
        f"ids = [write(tenant).id for tenant in ({HERE!r}, {THERE!r})]",
        "run, db, _ = opened()",
        f"run(db.execute('INSERT INTO shop_order VALUES (1, $1, 2)', {HERE!r}, key={HERE!r}))",
        f"with shard_of({HERE!r}):",
        "    said += [list(Order.objects.order_by('total').values_list('tenant', 'total'))]",
        "said += [run(db.fetch_value('SELECT sum(total) FROM shop_order')), ids]",
    )
    took_s = time.monotonic() - began

    assert said[:2] == [[[HERE, 1], [HERE, 2]], 4]
    assert [rows(url, ORDERS) for url in postgres_urls] == [[(HERE, 1), (HERE, 2)], [(THERE, 1)]]
    assert said[2] == sorted(set(said[2]))
    async with Ids(db) as ids:  # a process may be ahead of time by as long as its lease took
        assert parts_of(await ids.next()).ms > parts_of(said[2][1]).ms - took_s * 1000


async def test_django_migrates_each_shard(project, postgres_urls):
    """Every shard has the tables and its own word on what was applied."""
    applied = "SELECT app, name FROM django_migrations ORDER BY 1"
    assert [rows(url, applied) for url in postgres_urls] == [[("notes", "0001_initial"), ("shop", "0001_initial")]] * 2


async def test_django_has_no_shard_without_a_tenant(project, postgres_urls):
    """A query outside of the block fails, and so does a row that belongs elsewhere; nothing is written."""
    said = project.does(
        "said.append(refused(LookupError, lambda: list(Order.objects.all())))",
        "said.append(refused(LookupError, lambda: Order(id=1, tenant='acme', total=1).save()))",
        f"said.append(refused(ValueError, lambda: write({HERE!r}, tenant={THERE!r})))",
    )

    assert said[2] == "A row of 'tyrell' does not belong to shard-0."
    assert [rows(url, ORDERS) for url in postgres_urls] == [[], []]


async def test_django_refuses_relations_between_shards(project):
    """Before the database could not keep the promise of a foreign key; within a shard it may."""
    said = project.does(
        f"here, there = write({HERE!r}), write({THERE!r})",
        f"with shard_of({HERE!r}):",
        "    note = Note.objects.create(order=here)",
        "    said.append(refused(ValueError, lambda: setattr(note, 'order', there)))",
    )

    assert "the current database router prevents this relation" in said[0]


async def test_django_by_an_older_map_does_nothing(project, db, postgres_urls):
    """The block does not begin; the next one does, on the new home."""
    await db._keeper.publish(moved(db.shard_map, HERE, "shard-1"))
    said = project.does(
        f"said.append(refused(ShardMapOutdated, lambda: write({HERE!r})))",
        f"write({HERE!r})",
    )

    assert "lives on shard-1 since the shard map of epoch 2" in said[0]
    assert [rows(url, ORDERS) for url in postgres_urls] == [[], [(HERE, 1)]]


async def test_django_on_exchanged_connection_strings_does_nothing(project, config, postgres_urls):
    """An alias that leads to another shard is found out by that shard's own word."""
    first, second = config.shards
    exchanged = replace(config, shards=(replace(first, dsn=second.dsn), replace(second, dsn=first.dsn)))
    project = Project(project.directory, exchanged)
    said = project.does(f"said.append(refused(ConfigError, lambda: write({HERE!r}, id=1)))")

    assert "dsn of 'shard-0' leads to the Postgres that holds shard 'shard-1'" in said[0]
    assert [rows(url, ORDERS) for url in postgres_urls] == [[], []]
