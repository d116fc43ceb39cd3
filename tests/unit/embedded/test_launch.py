import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headrace.embedded import launch
from headrace.embedded.identity import OWN, Identity
from headrace.embedded.process import attempt, launched

REPORT = """
import json, os
print(json.dumps({"uid": os.geteuid(), "gid": os.getegid(), "groups": os.getgroups(), "umask": os.umask(0)}))
"""
SUPERVISOR = """
import subprocess, sys, threading
child = subprocess.Popen([a.replace("PARENT", str(__import__("os").getpid())) for a in sys.argv[1:]])
print(child.pid, flush=True)
sys.stdin.read()
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="namespaces and PR_SET_PDEATHSIG are Linux's")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another account")


def report(identity: Identity) -> dict[str, object]:
    outcome = attempt(["/usr/bin/env", "python3", "-I", "-S", "-c", REPORT], identity=identity)
    assert outcome.returncode == 0, outcome.stdout
    found: dict[str, object] = json.loads(outcome.stdout)
    return found


def has_ended(process: psutil.Process) -> bool:
    """Whether it has; who inherits an orphan may take its time to reap it, or never do."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def supervisor() -> Iterator[subprocess.Popen[str]]:
    """A process that launches a sleeper tied to its own life, and says the sleeper's pid."""
    command = launched(["/bin/sleep", "60"], identity=OWN, death_signal=signal.SIGTERM)
    command[command.index(str(os.getpid()))] = "PARENT"
    process = subprocess.Popen(
        [sys.executable, "-c", SUPERVISOR, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.kill()


@on_linux
def test_a_launched_program_dies_with_a_supervisor_that_is_killed(supervisor: subprocess.Popen[str]) -> None:
    """kill -9 gives the supervisor no chance to clean up; the kernel does it."""
    assert supervisor.stdout is not None
    child = psutil.Process(int(supervisor.stdout.readline()))
    while child.name() != "sleep":  # bounded by the test's timeout: the launcher is still becoming it
        os.sched_yield()
    supervisor.kill()
    while not has_ended(child):  # bounded by the test's timeout
        os.sched_yield()


def test_a_program_whose_supervisor_is_gone_already_does_not_start() -> None:
    """A parent that died before the launcher could ask the kernel is noticed by its pid."""
    command = launched(["/bin/echo", "started"], identity=OWN, death_signal=signal.SIGTERM)
    command[command.index(str(os.getpid()))] = "1"
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    assert outcome.returncode == launch.EXIT_PARENT_GONE
    assert outcome.stdout == ""
    assert "supervisor 1 is gone" in outcome.stderr


def test_a_program_that_cannot_be_executed_is_named() -> None:
    """The reason comes back in words, with a status of its own."""
    outcome = attempt(["/nonexistent/postgres"])
    assert outcome.returncode == launch.EXIT_NOT_EXECUTABLE
    assert "/nonexistent/postgres" in outcome.stdout


@on_linux
def test_signals_are_as_a_program_expects_them() -> None:
    """Neither a blocked signal nor an ignored one of the supervisor's reaches the server."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        outcome = attempt(["/bin/grep", "-E", "SigBlk|SigIgn", "/proc/self/status"])
    finally:
        signal.signal(signal.SIGINT, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    masks = {line.split(":")[0]: int(line.split()[1], 16) for line in outcome.stdout.splitlines()}
    assert masks["SigBlk"] == 0
    # Signals 32 and 33 belong to the C library, which ignores them for children of some programs, make among them.
    # SIGHUP is ignored if the tests were started by nohup, which means it for all that comes of them, and SIGQUIT if a
    # shell without job control put them into the background.
    ours = 0x7FFFFFFF & ~(1 << (signal.SIGHUP - 1)) & ~(1 << (signal.SIGQUIT - 1))
    assert masks["SigIgn"] & ours == 1 << (signal.SIGXFSZ - 1)


def test_files_of_a_server_are_private() -> None:
    """The umask lets nobody else read what a server writes."""
    assert report(OWN)["umask"] == 0o077


@on_linux
def test_in_a_namespace_a_program_sees_another_uid_and_makes_files_of_ours(tmp_path: Path) -> None:
    """Postgres is not root for itself; for everybody else its files are ours."""
    inside = Identity("namespace", 4321, 4322)
    probe = attempt(["/bin/true"], identity=inside)
    if probe.returncode == launch.EXIT_IDENTITY_REFUSED:
        pytest.skip(f"user namespaces are forbidden here: {probe.stdout.strip()}")
    found = report(inside)
    attempt(["/bin/touch", tmp_path / "file"], identity=inside)
    assert (found["uid"], found["gid"]) == (4321, 4322)
    assert (tmp_path / "file").stat().st_uid == os.geteuid()


@as_root
def test_an_account_is_taken_on_for_good() -> None:
    """Root and its groups are given up."""
    found = report(Identity("account", 65534, 65534))
    assert (found["uid"], found["gid"], found["groups"]) == (65534, 65534, [])


def test_an_identity_that_is_refused_is_told_from_a_program_that_fails() -> None:
    """The caller can try the next identity only if it knows that this one was the reason."""
    nobody_can_be = Identity("account", -1, -1)
    assert attempt(["/bin/true"], identity=nobody_can_be).returncode == launch.EXIT_IDENTITY_REFUSED
    assert attempt(["/bin/false"]).returncode == 1
