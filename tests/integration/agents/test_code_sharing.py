"""Deployed code between processes: bytecode by a directory, sources by the shared cache, the truth from Postgres."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from headrace.agents import AgentHost
from headrace.cache import Cache, MemoryConfig
from headrace.database import Database, DatabaseConfig
from headrace.events import CodeRejected, Event
from tests.agent_nodes import nodes

SOURCE = "async def Agent(input, context): return input + 1"


class Noted:
    """An observer that keeps what it was told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        """Keep it."""
        self.events.append(event)


def flip(record: Path) -> None:
    """Change one byte in the middle."""
    data = bytearray(record.read_bytes())
    data[len(data) // 2] ^= 1
    record.write_bytes(data)


async def test_a_second_process_loads_what_the_first_one_compiled(
    database: Database, database_config: DatabaseConfig, tmp_path: Path
) -> None:
    """From disk, without compiling; a record that was changed is told of, and compiled anew."""
    urls = tuple(shard.dsn for shard in database_config.shards)
    directory = tmp_path / "code"
    with nodes(urls, 1, code_directory=str(directory)) as (first,):
        first.call("deploy", agent_id="a", source=SOURCE, version="1.0.0")
        compiled = first.call("code")
    with nodes(urls, 1, code_directory=str(directory)) as (second,):
        done = second.call("execute", agent_id="a", input=1)
        found = second.call("code")
    (record,) = directory.glob("*.code")
    flip(record)
    with nodes(urls, 1, code_directory=str(directory)) as (third,):
        again = third.call("execute", agent_id="a", input=1)
        told = third.told("CodeRejected")
        missed = third.call("code")

    assert (compiled["compiles"], compiled["written"]) == (1, 1)
    assert (done["output_json"], found["disk_hits"], found["compiles"]) == ("Mg==", 1, 0)
    assert (again["output_json"], missed["disk_hits"], missed["compiles"], missed["rejected"]) == ("Mg==", 0, 1, 1)
    assert [event["agent_id"] for event in told] == ["a"]


@pytest.fixture
async def cache() -> AsyncIterator[Cache]:
    """What the hosts share."""
    async with Cache(memory=MemoryConfig()) as cache:
        yield cache


@pytest.fixture
async def spoil(database: Database) -> Callable[[], object]:
    """Makes the durable sources wrong, so that whoever reads one shows it."""

    async def spoil() -> None:
        for node in database.nodes.values():
            await node.execute("UPDATE headrace_agent_versions SET source = replace(source, '+ 1', '+ 1000')")

    return spoil


async def test_a_cold_process_takes_the_source_from_the_shared_cache(database: Database, cache: Cache, spoil) -> None:
    """Postgres says which one it is; its own copy is read only when the cache has none."""
    async with AgentHost(database=database, cache=cache, writer="0") as first:
        await first.deploy("a", SOURCE, version="1.0.0")
    await spoil()

    async with AgentHost(database=database, cache=cache, writer="1") as second:
        from_cache = await second.execute("a", 1)
    await cache.clear()
    async with AgentHost(database=database, cache=cache, writer="2") as third:
        from_postgres = await third.execute("a", 1)

    assert (from_cache.output, from_postgres.output) == (2, 1001)


async def test_a_source_that_is_not_what_its_hash_says_is_not_run(database: Database, cache: Cache) -> None:
    """Whoever can write into the cache cannot have his code run: it is told of, and the durable one is loaded."""
    noted = Noted()
    async with AgentHost(database=database, cache=cache, writer="0") as first:
        await first.deploy("a", SOURCE, version="1.0.0")
        sha256 = (await first.agent("a")).source_sha256
    await cache.set(f"agent-source:{sha256}", SOURCE.replace("+ 1", "+ 666"), type=str)

    async with AgentHost(database=database, cache=cache, writer="1", observer=noted) as second:
        done = await second.execute("a", 1)

    assert done.output == 2
    assert [event.record for event in noted.events if isinstance(event, CodeRejected)] == [f"agent-source:{sha256}"]
