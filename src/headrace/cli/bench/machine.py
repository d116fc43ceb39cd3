"""What a result was measured on: without it, a number is an anecdote."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import psutil

from headrace import build
from headrace.clock import Clock

PACKAGES = ("headrace", "uvicorn", "uvloop", "httptools", "starlette", "msgspec", "redis", "hiredis", "psycopg")
GIT_S_MAX = 5.0


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The circumstances of a run."""

    date: str
    """UTC, ISO 8601."""
    cpu: str
    cores: int
    """That this process may use."""
    memory_bytes: int
    load_average: float
    """Over the last minute, before anything was measured: above 0.5 somebody else was working too."""
    platform: str
    python: str
    versions: dict[str, str]
    build: str
    """The hot modules: compiled, plain Python, or stale, which is compiled from an older source."""
    commit: str | None
    """Of the checkout that runs, with `-dirty` when it has changes; None outside of one, or when git cannot say."""


def machine(clock: Clock) -> Machine:
    """Look around. Takes a few milliseconds and starts git, so it is not for an event loop."""
    return Machine(
        date=datetime.fromtimestamp(clock.wall(), UTC).isoformat(timespec="seconds"),
        cpu=_cpu_model(),
        cores=_cores(),
        memory_bytes=psutil.virtual_memory().total,
        load_average=round(psutil.getloadavg()[0], 2),
        platform=platform.platform(),
        python=f"{platform.python_implementation()} {platform.python_version()}",
        versions=_versions(),
        build=("stale" if build.is_stale() else "compiled") if build.is_compiled() else "plain",
        commit=commit_of(Path(build.__file__).parent),
    )


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _versions() -> dict[str, str]:
    versions: dict[str, str] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def commit_of(directory: Path) -> str | None:
    """Git answers None for a directory that it does not track, such as a site-packages inside somebody's checkout."""
    if not _git(directory, "ls-files", "--error-unmatch", "clock.py"):
        return None
    commit, changes = _git(directory, "rev-parse", "HEAD"), _git(directory, "status", "--porcelain")
    if not commit or changes is None:
        return None
    return f"{commit}-dirty" if changes else commit


def _git(directory: Path, *arguments: str) -> str | None:
    """What git says; None when it refuses or takes too long."""
    try:
        command = ["git", "-C", str(directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_S_MAX, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
