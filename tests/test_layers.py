"""The rooms are kept apart by a tool. Each contract of pyproject.toml refuses an import planted against it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(
        ROOT / "src/headrace", tmp_path / "headrace", ignore=shutil.ignore_patterns("*.so", "__pycache__", "dashboard")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"],
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def test_the_package_keeps_its_contracts(copy: Path) -> None:
    """The package as it is breaks no contract."""
    result = lint_imports(copy)

    assert result.returncode == 0, result.stdout
    assert " 0 broken" in result.stdout


@pytest.mark.parametrize(
    ("contract", "module", "statement", "refusal"),
    [
        pytest.param(
            "rooms import downward only",
            "cache/planted.py",
            "import headrace.server",
            "headrace.cache.planted -> headrace.server",
            id="upward",
        ),
        pytest.param(
            "rooms import downward only",
            "monitor/planted.py",
            "import headrace.database",
            "headrace.monitor.planted -> headrace.database",
            id="sideways",
        ),
        pytest.param(
            "rooms import downward only",
            "planted/__init__.py",
            "",
            "headrace.planted",
            id="a room that has no place",
        ),
        pytest.param(
            "deciding is pure: no clock, no loop, no socket",
            "cache/policies/planted.py",
            "import time",
            "headrace.cache.policies.planted -> time",
            id="a policy that reads the clock",
        ),
        pytest.param(
            "one importer a driver: redis",
            "cache/planted.py",
            "import redis.asyncio",
            "headrace.cache.planted -> redis",
            id="a second importer of redis",
        ),
        pytest.param(
            "few importers of a driver: psycopg",
            "agents/planted.py",
            "from psycopg_pool import AsyncConnectionPool",
            "headrace.agents.planted -> psycopg_pool",
            id="a second importer of psycopg",
        ),
        pytest.param(
            "no cycles anywhere",
            "events.py",
            "import headrace.actions\nimport headrace.clock\n",
            "headrace.events",
            id="a cycle",
        ),
    ],
)
def test_a_planted_import_is_refused(copy: Path, contract: str, module: str, statement: str, refusal: str) -> None:
    """An import that a contract forbids breaks that contract, and the report names both."""
    planted = copy / "headrace" / module
    planted.parent.mkdir(exist_ok=True)
    if "cycle" in contract:
        (copy / "headrace/actions.py").write_text("import headrace.events\n")
    planted.write_text(f'"""Planted."""\n{statement}\n')

    result = lint_imports(copy)

    assert result.returncode == 1, result.stdout
    assert f"{contract} BROKEN" in " ".join(result.stdout.split())
    assert refusal in result.stdout
