import subprocess

from headrace.cli.bench.machine import commit_of, machine
from headrace.clock import SystemClock


class Christmas(SystemClock):
    """A clock that stands at a known time of the wall."""

    def wall(self) -> float:
        return 1_766_620_800.0


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


def test_a_commit_is_named_and_marked_when_the_checkout_has_changes(tmp_path):
    """A result belongs to a commit only if nothing was changed since."""
    source = tmp_path / "clock.py"
    source.write_text("one")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "clock.py")
    git(tmp_path, "commit", "-q", "-m", "first")

    clean = commit_of(tmp_path)
    source.write_text("two")
    changed = commit_of(tmp_path)

    assert clean is not None
    assert len(clean) == 40
    assert changed == f"{clean}-dirty"


def test_an_installation_inside_of_somebody_elses_checkout_has_no_commit(tmp_path):
    """A site-packages in a project's .venv is not that project."""
    git(tmp_path, "init", "-q")
    installed = tmp_path / "site-packages"
    installed.mkdir()
    (installed / "clock.py").write_text("one")

    assert commit_of(installed) is None
