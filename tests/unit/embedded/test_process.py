import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headrace.embedded.log import ServerLog
from headrace.embedded.process import attempt, end_leftovers, environment, living, run, spawn, stop
from headrace.errors import DirectoryUnusable, EmbeddedServerFailed

STUBBORN = "import signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); signal.pause()"
LADDER = [(signal.SIGTERM, 30.0), (signal.SIGKILL, 30.0)]
PROGRAMS = frozenset({"sleep"})


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A program named `sleep` that works in `tmp_path`/data."""
    (tmp_path / "data").mkdir()
    with subprocess.Popen(["/bin/sleep", "60"], cwd=tmp_path / "data") as process:
        yield process
        process.kill()


def test_the_environment_steers_no_postgres_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's PGDATA or locale does not reach the embedded servers; the rest of the environment does."""
    monkeypatch.setenv("PGDATA", "/var/lib/other")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib")
    found = environment()
    assert "PGDATA" not in found
    assert "LANG" not in found
    assert found["LC_ALL"] == "C"
    assert found["LD_LIBRARY_PATH"] == "/opt/lib"


def test_a_process_that_obeys_ends_by_the_first_signal(sleeper: subprocess.Popen[bytes]) -> None:
    """The ladder is left at its first step, and the process is reaped."""
    assert stop(sleeper, LADDER) is signal.SIGTERM
    assert sleeper.returncode == -signal.SIGTERM


def test_a_process_that_does_not_obey_ends_by_the_last_signal() -> None:
    """Whoever ignores SIGTERM meets SIGKILL."""
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert stop(process, [(signal.SIGTERM, 0.05), (signal.SIGKILL, 30.0)]) is signal.SIGKILL
        assert process.returncode == -signal.SIGKILL


def test_a_process_that_survives_every_step_is_reported() -> None:
    """A ladder that is too short is an error, not an endless wait."""
    with subprocess.Popen([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(EmbeddedServerFailed, match=f"{process.pid} did not end, not even by SIGTERM"):
            stop(process, [(signal.SIGTERM, 0.05)])
        process.kill()


def test_stopping_what_has_ended_does_nothing(sleeper: subprocess.Popen[bytes]) -> None:
    """No signal goes to a pid that may belong to someone else by now."""
    sleeper.kill()
    sleeper.wait()
    assert stop(sleeper, LADDER) is None


def test_servers_are_found_by_where_they_work(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """A program of the wanted name in the directory is found; another name, or another place, is not."""
    (tmp_path / "other").mkdir()
    assert [process.pid for process in living(tmp_path, PROGRAMS)] == [sleeper.pid]
    assert living(tmp_path, frozenset({"postgres"})) == []
    assert living(tmp_path / "other", PROGRAMS) == []


def test_leftovers_are_ended(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """What an earlier run left alive is gone afterwards, and an empty directory is no error."""
    end_leftovers(tmp_path, PROGRAMS, LADDER)
    assert sleeper.poll() is not None  # its pid may be there still: who ended it need not reap it
    end_leftovers(tmp_path, PROGRAMS, LADDER)


def test_a_leftover_is_not_taken_for_a_process_that_had_its_pid_before(
    tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    """psutil remembers what it once iterated over by its pid, and sends no signal to what it takes for another."""
    stale = next(process for process in psutil.process_iter() if process.pid == sleeper.pid)
    stale._ident = (sleeper.pid, 1.0)
    stale._create_time = 1.0
    assert not stale.is_running()
    end_leftovers(tmp_path, PROGRAMS, [(signal.SIGKILL, 30.0)])
    assert sleeper.poll() is not None


def test_leftovers_that_do_not_end_are_named(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    """Nothing is started beside a server that could not be ended."""
    with pytest.raises(EmbeddedServerFailed, match=rf"do not end: \[{sleeper.pid}\]"):
        end_leftovers(tmp_path, PROGRAMS, [(signal.SIGCONT, 0.05)])


def test_a_server_is_out_of_reach_of_ctrl_c(tmp_path: Path) -> None:
    """A terminal's SIGINT goes to its session, and a server has one of its own."""
    log = ServerLog(tmp_path / "log")
    process = spawn(["/bin/sleep", "60"], directory=tmp_path, log=log, death_signal=signal.SIGTERM)
    try:
        assert os.getsid(process.pid) == process.pid != os.getsid(0)
    finally:
        stop(process, LADDER)


def test_a_servers_words_go_to_its_log(tmp_path: Path) -> None:
    """Both streams land in the log file."""
    log = ServerLog(tmp_path / "log")
    process = spawn(["/bin/ls", "/nonexistent"], directory=tmp_path, log=log, death_signal=signal.SIGTERM)
    assert process.wait(60) != 0
    assert "/nonexistent" in log.tail(1)


def test_a_tool_that_fails_is_quoted() -> None:
    """The tool's own words and status are in the error, and known words decide its kind."""
    with pytest.raises(EmbeddedServerFailed, match=r"sh failed with status 3\. It said:\n  what it said"):
        run(["/bin/sh", "-c", "echo what it said >&2; exit 3"])
    with pytest.raises(DirectoryUnusable, match="No space left"):
        run(["/bin/sh", "-c", "echo 'initdb: error: No space left on device'; exit 1"])


def test_a_tool_reads_its_input_and_returns_its_output(tmp_path: Path) -> None:
    """Input goes in, output comes back, and the working directory is the one asked for."""
    assert run(["/bin/cat"], stdin="CREATE DATABASE x;") == "CREATE DATABASE x;"
    assert run(["/bin/pwd"], directory=tmp_path).strip() == str(tmp_path)


def test_a_tool_that_hangs_is_given_up() -> None:
    """No tool can hold up a start for ever."""
    with pytest.raises(EmbeddedServerFailed, match=r"sleep did not finish within 0\.1 s"):
        attempt(["/bin/sleep", "60"], timeout_s=0.1)
