"""Our hash is the hash of every Postgres that is supported, of every type that may be a key."""

import datetime
import random
import uuid
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal

import psycopg
import pytest

from headrace.database import Database, DatabaseConfig, Reference, ShardConfig, Sharded
from headrace.database.key_columns import SAMPLES
from headrace.database.placement import postgres_hash
from headrace.database.placement.keys import KINDS, Key, kind_of
from headrace.database.placement.postgres_hash import hash_key
from headrace.embedded import EmbeddedPostgres, started
from headrace.embedded.binaries import system_postgres
from headrace.errors import BugError, ConfigError


@pytest.fixture(scope="module", params=["16", "18", "system"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPostgres]:
    """A Postgres of each version that there is."""
    directory = tmp_path_factory.mktemp("postgres")
    if request.param == "system":
        found = max(system_postgres(), default=None)
        if found is None:
            pytest.skip("no Postgres is installed on this machine")
        postgres = EmbeddedPostgres(directory, name="a", binaries=found.path.parent)
    else:
        postgres = EmbeddedPostgres(directory, name="a", major=int(request.param))
    with started(postgres) as running:
        yield running


@pytest.fixture
def config(server: EmbeddedPostgres) -> DatabaseConfig:
    """One shard, with nothing in it."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    return DatabaseConfig(shards=(ShardConfig(name="a", dsn=server.url),), connections_max=2, acquire_timeout_s=20.0)


def step(rng: random.Random) -> datetime.timedelta:
    """Some centuries back or forth, to the microsecond."""
    return datetime.timedelta(microseconds=rng.randrange(-5 * 10**16, 10**17))


def random_keys(kind: str, rng: random.Random) -> list[Key]:
    """Two hundred keys of a kind."""
    day = datetime.date(2000, 1, 1)
    makers = {
        "boolean": lambda: rng.random() < 0.5,
        "integer": lambda: rng.randrange(-(2 ** rng.randrange(1, 64)), 2 ** rng.randrange(1, 64)),
        "numeric": lambda: Decimal(rng.randrange(-(10 ** rng.randrange(1, 40)), 10**20)).scaleb(
            rng.randrange(-30, 30)
        ),
        "text": lambda: "".join(chr(rng.choice((rng.randrange(1, 0xD800), 97))) for _ in range(rng.randrange(40))),
        "uuid": lambda: uuid.UUID(int=rng.getrandbits(128)),
        "bytes": lambda: rng.randbytes(rng.randrange(40)),
        "date": lambda: day + datetime.timedelta(days=rng.randrange(-700_000, 2_900_000)),
        "timestamp": lambda: datetime.datetime.combine(day, datetime.time()) + step(rng),
        "timestamptz": lambda: datetime.datetime.fromtimestamp(
            rng.randrange(-(10**10), 10**11), datetime.timezone(datetime.timedelta(minutes=rng.randrange(-720, 720)))
        ),
    }
    return [makers[kind]() for _ in range(200)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_hashes_as_postgres_says(server, kind):
    """Two hundred random values of the type, and the samples that are compared at every start."""
    values = random_keys(kind, random.Random(7)) + [key for key in SAMPLES if kind_of(key) == kind]
    with psycopg.connect(server.url) as connection:
        for key in values:
            query = f"SELECT hash_record_extended(ROW(%s::{KINDS[kind]}), 0)"
            assert connection.execute(query, (key,)).fetchone()[0] % 2**64 == hash_key(key), key


def test_every_kind_is_compared_at_the_start():
    """No type may be a key whose hash was not checked against the server."""
    assert {kind_of(key) for key in SAMPLES} == set(KINDS)


async def test_types_that_compare_have_one_hash(config):
    """A smallint column and a bigint parameter agree, and so do varchar and text, and numbers of any scale."""
    async with Database(config) as database:
        for one, other in (
            ("7::smallint", "7::bigint"),
            ("(-7)::integer", "(-7)::bigint"),
            ("'ab'::varchar(9)", "'ab'::text"),
            ("1.50::numeric", "1.5::numeric"),
        ):
            sql = f"SELECT hash_record_extended(ROW({one}), 0) = hash_record_extended(ROW({other}), 0)"
            assert await database.fetch_value(sql)


async def test_a_server_with_another_hash_is_refused(config, monkeypatch):
    """Before anything is served, and with the value that differs."""
    monkeypatch.setattr("headrace.database.key_columns.hash_key", lambda key: postgres_hash.hash_bytes(b"other"))
    with pytest.raises(BugError, match="hashes the text '' differently"):
        await Database(config).__aenter__()


async def test_a_server_that_stores_text_in_another_encoding_is_refused(server):
    """Its hash of the same text would be another one."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS latin")
        connection.execute("CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    shard = ShardConfig(name="a", dsn=server.url.replace("/headrace?", "/latin?"))
    with pytest.raises(ConfigError, match="stores text as LATIN1"):
        await Database(DatabaseConfig(shards=(shard,), acquire_timeout_s=20.0)).__aenter__()


@pytest.mark.parametrize(
    ("column", "said"),
    [
        ("tenant char(8)", "a character, whose hash headrace does not know"),
        ("tenant float8", "a double precision, whose hash"),
        ("tenant jsonb", "a jsonb, whose hash"),
        ("other int", "which it does not have"),
    ],
)
async def test_a_key_column_of_an_unknown_hash_is_refused(config, server, column, said):
    """At the start, with the column and the types that may be keys."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(f"CREATE TABLE orders ({column})")
    declared = replace(config, tables={"orders": Sharded(key="tenant"), "c": Reference()})
    with pytest.raises(ConfigError, match=f"orders is sharded by tenant, {said}"):
        await Database(declared).__aenter__()


async def test_a_key_column_with_a_loose_collation_is_refused(config, server):
    """Texts that it holds equal would have different homes. A server without ICU can have no such collation at all."""
    loose = "CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)"
    with psycopg.connect(server.url, autocommit=True) as connection:
        try:
            connection.execute(loose)
        except psycopg.errors.FeatureNotSupported as error:
            assert "ICU is not supported" in str(error)  # noqa: PT017 - what a server without ICU says, and no other
            return
        connection.execute("CREATE TABLE orders (tenant text COLLATE loose)")
    declared = replace(config, tables={"orders": Sharded(key="tenant")})
    with pytest.raises(ConfigError, match="collation is not deterministic"):
        await Database(declared).__aenter__()


async def test_a_key_column_of_a_known_hash_is_taken(config, server):
    """A table that does not exist yet keeps nobody from starting."""
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute('CREATE TABLE orders (tenant varchar(20) COLLATE "C")')
    tables = {"orders": Sharded(key="tenant"), "later": Sharded(key="tenant")}
    async with Database(replace(config, tables=tables)) as database:
        assert await database.fetch_value("SELECT 1") == 1
