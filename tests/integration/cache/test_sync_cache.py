"""What only the door without `await` has: threads, forks, interrupts and the end of the interpreter."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from msgspec import UNSET

from headrace.cache import RemoteConfig, SyncCache
from headrace.cache.portal import PORTAL
from headrace.errors import CacheUnavailable, CallerError, ConfigError
from headrace.events import Event
from tests.redis_servers import CLOCK, PATIENT, wait_until


@pytest.fixture
def make_cache(server) -> Iterator[Callable[..., SyncCache]]:
    made: list[SyncCache] = []

    def make(**options: object) -> SyncCache:
        remote = RemoteConfig(url=server.url, **PATIENT)
        cache = SyncCache(**{"remote": remote, **options})  # type: ignore[arg-type]
        made.append(cache)
        return cache

    yield make
    for cache in made:
        cache.close()


def run(program: str, *arguments: str, timeout_s: float = 100.0) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "dev", "-c", program, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    # In dev mode asyncio tells which of its callbacks took more than 0.1 s, as any may on a busy machine.
    said = result.stderr.splitlines(keepends=True)
    result.stderr = "".join(line for line in said if not re.fullmatch(r"Executing <.*> took [\d.]+ seconds\n", line))
    return result


def portal_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "headrace-cache"]


def test_it_opens_at_its_first_use_and_shares_one_thread(make_cache):
    """A cache that was made has no thread; all open ones share one, which ends with the last of them."""
    one, two = make_cache(), make_cache()
    assert portal_threads() == []
    one.set("k", 1)
    assert two.get("k") == 1
    assert portal_threads() == ["headrace-cache"]
    one.close()
    assert two.get("k") == 1
    two.close()
    assert portal_threads() == []


def test_with_opens_and_closes(make_cache):
    """`with` opens a cache that is not open yet, and leaves it closed."""
    cache = make_cache()
    cache.set("k", 1)
    with cache as same:
        assert same.get("k") == 1
    assert portal_threads() == []


def test_a_hit_stays_in_the_calling_thread(make_cache):
    """While the loop's thread is stuck, hits of all kinds still answer."""
    cache = make_cache()

    @cache.cached("f:{number}")
    def double(number: int) -> int:
        return 2 * number

    cache.set("k", 1)
    assert double(2) == 4
    stuck, may_go = threading.Event(), threading.Event()
    loop = PORTAL.hold()
    try:
        loop.call_soon_threadsafe(lambda: (stuck.set(), may_go.wait(10)))
        assert stuck.wait(10)
        assert cache.get("k") == 1
        assert cache.get_or_load("k", lambda: 2) == 1
        assert cache.get_many(["k"]) == {"k": 1}
        assert double(2) == 4
    finally:
        may_go.set()
        PORTAL.release(loop)


def test_memory_alone_never_crosses_to_the_loop():
    """Without a shared tier reads, writes and loads happen in the calling thread."""
    with SyncCache() as cache:
        stuck, may_go = threading.Event(), threading.Event()
        loop = PORTAL.hold()
        try:
            loop.call_soon_threadsafe(lambda: (stuck.set(), may_go.wait(10)))
            assert stuck.wait(10)
            cache.set_many({"a": 1, "b": 2})
            cache.update("a", lambda old: old + 1)
            assert cache.get_or_load("c", threading.get_ident) == threading.get_ident()
            assert cache.get_many(["a", "b", "x"]) == {"a": 2, "b": 2}
            assert cache.invalidate_pattern("a*") == 1
            cache.clear()
            assert cache.get("b") is None
        finally:
            may_go.set()
            PORTAL.release(loop)


def test_a_miss_counts_once(make_cache):
    """The statistics of both tiers see each read once."""
    cache = make_cache()
    cache.set("k", 1)
    cache.get("k")
    cache.get("missing")
    cache.get_many(["k", "missing"])
    statistics = cache.statistics()
    assert (statistics.memory_hits, statistics.memory_misses) == (2, 2)
    assert (statistics.remote_hits, statistics.remote_misses) == (0, 2)


def test_a_cold_key_is_loaded_once_over_threads(make_cache):
    """The loader runs in one of the threads that ask, and the others get what it returned."""
    cache = make_cache()
    loads = []

    def load() -> str:
        loads.append(threading.get_ident())
        wait_until(lambda: len(pool._threads) == 8, "all threads ask")
        return "value"

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda _: cache.get_or_load("k", load), range(8)))
        assert values == ["value"] * 8
        assert len(loads) == 1
        assert loads[0] in {thread.ident for thread in pool._threads}


def test_a_call_waits_no_longer_than_told(make_cache, server):
    """With a server that does not answer and a long timeout, `wait_max` bounds the call."""
    cache = make_cache(remote=RemoteConfig(url=server.url, timeout=60, connect_timeout=60), memory=None, wait_max=60)
    cache.set("k", 1)
    server.signal(signal.SIGSTOP)
    cache._wait_max_s = 0.2
    try:
        started = CLOCK.monotonic()
        with pytest.raises(CacheUnavailable, match="wait_max"):
            cache.get("k")
        assert CLOCK.monotonic() - started < 20
    finally:
        cache._wait_max_s = 60
        server.signal(signal.SIGCONT)
    assert cache.get("k") == 1


def test_an_interrupt_ends_the_wait(make_cache, server):
    """Ctrl-C in the waiting thread is raised at once, and the cache works on."""
    remote = RemoteConfig(url=server.url, timeout=60, connect_timeout=60)
    cache = make_cache(remote=remote, memory=None)
    cache.set("k", 1)
    waiting = threading.Event()
    fetch = cache._cache._shared.fetch

    def tell(key: str) -> object:
        waiting.set()
        return fetch(key)

    cache._cache._shared.fetch = tell
    server.signal(signal.SIGSTOP)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored
    # Not sooner: an interrupt outside of the call would end the session.
    interrupting = threading.Thread(target=lambda: waiting.wait(60) and os.kill(os.getpid(), signal.SIGINT))
    interrupting.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            cache.get("k")
    finally:
        interrupting.join()
        signal.signal(signal.SIGINT, before)
        server.signal(signal.SIGCONT)
    assert cache.get("k") == 1


