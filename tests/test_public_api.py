"""What `import headrace` promises: few names, each in its place, and nothing loaded before it is used."""

import importlib
import json
import pkgutil
import subprocess
import sys
from typing import Any

import pytest

import headrace

DRIVERS = ("redis", "psycopg", "sqlglot", "uvicorn", "starlette")
IMPORT_MS_MAX = 50.0
NAMES_MAX = 20

ROOMS = sorted(module.name for module in pkgutil.iter_modules(headrace.__path__, "headrace.") if module.ispkg)

# The first import of a process that has only started: what a user's own process pays.
IMPORT = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import headrace
elapsed_ms = (time.perf_counter() - start) * 1000
print(json.dumps({"elapsed_ms": elapsed_ms, "loaded": sorted(set(sys.modules) - before)}))
"""


def import_in_fresh_process() -> Any:
    run = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, timeout=30)
    return json.loads(run.stdout)


def test_the_names_are_few_and_sorted() -> None:
    """A reader sees the whole of `headrace.__all__` at once, in order and without doubles."""
    assert headrace.__all__ == sorted(set(headrace.__all__))
    assert len(headrace.__all__) <= NAMES_MAX


@pytest.mark.parametrize("name", headrace.__all__)
def test_every_name_is_there(name: str) -> None:
    """Each public name resolves, to the very object of the module that defines it."""
    value = getattr(headrace, name)

    assert getattr(importlib.import_module(value.__module__), name) is value


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A name that does not exist fails as in any module, and the message names it."""
    with pytest.raises(AttributeError, match="no attribute 'Cashe'"):
        headrace.Cashe  # noqa: B018 - reading the attribute is the act


def test_dir_is_complete() -> None:
    """`dir(headrace)` offers every public name although none is loaded yet."""
    assert set(headrace.__all__) <= set(dir(headrace))


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_lists_its_names(room: str) -> None:
    """A room's `__all__` is sorted, without doubles, and every name in it resolves."""
    module = importlib.import_module(room)
    names = getattr(module, "__all__", [])

    assert list(names) == sorted(set(names))
    assert [name for name in names if not hasattr(module, name)] == []


def test_import_is_quick() -> None:
    """`import headrace` costs a process less than 50 ms; the least of five runs is free of the machine's noise."""
    least_ms = min(import_in_fresh_process()["elapsed_ms"] for _ in range(5))

    assert least_ms < IMPORT_MS_MAX


def test_import_loads_no_driver() -> None:
    """`import headrace` loads no database driver, parser or web server."""
    loaded = {name.partition(".")[0] for name in import_in_fresh_process()["loaded"]}

    assert loaded.isdisjoint(DRIVERS)


@pytest.mark.parametrize("room", ["headrace.cache", "headrace.errors", "headrace.clock", "headrace.build"])
def test_a_room_without_servers_loads_no_driver(room: str) -> None:
    """Whoever uses only the in-memory cache never pays for Redis, Postgres or a web server."""
    probe = f"import json, sys, {room}; print(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=30)

    assert {name.partition(".")[0] for name in json.loads(run.stdout)}.isdisjoint(DRIVERS)
