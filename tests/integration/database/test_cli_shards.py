"""`headrace shards` as a person uses it, on two real shards."""

import asyncio
import json
import os
import subprocess
import sys
import uuid

import psycopg
import pytest

from headrace.database import Database
from headrace.embedded import EmbeddedPostgres, started

TENANT = uuid.UUID(int=99)


@pytest.fixture
def shards(postgres_urls, tmp_path):
    """The command on two new shards; what it exits with and prints."""
    for url in postgres_urls:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
    file = tmp_path / "headrace.toml"
    tables = "".join(
        f'[[database.shards]]\nname = "shard-{n}"\ndsn = "{url}"\n' for n, url in enumerate(postgres_urls)
    )
    file.write_text(
        f'[database]\nacquire_timeout_s = 20.0\n{tables}[database.tables]\norders = {{ key = "tenant_id" }}\n'
    )
    return lambda *arguments, config=file: headrace("shards", "--config", str(config), *arguments)


def headrace(*arguments):
    """A command: its exit code, and what it printed on both streams."""
    environment = {**os.environ, "COLUMNS": "160"}
    done = subprocess.run(
        [sys.executable, "-m", "headrace", *arguments],
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


async def opened(config):
    """Serve once, with a table of a hundred orders."""
    async with Database(config) as database:
        for node in database.nodes.values():
            await node.execute("CREATE TABLE orders (tenant_id bigint, n int)")
        for tenant in range(100):
            await database.execute("INSERT INTO orders VALUES ($1, 1)", tenant, key=tenant)
        for node in database.nodes.values():
            await node.execute("ANALYZE orders")
        return {key: database.locate(key) for key in (5, "5", TENANT)}


async def test_status_tells_what_each_shard_holds(shards, database_config):
    """Address, slots, epoch, connections, size and rows; for people and for programs."""
    await opened(database_config)
    code, printed, _ = await asyncio.to_thread(shards, "status")
    assert code == 0
    assert "Shard map of epoch 1: 4096 slots (shard-0: 2048, shard-1: 2048)" in printed
    code, printed, _ = await asyncio.to_thread(shards, "status", "--json")
    found = json.loads(printed)
    assert (code, found["epoch"]) == (0, 1)
    assert [each["shard"] for each in found["shards"]] == ["shard-0", "shard-1"]
    assert sum(each["rows_estimate"] for each in found["shards"]) == 100
    for each in found["shards"]:
        assert (each["up"], each["slots"], each["epoch"], each["problem"]) == (True, 2048, 1, None)
        assert each["size_bytes"] > 1_000_000
        assert 0 <= each["connections"] < each["connections_max"]


def test_looking_leaves_no_trace(shards, postgres_urls):
    """A new shard is not made one of this configuration by being looked at."""
    for arguments in (("status",), ("locate", "5"), ("explain", "SELECT 1")):
        shards(*arguments)
    for url in postgres_urls:
        with psycopg.connect(url) as connection:
            assert connection.execute("SELECT count(*) FROM pg_class WHERE relname ~ '^headrace'").fetchone() == (0,)


def test_a_dead_shard_is_shown_as_such(shards, postgres_urls, tmp_path):
    """The others are told all the same, and the exit code says that something is wrong."""
    file = tmp_path / "dead.toml"
    file.write_text(
        f'[database]\nacquire_timeout_s = 6.0\n[[database.shards]]\nname = "shard-0"\ndsn = "{postgres_urls[0]}"\n'
        f'[[database.shards]]\nname = "dead"\ndsn = "host={tmp_path} password=hunter2"\n'
    )
    code, printed, _ = shards("status", config=file)
    assert code == 1
    assert "dead: Shard dead does not answer" in printed
    assert "hunter2" not in printed
    code, printed, _ = shards("status", "--json", config=file)
    assert [(each["up"], each["size_bytes"] is None) for each in json.loads(printed)["shards"]] == [
        (True, False),
        (False, True),
    ]


async def test_locate_finds_what_the_database_finds(shards, database_config):
    """A key of digits is an int and one like a UUID a uuid, unless the type is said."""
    homes = await opened(database_config)
    for arguments, key, kind in (
        (("5",), 5, "integer"),
        (("5", "--type", "int"), 5, "integer"),
        (("5", "--type", "text"), "5", "text"),
        ((str(TENANT),), TENANT, "uuid"),
    ):
        code, printed, _ = await asyncio.to_thread(shards, "locate", *arguments, "--json")
        assert code == 0
        assert json.loads(printed) == {**homes[key]._asdict(), "key": arguments[0], "type": kind}
    code, printed, _ = await asyncio.to_thread(shards, "locate", "5")
    assert printed == f"integer 5 lives on {homes[5].shard}, slot {homes[5].slot}, as of epoch 1\n"


@pytest.mark.parametrize(("key", "kind"), [("five", "int"), ("5", "colour"), ("2026-01-01T00:00", "timestamptz")])
def test_a_key_that_is_none_of_its_type_is_told(shards, key, kind):
    """With the value, and how it is written."""
    code, _, said = shards("locate", key, "--type", kind)
    assert code == 1
    assert kind.removeprefix("int") in said
    assert "Fix:" in said


async def test_explain_tells_where_a_statement_goes(shards, database_config):
    """One shard for a key, all of them without one, and why not for what is refused."""
    homes = await opened(database_config)
    sql = "SELECT n FROM orders WHERE tenant_id = $1"
    code, printed, _ = await asyncio.to_thread(shards, "explain", sql, "5", "--json")
    assert (code, json.loads(printed)) == (0, {"plan": "OneShard", "shards": [homes[5].shard]})
    code, printed, _ = await asyncio.to_thread(shards, "explain", "SELECT sum(n) FROM orders")
    assert code == 0
    assert "shards:   shard-0, shard-1" in printed
    code, printed, _ = await asyncio.to_thread(shards, "explain", "DELETE FROM orders", "--json")
    assert json.loads(printed)["plan"] == "Refused"
    assert json.loads(printed)["fix"]


def test_without_shards_the_way_to_some_is_told(tmp_path):
    """Neither configured nor embedded ones."""
    code, _, said = headrace("shards", "--directory", str(tmp_path), "status")
    assert code == 1
    assert "holds none" in said


def test_the_embedded_shards_of_a_service_are_found(tmp_path):
    """Those that `headrace up` has started in its directory, by the same names."""
    with (
        started(EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")),
        started(EmbeddedPostgres(tmp_path / "shard-1", name="shard-1")),
    ):
        file = tmp_path / "patient.toml"
        file.write_text("[database]\nacquire_timeout_s = 20.0\n")
        arguments = ("--config", str(file), "--directory", str(tmp_path), "status", "--json")
        code, printed, said = headrace("shards", *arguments)
    assert code == 0, said
    assert [(each["shard"], each["up"]) for each in json.loads(printed)["shards"]] == [
        ("shard-0", True),
        ("shard-1", True),
    ]