def test_an_interrupted_load_is_taken_over(make_cache):
    """When the loading thread is interrupted, one that waited loads instead."""
    cache = make_cache()
    is_loading = threading.Event()

    def load_interrupted() -> str:
        is_loading.set()
        flight = cache._cache._filler._flights._table["k"]
        wait_until(lambda: len(flight.waiters) == 2, "the other asks")
        raise KeyboardInterrupt

    found = []

    def ask() -> None:
        is_loading.wait(60)
        found.append(cache.get_or_load("k", lambda: "second"))

    waiter = threading.Thread(target=ask)
    waiter.start()
    with pytest.raises(KeyboardInterrupt):
        cache.get_or_load("k", load_interrupted)
    waiter.join(60)
    assert found == ["second"]


def test_updates_are_atomic_on_a_cluster(start_cluster):
    """Keys in all slots are counted up by two caches at once, and nothing is lost."""
    remote = RemoteConfig(url=start_cluster().url, **PATIENT)
    keys = [f"n{number}" for number in range(12)]
    with SyncCache(remote=remote) as one, SyncCache(remote=remote, memory=None) as two, ThreadPoolExecutor(4) as pool:
        calls = [(cache, key) for cache in (one, two) for key in keys for _ in range(10)]
        list(pool.map(lambda call: call[0].update(call[1], lambda old: 1 if old is UNSET else old + 1), calls))
        assert two.get_many(keys) == dict.fromkeys(keys, 20)
        wait_until(lambda: one.get_many(keys) == dict.fromkeys(keys, 20), "the last counts are heard of")


class Curious:
    """An observer that asks the cache what it should not ask there."""

    def __init__(self) -> None:
        self.cache: SyncCache | None = None
        self.errors: list[CallerError] = []
        self.told = threading.Event()

    def on(self, event: Event) -> None:
        assert self.cache is not None
        try:
            self.cache.set("from the observer", 1)
        except CallerError as error:
            self.errors.append(error)
        self.told.set()


def test_waiting_for_oneself_is_refused(make_cache, server):
    """A call from the loop's own thread raises instead of hanging."""
    observer = Curious()
    observer.cache = cache = make_cache(observer=observer)
    cache.set("k", 1)
    server.stop()
    assert observer.told.wait(60)
    assert "own event loop thread" in str(observer.errors[0])
    with pytest.raises(CacheUnavailable):
        cache.update("k", lambda old: cache.get("other"))


async def test_a_coroutine_function_can_be_decorated_too(make_cache):
    """It is awaited on the caller's loop, and its value is shared with the plain ones."""
    cache = make_cache()
    calls = []

    @cache.cached("f:{number}")
    async def load(number: int) -> int:
        calls.append(asyncio.get_running_loop())
        return 2 * number

    assert [await load(1), await load(1)] == [2, 2]
    assert calls == [asyncio.get_running_loop()]
    assert await asyncio.to_thread(cache.get, "f:1") == 2
    await asyncio.to_thread(cache.close)


def test_wait_max_is_checked():
    """A bound that is none is refused."""
    with pytest.raises(ConfigError, match="wait_max"):
        SyncCache(wait_max=0)


FORK = """
import os, sys, threading
from headrace.cache import RemoteConfig, SyncCache

cache = SyncCache(remote=RemoteConfig(url=sys.argv[1], timeout=20, connect_timeout=20, lease=60))

@cache.cached("f:{number}")
def load(number: int) -> int:
    return os.getpid()

cache.set("k", "parent")
parent = load(1)
busy = threading.Thread(target=lambda: [cache.set("busy", n) for n in range(300)])
busy.start()
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        assert cache.statistics().entries == 0, cache.statistics()
        assert cache.get("k") == "parent"
        assert load(1) == parent
        cache.set(f"child:{number}", os.getpid())
        assert cache.get(f"child:{number}") == os.getpid()
        sys.exit(0)
    children.append(child)
codes = [os.waitpid(child, 0)[1] for child in children]
busy.join()
for number, child in enumerate(children):
    assert cache.get(f"child:{number}") == child, number
assert cache.get("busy") == 299
assert codes == [0] * 4, codes
print("done")
"""


def test_a_child_process_begins_anew(server):
    """Forked from a process with an open cache in use, each child has its own, and the parent's works on."""
    result = run(FORK, server.url)
    warned = [line for line in result.stderr.splitlines() if "multi-threaded" not in line and "os.fork()" not in line]
    assert (result.stdout, warned) == ("done\n", [])


EXIT = """
import sys
from headrace.cache import CachePolicy, RemoteConfig, Strategy, SyncCache

cache = SyncCache(
    remote=RemoteConfig(url=sys.argv[1], spool_directory=sys.argv[2], timeout=20, connect_timeout=20),
    policies=[CachePolicy(match="late:*", strategy=Strategy.WRITE_BEHIND)],
)
for number in range(100):
    cache.set(f"late:{number}", number)
"""


def test_what_is_queued_at_exit_is_delivered(server, make_cache, tmp_path):
    """A script that just ends leaves nothing behind: not in the queue, not on disk, not on stderr."""
    result = run(EXIT, server.url, str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    keys = [f"late:{number}" for number in range(100)]
    assert make_cache().get_many(keys) == {key: number for number, key in enumerate(keys)}
    assert list(tmp_path.iterdir()) == []
