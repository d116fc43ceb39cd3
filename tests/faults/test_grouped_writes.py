"""Postgres killed in the middle of grouped writes: what each caller was told is true."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import DatabaseUnavailable, HeadraceError, OutcomeUnknown, Overloaded
from tests.failovers import ask, hold_commits_for, postmaster_of, stop

BOUND_S = 100.0
NOBODY = "nobody"
"""A standby that there is none of: a commit that has to reach it is not answered."""


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A durable Postgres with one table."""
    with started(EmbeddedPostgres(tmp_path / "pg", name="pg")) as postgres:
        with psycopg.connect(postgres.url, autocommit=True) as connection:
            connection.execute("CREATE TABLE t (k int PRIMARY KEY)")
        yield postgres


def kill_who_waits(postgres: EmbeddedPostgres, event: str) -> None:
    """SIGKILL to the backend that waits for this: Postgres ends all others and recovers from its log, as after a power
    cut."""
    waits = f"SELECT pid FROM pg_stat_activity WHERE wait_event = '{event}' AND backend_type = 'client backend'"
    while not (found := ask(postgres, waits)):  # bounded by the test's timeout
        os.sched_yield()
    os.kill(found[0][0], signal.SIGKILL)


def kill_before_the_commit(postgres: EmbeddedPostgres) -> None:
    """In the middle of its rows, which a lock holds up."""
    # Closed and no more: the crash that follows takes this connection, too, so that it can end nothing in order.
    with contextlib.closing(psycopg.connect(postgres.url)) as holder:
        holder.execute("LOCK TABLE t IN SHARE MODE")
        kill_who_waits(postgres, "relation")


def kill_at_the_commit(postgres: EmbeddedPostgres) -> None:
    """Its COMMIT was sent and is not answered, because it waits for a standby."""
    hold_commits_for(postgres, NOBODY)
    kill_who_waits(postgres, "SyncRep")
    ends = time.monotonic() + BOUND_S
    while True:
        with contextlib.suppress(psycopg.OperationalError):  # it recovers
            return hold_commits_for(postgres, "")
        assert time.monotonic() < ends, "it did not come back"


def kill_a_backend(postgres: EmbeddedPostgres) -> None:
    """Wherever it is with its writes."""
    ends = time.monotonic() + BOUND_S
    while not any(is_killed_at_work(child) for child in postmaster_of(postgres).children()):
        assert time.monotonic() < ends, "no backend wrote anything"


def is_killed_at_work(child: psutil.Process) -> bool:
    """A backend is killed if it stands still in the middle of a statement; what it says of itself is its title."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if "headrace headrace" not in " ".join(child.cmdline()):
            return False
        stop(child)
        is_at_work = " ".join(child.cmdline()).split()[-1] in {"INSERT", "COMMIT"}
        child.send_signal(signal.SIGKILL if is_at_work else signal.SIGCONT)
        return is_at_work
    return False


async def test_what_every_caller_was_told_is_true_after_a_crash(postgres: EmbeddedPostgres) -> None:
    """Acknowledged rows are there; rows that surely failed are not; only the unknown may be either."""
    told: dict[int, HeadraceError | None] = {}
    numbers = iter(range(10**9))
    is_over = False
    config = DatabaseConfig(shards=(ShardConfig(name="pg", dsn=postgres.url),), connections_max=4)

    async def write(database: Database) -> None:
        while not is_over:
            k = next(numbers)
            try:
                await database.execute("INSERT INTO t VALUES ($1)", k, grouped=True)
                told[k] = None
            except (DatabaseUnavailable, Overloaded) as error:
                told[k] = error

    def acknowledged() -> int:
        return sum(error is None for error in told.values())

    async with Database(config) as database, asyncio.timeout(BOUND_S), asyncio.TaskGroup() as group:
        for _ in range(50):
            group.create_task(write(database))
        for kill in (kill_before_the_commit, kill_at_the_commit, kill_a_backend):
            goal = acknowledged() + 500
            while acknowledged() < goal:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(kill, postgres)
        goal = acknowledged() + 500
        while acknowledged() < goal:
            await asyncio.sleep(0.01)
        is_over = True

    with psycopg.connect(postgres.url) as connection:
        kept = {row[0] for row in connection.execute("SELECT k FROM t")}
    assert {k for k, error in told.items() if error is None} - kept == set()
    failed = {k for k, error in told.items() if error is not None and not isinstance(error, OutcomeUnknown)}
    assert failed & kept == set()
    assert any(isinstance(error, OutcomeUnknown) for error in told.values())
