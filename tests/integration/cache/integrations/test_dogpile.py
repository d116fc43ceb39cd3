"""The dogpile back end: dogpile's own suites, and what is ours, on a real Redis."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

pytest.importorskip("dogpile.cache", reason="dogpile.cache is not installed")

from dogpile.cache import make_region
from dogpile.cache.api import NO_VALUE
from dogpile.testing.fixtures import (
    _GenericBackendFixture,
    _GenericBackendTestSuite,
    _GenericMutexTestSuite,
    _GenericSerializerTestSuite,
)

from headrace.cache.integrations.dogpile import HeadraceBackend, Mutex
from headrace.cache.integrations.settings import close_shared
from headrace.errors import UnencodableValue
from headrace.testing import FakeClock
from tests.redis_servers import PATIENT, RedisServer, wait_until


@pytest.fixture(scope="module", autouse=True)
def server_of_the_suites() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        server = RedisServer(Path(directory)).start()
        OnRedis.config_args["arguments"] = {"url": server.url, "remote": PATIENT, "lock_timeout": 5.0}
        yield
        server.stop()


@pytest.fixture(autouse=True)
def caches_of_the_suites(server_of_the_suites) -> Iterator[None]:
    yield
    close_shared()


class OnRedis:
    """The suites make their regions of these."""

    backend = "headrace"
    config_args: ClassVar = {"arguments": {}}


class BackendSuite(_GenericBackendTestSuite):
    """Dogpile's tests of a back end."""

    def test_region_expire(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As dogpile has it, in a time that passes by its sleeps alone: a slow machine misses no expiry."""
        clock = FakeClock()
        for module in ("dogpile.cache.region", "dogpile.lock", "dogpile.testing.fixtures"):
            monkeypatch.setattr(f"{module}.time", SimpleNamespace(time=clock.wall, sleep=clock.advance))
        super().test_region_expire()


class TestBackend(OnRedis, BackendSuite):
    pass


class TestMutex(OnRedis, _GenericMutexTestSuite):
    pass


class TestSerializer(OnRedis, _GenericSerializerTestSuite, _GenericBackendFixture):
    pass


class TestMemoryAlone(_GenericMutexTestSuite, BackendSuite):
    backend = "headrace"
    config_args: ClassVar = {"arguments": {"namespace": "memory"}}


@pytest.fixture
def make_backend(server) -> Iterator[Callable[..., HeadraceBackend]]:
    def make(**arguments: object) -> HeadraceBackend:
        return HeadraceBackend({"url": server.url, "remote": PATIENT, **arguments})

    yield make
    close_shared()


def test_nothing_is_pickled(server, make_backend):
    """A value is packed with its type; one that cannot be is refused, and foreign bytes are created again."""
    make_backend()
    region = make_region().configure("headrace", arguments={"url": server.url, "remote": PATIENT})
    region.set("k", {"a": (1, {2})})
    assert region.get("k") == {"a": (1, {2})}
    with pytest.raises(UnencodableValue):
        region.set("k", object())
    raw = region.backend.get_serialized("k")
    region.backend.set_serialized("k", raw[: raw.index(b"|") + 1] + b"\xc1")
    assert region.get("k") is NO_VALUE
    assert region.get_or_create("k", lambda: "again") == "again"


def test_entries_live_as_long_as_told(server, make_backend):
    """`ttl` bounds how long an entry is kept; without it there is no end."""
    make_backend(ttl=50).set_serialized("a", b"1")
    make_backend().set_serialized("b", b"1")
    ttls = {name[-3:]: server.call("PTTL", name) for name in server.call("KEYS", "dogpile:*}")}
    assert 30_000 < ttls[b"{a}"] <= 50_000
    assert ttls[b"{b}"] == -1


def test_a_mutex_without_distribution_is_dogpiles_own(make_backend):
    """`distributed_lock=False` leaves locking to dogpile."""
    backend = make_backend(distributed_lock=False)
    assert backend.get_mutex("k") is None
    assert not backend.has_lock_timeout()


HOLDER = """
import sys
from headrace.cache.integrations.dogpile import HeadraceBackend
remote = {"timeout": 20.0, "connect_timeout": 20.0}
mutex = HeadraceBackend({"url": sys.argv[1], "remote": remote, "lock_timeout": 600.0}).get_mutex("k")
assert mutex.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_killed_holder_costs_its_timeout_and_no_more(server, make_backend):
    """Another process waits for the holder; when that is killed, for what is left of `lock_timeout`."""
    backend = make_backend()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, server.url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        mutex = backend.get_mutex("k")
        assert mutex.locked()
        assert not mutex.acquire(wait=False)
    finally:
        holder.kill()
        holder.communicate()
    (name,) = server.call("KEYS", "dogpile:*{@mutex:k}")
    assert 0 < server.call("PTTL", name) <= 600_000
    server.call("PEXPIRE", name, 100)  # the rest of the time has passed
    assert mutex.acquire()
    mutex.release()
    assert not mutex.locked()


def test_a_late_release_frees_nobody_elses_mutex(make_backend):
    """Who held it too long and lost it does not release the next holder's."""
    late, next_one = make_backend(lock_timeout=0.1), make_backend(memory=None)
    slow = late.get_mutex("k")
    assert slow.acquire()
    other = Mutex(next_one._cache, "@mutex:k", timeout_s=600, wait_max_s=60)
    assert other.acquire()
    slow.release()
    assert other.locked()
    assert not late.get_mutex("k").acquire(wait=False)
    other.release()


def test_who_gave_up_waiting_releases_nobody_elses_mutex(make_backend):
    """dogpile creates and releases after a wait in vain too; the holder's release still lets the next one in."""
    mutex = make_backend(lock_timeout=600.0, lock_wait_max=0.05).get_mutex("k")
    assert mutex.acquire()

    def give_up() -> bool:
        is_held = mutex.acquire()
        mutex.release()
        return is_held

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(give_up).result() is False
    assert mutex.locked()
    mutex.release()
    assert mutex.acquire(wait=False)
    mutex.release()


def test_without_redis_each_process_creates_for_itself(server, make_backend):
    """A dead server breaks no creator: the mutex is one of this process then."""
    backend = make_backend()
    backend.set_serialized("k", b"1")
    server.stop()
    wait_until(lambda: not backend._cache.statistics().remote_available, "the loss is noticed")
    mutex, same = backend.get_mutex("k"), backend.get_mutex("k")
    assert mutex.acquire()
    assert not same.acquire(wait=False)
    assert mutex.locked()
    mutex.release()
    assert not mutex.locked()
    region = make_region().configure("headrace", arguments={"cache": backend._cache})
    assert region.get_or_create("new", lambda: "made") == "made"
