"""pytest fixtures for the tests of those who use headrace. Nothing is imported before a test asks for it."""

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from headrace.testing.chaos import ChaosRemote
    from headrace.testing.clock import FakeClock


@pytest.fixture
def headrace_clock() -> "FakeClock":
    """A clock that stands still until the test moves it: `Cache(clock=headrace_clock)`."""
    from headrace.testing.clock import FakeClock

    return FakeClock()


@pytest.fixture(scope="session")
def headrace_redis() -> Iterator[str]:
    """The URL of a real Redis for this session, on a Unix socket. Needs redis-server on PATH or `headrace[embedded]`;
    without them the test is skipped."""
    from headrace.embedded import EmbeddedRedis, started
    from headrace.errors import EmbeddedServerFailed

    with tempfile.TemporaryDirectory(prefix="headrace-") as directory:
        server = EmbeddedRedis(Path(directory))
        try:
            _ = server.program
        except EmbeddedServerFailed as error:
            pytest.skip(str(error))
        with started(server):
            yield server.url


@pytest.fixture
def headrace_chaos(headrace_redis: str) -> "ChaosRemote":
    """The session's Redis behind a front that fails on demand, to be entered by the test: `with headrace_chaos as
    chaos`, or `async with` in a coroutine."""
    from headrace.testing.chaos import ChaosRemote

    return ChaosRemote(headrace_redis)


@pytest.fixture
def headrace_namespace() -> str:
    """A namespace of this test alone, so that tests may share a Redis: `Cache(namespace=headrace_namespace)`."""
    return f"test-{secrets.token_hex(6)}"
