"""Starting, stopping and finding the processes of embedded servers."""

import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from headrace.embedded import launch
from headrace.embedded.failure import failure
from headrace.embedded.identity import OWN, Identity
from headrace.embedded.log import ServerLog
from headrace.errors import EmbeddedServerFailed

_LOOK_EVERY_S = 0.05

Ladder = Sequence[tuple[signal.Signals, float]]
"""How to end a server: each signal, and how many seconds it may take before the next one."""

TOOL_TIMEOUT_S = 120.0
"""Limit for initdb and other short tools; they take about a second."""


def environment() -> dict[str, str]:
    """Ours, without what would steer a Postgres elsewhere, and with messages in the language that `failure` reads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C"}


def launched(command: Sequence[str | Path], *, identity: Identity, death_signal: signal.Signals) -> list[str]:
    """`command` behind the launcher, tied to the life of the calling thread."""
    return [
        sys.executable,
        "-I",
        "-S",
        launch.__file__,
        str(os.getpid()),
        str(int(death_signal)),
        identity.mode,
        str(identity.uid),
        str(identity.gid),
        *map(str, command),
    ]


def spawn(
    command: Sequence[str | Path],
    *,
    directory: Path,
    log: ServerLog,
    death_signal: signal.Signals,
    identity: Identity = OWN,
) -> subprocess.Popen[bytes]:
    """Start a server in `directory`, in a session of its own so that Ctrl-C reaches the supervisor alone.

    The kernel ends it with `death_signal` when the *thread* that called this ends: call it from one that stays.
    """
    with log.writing() as output:
        return subprocess.Popen(
            launched(command, identity=identity, death_signal=death_signal),
            cwd=directory,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def attempt(
    command: Sequence[str | Path],
    *,
    identity: Identity = OWN,
    directory: Path = Path("/"),
    stdin: str = "",
    timeout_s: float = TOOL_TIMEOUT_S,
) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end in `directory`, its stderr within its stdout, and return how it went."""
    name = Path(command[0]).name
    try:
        return subprocess.run(
            launched(command, identity=identity, death_signal=signal.SIGTERM),
            cwd=directory,
            env=environment(),
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EmbeddedServerFailed(f"{name} did not finish within {timeout_s:g} s.") from None


def run(
    command: Sequence[str | Path],
    *,
    identity: Identity = OWN,
    directory: Path = Path("/"),
    stdin: str = "",
    timeout_s: float = TOOL_TIMEOUT_S,
) -> str:
    """`attempt`, but a failed tool raises, and its own words come back in the error."""
    outcome = attempt(command, identity=identity, directory=directory, stdin=stdin, timeout_s=timeout_s)
    if outcome.returncode != 0:
        raise failure(f"{Path(command[0]).name} failed with status {outcome.returncode}.", outcome.stdout.strip())
    return outcome.stdout


def stop(process: subprocess.Popen[bytes], ladder: Ladder) -> signal.Signals | None:
    """Go down `ladder` until `process` has ended, and reap it. Returns the signal that did it; None: it had ended."""
    if process.poll() is not None:
        return None
    for step, patience_s in ladder:
        process.send_signal(step)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
        return step
    raise EmbeddedServerFailed(f"Process {process.pid} did not end, not even by {ladder[-1][0].name}.")


def living(directory: Path, programs: frozenset[str]) -> list[Any]:
    """The `psutil.Process`es that run one of `programs` with a working directory in `directory`.

    Servers work in their data directory, so this finds them and their children without believing a pid file: a number
    that was left there may by now belong to anyone.
    """
    home = directory.resolve()
    found = []
    for pid in psutil.pids():  # not process_iter: it hands out whoever had this pid when it was last asked
        try:
            process = psutil.Process(pid)
            if process.name() in programs and Path(process.cwd()).is_relative_to(home):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def end_leftovers(directory: Path, programs: frozenset[str], ladder: Ladder) -> None:
    """End what an earlier run left alive in `directory`: the parents by `ladder`, everything by its SIGKILL."""
    left = living(directory, programs)
    for step, patience_s in ladder:
        if not left:
            return
        pids = {process.pid for process in left}
        for process in left:
            try:
                if step is signal.SIGKILL or process.ppid() not in pids:
                    process.send_signal(step)  # psutil looks at the start time first: never a reused pid
            except psutil.NoSuchProcess:
                continue
        left = _still_running(left, patience_s)
    if left:
        pids = {process.pid for process in left}
        raise EmbeddedServerFailed(
            f"Servers of an earlier run in {directory} do not end: {sorted(pids)}.",
            fix=f"End them with `kill -9`, or find out what holds them; then start again in {directory}.",
        )


def _still_running(processes: list[Any], patience_s: float) -> list[Any]:
    """Those that have not ended after `patience_s`. A zombie has: in a container nobody may ever reap it."""
    for _ in range(math.ceil(patience_s / _LOOK_EVERY_S)):
        _, alive = psutil.wait_procs(processes, timeout=_LOOK_EVERY_S)
        processes = [process for process in alive if not _is_zombie(process)]
        if not processes:
            break
    return processes


def _is_zombie(process: Any) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
