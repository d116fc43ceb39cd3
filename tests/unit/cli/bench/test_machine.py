import shutil
import subprocess

import pytest

from headrace.cli.bench.machine import commit_of, machine
from headrace.clock import SystemClock


class Christmas(SystemClock):
    """A clock that stands at a known time of the wall."""

    def wall(self) -> float:
        return 1_766_620_800.0


@pytest.fixture
def patient(monkeypatch):
    """Git may take as long as it takes on a busy machine."""
    monkeypatch.setattr("headrace.cli.bench.machine.GIT_S_MAX", 60.0)


def git(directory, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", directory, *identity, *arguments], check=True, capture_output=True)


def test_the_machine_names_what_results_depend_on():
    """CPU, cores, memory, Python, versions, build and date are there."""
    found = machine(Christmas())

    assert found.date == "2025-12-25T00:00:00+00:00"
    assert found.cpu
    assert found.cores >= 1
    assert found.memory_bytes > 100_000_000
    assert found.python.startswith("CPython 3.")
    assert {"headrace", "uvicorn", "uvloop", "msgspec"} <= set(found.versions)
    assert found.build in {"compiled", "plain", "stale"}


def committed(directory):
    """A checkout of one source."""
    source = directory / "clock.py"
    source.write_text("one")
    git(directory, "init", "-q")
    git(directory, "add", "clock.py")
    git(directory, "commit", "-q", "-m", "first")
    return source


@pytest.mark.usefixtures("patient")
def test_a_commit_is_named_and_marked_when_the_checkout_has_changes(tmp_path):
    """A result belongs to a commit only if nothing was changed since."""
    source = committed(tmp_path)

    clean = commit_of(tmp_path)
    source.write_text("two")
    changed = commit_of(tmp_path)

    assert clean is not None
    assert len(clean) == 40
    assert changed == f"{clean}-dirty"


@pytest.mark.usefixtures("patient")
def test_a_checkout_whose_changes_git_cannot_tell_has_no_commit(tmp_path, monkeypatch):
    """On a slow disk git may not have looked through all files in time: then nobody knows that nothing was changed."""
    committed(tmp_path)
    silent = tmp_path / "bin" / "git"
    silent.parent.mkdir()
    silent.write_text(f'#!/bin/sh\n[ "$3" = status ] && exit 1\nexec {shutil.which("git")} "$@"\n')
    silent.chmod(0o700)
    monkeypatch.setenv("PATH", str(silent.parent), prepend=":")

    assert commit_of(tmp_path) is None


def test_an_installation_inside_of_somebody_elses_checkout_has_no_commit(tmp_path):
    """A site-packages in a project's .venv is not that project."""
    git(tmp_path, "init", "-q")
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "clock.py").write_text("one")

    assert commit_of(installed) is None
