"""A streaming replica of an embedded shard, on both majors that pip brings."""

from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import DirectoryUnusable, EmbeddedServerFailed


@pytest.fixture(params=[16, 18])
def primary(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A running shard with one row in it."""
    with started(EmbeddedPostgres(tmp_path / "shard-0", name="shard-0", major=request.param)) as server:
        execute(server, "CREATE TABLE seen (n int)")
        execute(server, "INSERT INTO seen VALUES (1)")
        yield server


def execute(server: EmbeddedPostgres, statement: str) -> None:
    with psycopg.connect(server.url, autocommit=True) as connection:
        connection.execute(statement.encode())


def replica_of(primary: EmbeddedPostgres) -> EmbeddedPostgres:
    return EmbeddedPostgres(
        primary.directory.parent / "replica-0", name="replica-0", major=primary.program.version[0], replica_of=primary
    )


def caught_up(primary: EmbeddedPostgres, replica: EmbeddedPostgres) -> list[int]:
    """The rows that the replica shows once it has replayed all that was written (bounded by the test's timeout)."""
    with psycopg.connect(primary.url) as connection:
        row = connection.execute("SELECT pg_current_wal_lsn()::text").fetchone()
        assert row is not None
    with psycopg.connect(replica.url, autocommit=True) as connection:
        behind = "SELECT coalesce(pg_last_wal_replay_lsn() < %s::pg_lsn, true)"
        while (answer := connection.execute(behind, row).fetchone()) is not None and answer[0]:
            connection.execute("SELECT pg_sleep(0.01)")
        return [int(n) for (n,) in connection.execute("SELECT n FROM seen ORDER BY n").fetchall()]


def test_a_replica_shows_what_the_primary_writes(primary: EmbeddedPostgres) -> None:
    """It has the rows from before and after its birth, under its own name, and refuses to be written."""
    with started(replica_of(primary)) as replica:
        execute(primary, "INSERT INTO seen VALUES (2)")
        assert caught_up(primary, replica) == [1, 2]
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            execute(replica, "INSERT INTO seen VALUES (3)")
        with psycopg.connect(primary.url) as connection:
            followers = connection.execute("SELECT application_name, state FROM pg_stat_replication").fetchall()
        assert followers == [("replica-0", "streaming")]


def test_a_replica_catches_up_after_it_was_away(primary: EmbeddedPostgres) -> None:
    """The primary keeps the log for it, so its second start makes no second base backup."""
    with started(replica_of(primary)) as replica:
        born = (replica.directory / "data").stat().st_ino
    execute(primary, "INSERT INTO seen VALUES (2)")
    execute(primary, "SELECT pg_switch_wal()")
    execute(primary, "CHECKPOINT")
    with started(replica_of(primary)) as replica:
        assert caught_up(primary, replica) == [1, 2]
        assert (replica.directory / "data").stat().st_ino == born


def test_a_replica_that_cannot_catch_up_is_made_anew(primary: EmbeddedPostgres) -> None:
    """When the primary kept no log for it, a fresh base backup takes the place of the old data."""
    with started(replica_of(primary)):
        pass
    execute(primary, "SELECT pg_drop_replication_slot('replica_0')")
    execute(primary, "INSERT INTO seen VALUES (2)")
    with started(replica_of(primary)) as replica:
        assert caught_up(primary, replica) == [1, 2]
    assert sorted(path.name for path in replica.directory.iterdir() if path.is_dir()) == ["data", "run"]


def test_a_replica_answers_reads_while_its_primary_is_away(tmp_path: Path) -> None:
    """It starts without its primary and shows the last that it knew."""
    primary = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")
    with started(primary):
        execute(primary, "CREATE TABLE seen AS SELECT 1 AS n")
        with started(replica_of(primary)) as replica:
            assert caught_up(primary, replica) == [1]
    with started(replica_of(primary)) as replica, psycopg.connect(replica.url) as connection:
        assert connection.execute("SELECT n FROM seen").fetchall() == [(1,)]


def test_a_first_replica_needs_its_primary(tmp_path: Path) -> None:
    """Without anything to copy from the error says what to start first, and nothing half-made stays."""
    primary = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")
    replica = replica_of(primary)
    with pytest.raises(EmbeddedServerFailed, match="replica-0") as caught:
        replica.prepare()
    assert "Start the primary first" in caught.value.fix
    assert not (replica.directory / "data").exists()


def test_a_primarys_directory_is_not_overwritten_by_a_replica(tmp_path: Path) -> None:
    """Swapped roles in a configuration are an error, in both directions, not a loss of data."""
    with started(EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")) as primary:
        with started(replica_of(primary)):
            pass
        EmbeddedPostgres(tmp_path / "shard-1", name="shard-1").prepare()
        with pytest.raises(DirectoryUnusable, match="is a primary's, but shard-1 is to be a replica"):
            EmbeddedPostgres(tmp_path / "shard-1", name="shard-1", replica_of=primary).prepare()
        with pytest.raises(DirectoryUnusable, match="is a replica's, but replica-0 is to be a primary"):
            EmbeddedPostgres(tmp_path / "replica-0", name="replica-0").prepare()
