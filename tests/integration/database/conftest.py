"""A cluster of three shards beside a single Postgres with the same rows: databases of one server."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg
import pytest

from headrace.embedded import EmbeddedPostgres, started
from tests.integration.database import differential

DEBIAN = Path("/usr/lib/postgresql/15/bin")
SHARDS = ("shard-0", "shard-1", "shard-2")


@dataclass
class Server:
    """A running Postgres and how its databases sort text."""

    url: str
    locale: str

    def database(self, name: str) -> str:
        """The connection string of one of its databases, made anew."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE template0 {self.locale}')
        return self.url.replace("/headrace?", f"/{name}?")


@pytest.fixture(scope="session", params=["code points", "language"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Embedded Postgres, which sorts text by code point, and Debian's, which can sort it as a language does."""
    binaries, locale = None, ""
    if request.param == "language":
        if not shutil.which("postgres", path=str(DEBIAN)):
            pytest.skip(f"there is no Postgres with ICU in {DEBIAN}")
        binaries, locale = DEBIAN, "LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
    directory = tmp_path_factory.mktemp("server")
    with started(
        EmbeddedPostgres(directory / "pg", name="pg", binaries=binaries, settings={"fsync": False})
    ) as running:
        yield Server(running.url, locale)


@dataclass
class Twins:
    """The single Postgres and the three shards."""

    single: str
    shards: dict[str, str]


@pytest.fixture(scope="session")
def twins(server: Server) -> Twins:
    """Empty tables on all of them."""
    single = server.database("single")
    shards = {name: server.database(name) for name in SHARDS}
    for url in (single, *shards.values()):
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(differential.SCHEMA)
    return Twins(single, shards)
