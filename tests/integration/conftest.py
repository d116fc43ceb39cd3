"""Real servers, started once for all integration tests."""

from collections.abc import AsyncIterator, Callable, Iterator

import psutil
import pytest

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.embedded import EmbeddedPostgres, started
from tests.running import Service, running


@pytest.fixture(scope="session")
def postgres_urls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Connection strings of two Postgres servers."""
    directory = tmp_path_factory.mktemp("postgres")
    with (
        started(EmbeddedPostgres(directory / "a", name="shard-0")) as first,
        started(EmbeddedPostgres(directory / "b", name="shard-1")) as second,
    ):
        yield first.url, second.url


@pytest.fixture
def database_config(postgres_urls: tuple[str, str]) -> DatabaseConfig:
    """Two shards."""
    shards = tuple(ShardConfig(name=f"shard-{index}", dsn=url) for index, url in enumerate(postgres_urls))
    return DatabaseConfig(shards=shards, connections_max=4, acquire_timeout_s=20.0)


@pytest.fixture
async def database(database_config: DatabaseConfig) -> AsyncIterator[Database]:
    """An open database with nothing in its public schema."""
    async with Database(database_config) as database:
        for node in database.nodes.values():
            await node.execute("DROP SCHEMA public CASCADE")
            await node.execute("CREATE SCHEMA public")
        yield database


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A whole service, as `headrace up` starts it, for tests that change only what is theirs."""
    with running(tmp_path_factory.mktemp("service"), "--workers", "2") as service:
        yield service


@pytest.fixture
def children() -> Callable[[], list[psutil.Process]]:
    """The processes that this test started; the session's servers, and what these start meanwhile, left out."""
    servers = set(psutil.Process().children(recursive=True))

    def is_of_a_server(child: psutil.Process) -> bool:
        try:
            return child in servers or not servers.isdisjoint(child.parents())
        except psutil.NoSuchProcess:
            return True  # what the test looks for is still there

    return lambda: [child for child in psutil.Process().children(recursive=True) if not is_of_a_server(child)]
