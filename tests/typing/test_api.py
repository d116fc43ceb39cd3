"""The types of the public doors, as mypy sees them from a user's program."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def mypy(path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_doors_have_the_types_that_they_promise() -> None:
    """Every `assert_type` of tests/typing/api.py holds under mypy's strict rules."""
    result = mypy(ROOT / "tests/typing/api.py")

    assert result.returncode == 0, result.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_wrong_type_is_refused(tmp_path: Path) -> None:
    """The check can fail: an `assert_type` that does not hold is an error."""
    planted = tmp_path / "planted.py"
    planted.write_text(
        "from typing import assert_type\nfrom headrace.errors import NotOpen\nassert_type(NotOpen('x').code, int)\n"
    )

    result = mypy(planted)

    assert result.returncode == 1
    assert 'Expression is of type "str", not "int"' in result.stdout
