"""The pytest fixtures, as a project that uses headrace has them."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = """
import asyncio
import sys

def test_nothing_is_imported_before_it_is_asked_for():
    assert "headrace.cache" not in sys.modules
    assert "headrace.embedded" not in sys.modules

def test_time_moves_when_told(headrace_clock):
    from headrace.cache import MemoryCache
    cache = MemoryCache(ttl=60, clock=headrace_clock)
    cache.set("k", 1)
    headrace_clock.advance(61)
    assert cache.get("k") is None

NAMESPACES = set()
PATIENCE = {"timeout": 20.0, "connect_timeout": 20.0}

def use_redis(url, namespace):
    from headrace.cache import RemoteConfig, SyncCache
    NAMESPACES.add(namespace)
    with SyncCache(remote=RemoteConfig(url=url, **PATIENCE), namespace=namespace, memory=None) as cache:
        assert cache.get("k") is None
        cache.set("k", 1)
        assert cache.get("k") == 1

def test_redis_is_real(headrace_redis, headrace_namespace):
    use_redis(headrace_redis, headrace_namespace)

def test_tests_do_not_see_each_other(headrace_redis, headrace_namespace):
    use_redis(headrace_redis, headrace_namespace)
    assert len(NAMESPACES) == 2

def test_redis_fails_on_demand(headrace_chaos, headrace_namespace):
    from headrace.cache import RemoteConfig, SyncCache
    with headrace_chaos as chaos:
        remote = RemoteConfig(url=chaos.url, **PATIENCE)
        with SyncCache(remote=remote, namespace=headrace_namespace, memory=None) as cache:
            cache.set("k", 1)
            chaos.refuse("GET", error="LOADING")
            assert cache.get("k", "away") == "away"
            chaos.heal()
            assert cache.get("k", "away") == 1
"""


def test_the_fixtures_do_what_they_say(tmp_path: Path):
    """In a project of its own, with the plugin loaded, all fixtures are there for the asking."""
    (tmp_path / "test_project.py").write_text(PROJECT)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "headrace.testing.plugin", "-W", "error", str(tmp_path)]
    alone = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=100, check=False)
    assert "5 passed" in done.stdout, done.stdout + done.stderr
