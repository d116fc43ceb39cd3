"""The table of loads under way, without a cache around it."""

import asyncio
import threading
from types import SimpleNamespace

import pytest

from headrace.cache.flight import Flights
from headrace.errors import LoadTimeout, NotOpen

EPOCH = (0, 0)


def start(work) -> asyncio.Task:
    return asyncio.get_running_loop().create_task(work)


async def test_a_new_epoch_is_a_new_flight():
    """A caller who asks after an invalidation does not join a load from before it."""
    flights = Flights()
    gate = asyncio.Event()
    runs = []

    def work(name: str):
        async def load() -> str:
            runs.append(name)
            await gate.wait()
            return name

        return load

    old = start(flights.run("k", (0, 0), work("old")))
    await asyncio.sleep(0)
    new = start(flights.run("k", (0, 1), work("new")))
    also_new = start(flights.run("k", (0, 1), work("never")))
    await asyncio.sleep(0)
    gate.set()
    assert [await old, await new, await also_new] == [("old", False), ("new", False), ("new", True)]
    assert runs == ["old", "new"]
    assert len(flights) == 0


async def test_refreshes_are_bounded():
    """No more than refreshes_max loads run behind callers; further ones are not begun."""
    flights = Flights(refreshes_max=2)
    gate = asyncio.Event()
    assert [flights.start(f"k{number}", EPOCH, gate.wait) for number in range(4)] == [True, True, False, False]
    assert flights.start("k0", EPOCH, gate.wait) is False
    gate.set()
    await flights.settled()
    assert flights.start("k4", EPOCH, gate.wait) is True
    await flights.settled()


async def test_a_refresh_outlives_those_who_joined_it():
    """A load behind a hit is not cancelled when a caller that joined it leaves."""
    flights = Flights()
    gate = asyncio.Event()
    finished = asyncio.Event()

    async def load() -> None:
        await gate.wait()
        finished.set()

    flights.start("k", EPOCH, load)
    caller = start(flights.run("k", EPOCH, load))
    await asyncio.sleep(0)
    caller.cancel()
    await asyncio.wait([caller])
    gate.set()
    await flights.settled()
    assert finished.is_set()


async def test_a_load_that_cancels_itself_is_a_cancellation():
    """What direct awaiting would give: the caller sees CancelledError, and the next call starts afresh."""
    flights = Flights()

    async def load() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await flights.run("k", EPOCH, load)
    assert (await flights.run("k", EPOCH, lambda: asyncio.sleep(0, 1)))[0] == 1


async def test_a_load_that_dies_with_its_loop_is_taken_over():
    """A waiter in another loop loads for itself when the first loop ends in the middle of the load."""
    flights = Flights()
    entered = threading.Event()
    release = threading.Event()

    async def never() -> None:
        entered.set()
        await asyncio.Event().wait()

    async def elsewhere() -> None:
        task = start(flights.run("k", EPOCH, never))
        await asyncio.to_thread(release.wait, 60)
        task.cancel()

    thread = start(asyncio.to_thread(asyncio.run, elsewhere()))
    await asyncio.to_thread(entered.wait, 60)
    waiter = start(flights.run("k", EPOCH, lambda: asyncio.sleep(0, "mine")))
    while len(flights._table["k"].waiters) < 2:
        await asyncio.sleep(0.001)
    flight = flights._table["k"]
    flight.task.get_loop().call_soon_threadsafe(flight.task.cancel)
    assert (await waiter)[0] == "mine"
    release.set()
    await thread


async def test_an_interrupted_thread_does_not_fail_the_others():
    """When the loading thread is interrupted, a waiting one loads for itself."""
    flights = Flights()
    entered, leave = threading.Event(), threading.Event()

    def interrupted() -> None:
        entered.set()
        leave.wait(60)
        raise KeyboardInterrupt

    def load_here() -> None:
        with pytest.raises(KeyboardInterrupt):
            flights.run_in_thread("k", EPOCH, interrupted)

    first = threading.Thread(target=load_here)
    first.start()
    await asyncio.to_thread(entered.wait, 60)
    second = start(asyncio.to_thread(flights.run_in_thread, "k", EPOCH, lambda: "mine"))
    while len(flights._table["k"].waiters) < 2:
        await asyncio.sleep(0.001)
    leave.set()
    assert await second == ("mine", False)
    first.join()


