"""A streaming replica of an embedded shard, on both majors that pip brings."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import psycopg
import pytest

from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import DirectoryUnusable, EmbeddedServerFailed
from tests.failovers import frozen


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


def value(server: EmbeddedPostgres, expression: str, *values: object) -> object:
    with psycopg.connect(server.url, autocommit=True) as connection:
        row = connection.execute(f"SELECT {expression}".encode(), values).fetchone()
        assert row is not None
        return row[0]


def until(server: EmbeddedPostgres, condition: str, *values: object) -> None:
    """Return when the server says that the condition holds (bounded by the test's timeout)."""
    while value(server, condition, *values) is not True:
        os.sched_yield()


def written(primary: EmbeddedPostgres) -> str:
    """How far its log is."""
    return str(value(primary, "pg_current_wal_lsn()::text"))


def shown(replica: EmbeddedPostgres, position: str) -> list[int]:
    """The rows that the replica shows once it has replayed the primary's log so far."""
    until(replica, "pg_last_wal_replay_lsn() >= %s::pg_lsn", position)
    with psycopg.connect(replica.url) as connection:
        return [int(n) for (n,) in connection.execute("SELECT n FROM seen ORDER BY n").fetchall()]


def caught_up(primary: EmbeddedPostgres, replica: EmbeddedPostgres) -> list[int]:
    """The rows that the replica shows once it has replayed all that was written."""
    return shown(replica, written(primary))


def test_a_replica_shows_what_the_primary_writes(primary: EmbeddedPostgres) -> None:
    """It has the rows from before and after its birth, under its own name, and refuses to be written."""
    with started(replica_of(primary)) as replica:
        execute(primary, "INSERT INTO seen VALUES (2)")
        assert caught_up(primary, replica) == [1, 2]
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
            execute(replica, "INSERT INTO seen VALUES (3)")
        # It may have replayed all before its sender calls that streaming, and before the backup's is gone.
        followers = "array_agg(ROW(application_name, state)::text) FROM pg_stat_replication"
        until(primary, f"(SELECT {followers}) = ARRAY['(replica-0,streaming)']")


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
    until(primary, "(SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'replica_0')")
    execute(primary, "SELECT pg_drop_replication_slot('replica_0')")
    execute(primary, "INSERT INTO seen VALUES (2)")
    with started(replica_of(primary)) as replica:
        assert caught_up(primary, replica) == [1, 2]
    assert sorted(path.name for path in replica.directory.iterdir() if path.is_dir()) == ["data", "run"]


def test_a_primary_that_takes_its_time_is_waited_for(primary: EmbeddedPostgres) -> None:
    """Only it can tell whether it kept the log: a replica that went on without having asked would never catch up."""
    with started(replica_of(primary)):
        pass
    until(primary, "(SELECT NOT active FROM pg_replication_slots WHERE slot_name = 'replica_0')")
    execute(primary, "SELECT pg_drop_replication_slot('replica_0')")
    execute(primary, "INSERT INTO seen VALUES (2)")
    replica = replica_of(primary)
    with ThreadPoolExecutor(1) as threads:
        with frozen(primary):
            preparing = threads.submit(replica.prepare)
            wait([preparing], timeout=3.0)
            assert not preparing.done()
        preparing.result()
    with started(replica):
        assert caught_up(primary, replica) == [1, 2]


def test_a_replica_answers_reads_while_its_primary_is_away(tmp_path: Path) -> None:
    """It starts without its primary and shows the last that it knew."""
    primary = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")
    with started(primary):
        execute(primary, "CREATE TABLE seen AS SELECT 1 AS n")
        position = written(primary)
        with started(replica_of(primary)) as replica:
            assert shown(replica, position) == [1]
    with started(replica_of(primary)) as replica:
        assert shown(replica, position) == [1]


def test_a_new_replica_waits_for_an_earlier_one_of_its_name_to_be_gone(primary: EmbeddedPostgres) -> None:
    """The primary may not have noticed yet that a base backup was killed, and still keep its slot for it."""
    execute(primary, "SELECT pg_create_physical_replication_slot('replica_0', true)")
    replica = replica_of(primary)
    earlier = psycopg.pq.PGconn.connect(f"{primary.url}&replication=true".encode())
    earlier.exec_(f"START_REPLICATION SLOT replica_0 PHYSICAL {written(primary)}".encode())
    until(primary, "(SELECT active FROM pg_replication_slots WHERE slot_name = 'replica_0')")
    with ThreadPoolExecutor(1) as threads:
        preparing = threads.submit(replica.prepare)
        looks = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'PgSleep'"
        while not preparing.done() and not value(primary, f"EXISTS ({looks})"):
            assert earlier.status == psycopg.pq.ConnStatus.OK
        earlier.finish()
        preparing.result()
    with started(replica):
        assert caught_up(primary, replica) == [1]


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
