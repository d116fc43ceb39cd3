"""The in-memory cache under threads, and under calls from inside its own calls."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from headrace.cache import MemoryCache
from headrace.testing import FakeClock

POLICIES = ["adaptive", "lru", "s3fifo", "sieve", "wtinylfu"]
THREADS = 8


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads lose control as often as the interpreter allows."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work: Callable[[int], None]) -> None:
    """Run `work(number)` in THREADS threads at once; the first error is raised here."""
    errors: list[BaseException] = []
    barrier = threading.Barrier(THREADS)

    def run(number: int) -> None:
        try:
            barrier.wait()
            work(number)
        except BaseException as error:  # noqa: BLE001 - it is raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.usefixtures("eager_switches")
def test_no_hit_is_lost_although_none_takes_a_lock():
    """Eight threads that only read: every hit and every miss is counted."""
    cache = MemoryCache(100)
    for key in range(100):
        cache.set(key, key)

    def work(number: int) -> None:
        for step in range(5000):
            key = (step * 7 + number) % 120
            assert cache.get(key) == (key if key < 100 else None)

    in_threads(work)
    told = cache.statistics()
    misses = sum((step * 7 + number) % 120 >= 100 for number in range(THREADS) for step in range(5000))
    assert (told.hits, told.misses) == (THREADS * 5000 - misses, misses)


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("policy", POLICIES)
def test_threads_that_do_everything_at_once_leave_it_whole(policy):
    """A value always belongs to its key, bounds hold at any moment, and afterwards all parts agree."""
    clock, ticking = FakeClock(), threading.Lock()
    cache = MemoryCache(64, ttl=3.0, policy=policy, weight_max=200, clock=clock)

    def work(number: int) -> None:
        for step in range(1500):
            key = (step * step + number) % 150
            found = cache.get(key)
            assert found is None or found[0] == key
            match (step + number) % 11:
                case 0:
                    cache.delete(key)
                case 1:
                    with ticking:  # of two that move it at once, one could set it back
                        clock.advance(0.05)
                case 2 if step % 7 == 0:
                    cache.invalidate_tag(f"group {key % 5}")
                case 3 if step % 50 == 0:
                    cache.clear()
                case 4 if step % 20 == 0:
                    cache.resize(entries_max=32 + key % 33)
                case 5 if step % 30 == 0:
                    cache.delete_where(lambda other: other % 10 == 0)
                case _:
                    cache.set(key, (key, number, step), weight=1 + key % 6, tags=(f"group {key % 5}",))
            assert len(cache) <= 64
            assert cache.statistics().weight <= 200

    in_threads(work)
    cache.validate()
    told = cache.statistics()
    assert told.hits + told.misses == THREADS * 1500


class Meddler:
    """A key, or a value, that calls the cache whenever it can."""

    def __init__(self, name: int, meddle: Callable[[], object]) -> None:
        self.name = name
        self.meddle = meddle

    def __hash__(self) -> int:
        return self.name % 3

    def __eq__(self, other: object) -> bool:
        self.meddle()
        return isinstance(other, Meddler) and self.name == other.name


MEDDLING: dict[str, Callable[[MemoryCache], object]] = {
    "set": lambda cache: cache.set("meddled", 1, tags=("meddled",)),
    "delete": lambda cache: cache.delete("meddled"),
    "get": lambda cache: cache.get("meddled"),
    "clear": lambda cache: cache.clear(),
    "invalidate_tag": lambda cache: cache.invalidate_tag("meddled"),
    "delete_where": lambda cache: cache.delete_where(lambda key: key == "meddled"),
    "resize": lambda cache: cache.resize(entries_max=5),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("what", MEDDLING)
def test_a_key_whose_comparison_calls_the_cache_does_no_harm(policy, what):
    """Its calls are carried out when the call that it interrupts is done."""
    cache = MemoryCache(5, policy=policy)
    depth = 0

    def meddle() -> None:
        nonlocal depth
        if depth < 2:
            depth += 1
            MEDDLING[what](cache)
            depth -= 1

    for step in range(200):
        key = Meddler(step * step % 9, meddle)
        if step % 5 == 4:
            cache.delete(key)
        elif cache.get(key) is None:
            cache.set(key, step, tags=("mine",))
        cache.validate()
    assert len(cache) <= 5


@pytest.mark.parametrize("what", MEDDLING)
def test_a_value_whose_finalizer_calls_the_cache_does_no_harm(what):
    """It dies after the call that removed it gave the lock back."""
    cache = MemoryCache(5)

    class Dying:
        def __del__(self) -> None:
            MEDDLING[what](cache)

    for step in range(100):
        cache.set(step % 13, Dying(), tags=("mine",))
        if step % 10 == 0:
            cache.delete(step % 13)
        if step % 25 == 0:
            cache.invalidate_tag("mine")
        cache.validate()
    cache.clear()
    cache.validate()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_signal_handler_reads_at_once_and_changes_the_cache_when_the_call_that_it_interrupts_is_done(policy):
    """It neither waits for that call nor sees a half of it, and what it asked for is done in its order."""

    class Alarm(FakeClock):
        is_set = False

        def monotonic(self) -> float:
            if self.is_set:
                self.is_set = False
                signal.raise_signal(signal.SIGUSR1)
            return super().monotonic()

    seen: list[object] = []

    def handle(_signal: int, _frame: object) -> None:
        seen.extend([cache.get("outer"), cache.set("inner", 1), cache.delete("old"), cache.set("outer", "late")])
        seen.append(len(cache))

    clock = Alarm()
    cache = MemoryCache(10, ttl=60.0, policy=policy, clock=clock)
    cache.set("outer", "before")
    cache.set("old", 1)
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        clock.is_set = True
        cache.set("outer", "after")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == ["before", True, True, True, 2]
    assert (cache.get("outer"), cache.get("inner"), cache.get("old")) == ("late", 1, None)
    cache.validate()


def test_a_signal_handler_may_use_the_cache_at_any_moment():
    """Two hundred times, wherever the interpreter lets it in: no call is lost, nothing breaks, nothing waits."""
    cache = MemoryCache(50)
    arrived = threading.Event()
    handled = 0

    def handle(_signal: int, _frame: object) -> None:
        nonlocal handled
        handled += 1
        cache.set(f"signal {handled % 5}", handled)
        cache.delete(handled % 60)
        arrived.set()

    def send() -> None:
        for _ in range(200):
            arrived.clear()
            os.kill(os.getpid(), signal.SIGUSR1)
            arrived.wait(10)

    before = signal.signal(signal.SIGUSR1, handle)
    sender = threading.Thread(target=send)
    steps = 0
    try:
        sender.start()
        while sender.is_alive():
            cache.set(steps % 60, steps)
            cache.get(steps % 17)
            steps += 1
    finally:
        sender.join()
        signal.signal(signal.SIGUSR1, before)
    cache.validate()
    assert handled == 200
    assert cache.statistics().sets == steps + handled


@pytest.mark.parametrize("policy", POLICIES)
def test_a_hit_on_what_is_removed_at_the_same_moment_is_counted_and_forgotten(policy):
    """Between finding an entry and noting the hit another thread may remove it; here the clock does."""

    class Interruption(FakeClock):
        interrupt: Callable[[], object] | None = None

        def monotonic(self) -> float:
            if self.interrupt is not None:
                interrupt, self.interrupt = self.interrupt, None
                interrupt()
            return super().monotonic()

    clock = Interruption()
    cache = MemoryCache(3, policy=policy, clock=clock)
    for step in range(30):
        cache.set("key", step)
        clock.interrupt = lambda: cache.delete("key")
        assert cache.get("key") == step
        cache.set(step, step)
        cache.validate()
        assert "key" not in cache
    assert cache.statistics().hits == 30


def test_a_key_that_fails_to_compare_leaves_the_cache_as_it_was():
    """Its error reaches the caller, and the cache works on."""
    cache = MemoryCache(10)
    is_failing = False

    class Failing(Meddler):
        __hash__ = Meddler.__hash__

    def fail() -> None:
        if is_failing:
            raise RuntimeError("no comparison today")

    for name in range(10):
        cache.set(Failing(name, fail), name)
    is_failing = True
    failures = 0
    for step in range(60):
        try:
            # No other key is like this one, so what compares keys here is the eviction of one of ours.
            cache.set(f"plain {step}", step)
        except RuntimeError:
            failures += 1
        cache.validate()
    assert failures > 0
    is_failing = False
    for step in range(60):
        cache.set(Failing(100 + step, fail), step)
    cache.validate()
    assert len(cache) == 10


def test_a_key_that_changes_while_it_is_cached_is_not_kept_for_ever():
    """It cannot be found, but it is evicted like any other, and nothing else is lost."""

    class Changing:
        def __init__(self, name: int) -> None:
            self.name = name

        def __hash__(self) -> int:
            return hash(self.name)

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Changing) and self.name == other.name

    cache = MemoryCache(10, policy="lru")
    changed = Changing(1)
    cache.set(changed, "lost")
    changed.name = 2
    assert cache.get(Changing(1)) is None
    for step in range(9):
        cache.set(step, step)
    cache.set("one more", 1)
    cache.validate()
    assert len(cache) == 10
    assert [cache.get(step) for step in range(9)] == list(range(9))


def test_calls_that_no_number_could_mean_are_type_errors():
    """The same compiled and interpreted."""
    cache = MemoryCache()
    with pytest.raises(TypeError):
        cache.set([], 1)
    with pytest.raises(TypeError):
        cache.get({})
    with pytest.raises(TypeError):
        cache.set("key", 1, tags=([],))
    cache.validate()
    assert len(cache) == 0