async def test_a_closed_table_takes_no_loads():
    """After close nothing is begun."""
    flights = Flights()
    await flights.close()
    with pytest.raises(NotOpen):
        await flights.run("k", EPOCH, lambda: asyncio.sleep(0))
    assert flights.start("k", EPOCH, lambda: asyncio.sleep(0)) is False


class Stuck:
    """A plain load in a thread of its own that does not return until it is let go."""

    def __init__(self, flights: Flights, key: str = "k") -> None:
        self.entered, self.release = threading.Event(), threading.Event()
        self.outcome: list[object] = []
        self.thread = threading.Thread(
            target=lambda: self.outcome.append(flights.run_in_thread(key, EPOCH, self._load))
        )
        self.thread.start()
        assert self.entered.wait(60)

    def _load(self) -> str:
        self.entered.set()
        assert self.release.wait(60)
        return "late"

    def let_go(self) -> None:
        self.release.set()
        self.thread.join(60)


def test_a_thread_waits_in_bounds_for_another_threads_load():
    """A loader that does not return costs a waiting thread `wait_max_s` and an error that names the key."""
    flights = Flights()
    stuck = Stuck(flights)
    flight = flights._table["k"]
    with pytest.raises(LoadTimeout, match=r"'k' is being loaded by another thread.* 0\.05 s"):
        flights.run_in_thread("k", EPOCH, lambda: "mine", wait_max_s=0.05)
    assert len(flight.waiters) == 1, "only the loading thread itself is left"
    stuck.let_go()
    assert stuck.outcome == [("late", False)]


async def test_a_coroutine_waits_in_bounds_for_a_threads_load():
    """What cannot be cancelled is waited for in bounds by coroutines too."""
    flights = Flights()
    stuck = Stuck(flights)
    flight = flights._table["k"]
    with pytest.raises(LoadTimeout, match="'k'"):
        await flights.run("k", EPOCH, lambda: asyncio.sleep(0, "mine"), wait_max_s=0.05)
    assert len(flight.waiters) == 1, "only the loading thread itself is left"
    stuck.let_go()


def test_after_a_stuck_loader_others_load_for_themselves():
    """A loader that never returns does not keep its key from being loaded for ever, and its end disturbs nobody."""
    flights = Flights()
    stuck = Stuck(flights)
    with pytest.raises(LoadTimeout):
        flights.run_in_thread("k", EPOCH, lambda: "mine", wait_max_s=0.05)
    assert len(flights) == 0
    assert flights.run_in_thread("k", EPOCH, lambda: "mine", wait_max_s=0.05) == ("mine", False)
    second = Stuck(flights)
    stuck.let_go()
    assert len(flights) == 1, "the end of the first load does not end the second"
    second.let_go()
    assert len(flights) == 0


async def test_a_thread_that_gives_up_ends_a_load_that_nobody_else_waits_for(monkeypatch: pytest.MonkeyPatch):
    """A load on a loop whose last waiter was a thread is cancelled when that thread has waited long enough."""
    flights = Flights()
    cancelled = asyncio.Event()
    is_waiting, has_waited = threading.Event(), threading.Event()

    class Landing(threading.Event):
        """What is waited for in vain, for as long as the test says."""

        def wait(self, timeout: float | None = None) -> bool:
            is_waiting.set()
            return not has_waited.wait(60) or self.is_set()

    monkeypatch.setattr("headrace.cache.flight.threading", SimpleNamespace(Event=Landing))

    async def never() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    first = start(flights.run("k", EPOCH, never))
    await asyncio.sleep(0)
    second = start(asyncio.to_thread(flights.run_in_thread, "k", EPOCH, lambda: "mine", wait_max_s=0.2))
    assert await asyncio.to_thread(is_waiting.wait, 60)
    first.cancel()
    await asyncio.wait([first])
    assert not cancelled.is_set()
    has_waited.set()
    with pytest.raises(LoadTimeout):
        await second
    await asyncio.wait_for(cancelled.wait(), 60)
    await flights.settled()
