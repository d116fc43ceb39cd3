"""Calls that travel together, and what each of them is told."""

import asyncio
import contextvars

import pytest

from headrace.database.postgres.batch import Batch
from headrace.errors import BugError, DatabaseUnavailable, NotOpen, Overloaded, StatementFailed


class Trip:
    """Answers with the items themselves, when the gate is open; fails as it is told to."""

    def __init__(self):
        self.batches: list[list[int]] = []
        self.error: Exception | None = None
        self.refused: dict[int, StatementFailed] = {}
        self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, items):
        self.batches.append(list(items))
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return [self.refused.get(item, item) for item in items]


def batch_of(trip, **options):
    return Batch(trip.run, **{"name": "A trip", "items_max": 10, "in_flight_max": 1, "waiting_max": 100, **options})


async def turns(number=10):
    """Let every task that is ready run until it waits."""
    for _ in range(number):
        await asyncio.sleep(0)


async def test_calls_of_one_turn_travel_together():
    """Nothing has to be under way for them to share a trip."""
    trip = Trip()
    batch = batch_of(trip)

    answers = await asyncio.gather(*(batch.submit(number) for number in range(5)))

    assert answers == [0, 1, 2, 3, 4]
    assert trip.batches == [[0, 1, 2, 3, 4]]


async def test_a_lonely_call_leaves_at_the_end_of_its_turn():
    """It waits for no timer and for nobody."""
    trip = Trip()
    batch = batch_of(trip)
    task = asyncio.ensure_future(batch.submit(1))

    await turns(3)

    assert trip.batches == [[1]]
    assert await task == 1


async def test_the_next_batch_gathers_while_one_is_under_way():
    """So a batch is as large as the load makes it, up to its limit, in the order of the calls."""
    trip = Trip()
    trip.gate.clear()
    batch = batch_of(trip, items_max=3)
    tasks = [asyncio.ensure_future(batch.submit(0))]
    await turns()
    tasks += [asyncio.ensure_future(batch.submit(number)) for number in range(1, 6)]
    await turns()
    assert trip.batches == [[0]]

    trip.gate.set()
    await asyncio.gather(*tasks)

    assert trip.batches == [[0], [1, 2, 3], [4, 5]]


async def test_as_many_batches_as_allowed_are_under_way():
    """Further calls wait for one of them to end."""
    trip = Trip()
    trip.gate.clear()
    batch = batch_of(trip, items_max=1, in_flight_max=2)
    tasks = [asyncio.ensure_future(batch.submit(number)) for number in range(3)]

    await turns()
    assert trip.batches == [[0], [1]]
    assert batch.waiting == 1

    trip.gate.set()
    assert await asyncio.gather(*tasks) == [0, 1, 2]


async def test_an_error_of_the_batch_reaches_everyone_as_their_own():
    """Each gets an error of its own: one that is raised twice would collect the frames of both."""
    trip = Trip()
    trip.error = DatabaseUnavailable("gone")
    batch = batch_of(trip)

    outcomes = await asyncio.gather(*(batch.submit(number) for number in range(3)), return_exceptions=True)

    assert [(type(error), error.message) for error in outcomes] == [(DatabaseUnavailable, "gone")] * 3
    assert len({id(error) for error in outcomes}) == 3


async def test_an_error_of_one_item_fails_its_caller_alone():
    """The others get their answers."""
    trip = Trip()
    trip.refused = {1: StatementFailed("no", sqlstate="23505", constraint="only_one")}
    batch = batch_of(trip)

    outcomes = await asyncio.gather(*(batch.submit(number) for number in range(3)), return_exceptions=True)

    assert outcomes[0::2] == [0, 2]
    assert outcomes[1].constraint == "only_one"


async def test_a_fault_of_the_trip_is_told_and_the_next_batch_goes():
    """Its callers get a BugError that names it, the loop is told, and nobody waits for ever."""
    trip = Trip()
    trip.error = ZeroDivisionError("oops")
    batch = batch_of(trip)
    told = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context["exception"]))

    with pytest.raises(BugError, match="ZeroDivisionError: oops"):
        await batch.submit(1)
    await turns()
    trip.error = None

    assert await batch.submit(2) == 2
    assert told == [told[0]]
    assert isinstance(told[0], ZeroDivisionError)


async def test_a_caller_that_leaves_takes_nobody_with_it():
    """The others of the batch under way are answered."""
    trip = Trip()
    trip.gate.clear()
    batch = batch_of(trip, may_abandon=True)
    leaving, staying = (asyncio.ensure_future(batch.submit(number)) for number in range(2))
    await turns()

    leaving.cancel()
    await turns()
    trip.gate.set()

    assert await staying == 1
    assert trip.cancelled == 0


async def test_a_caller_that_leaves_early_is_not_sent():
    """What has not left yet, and nobody waits for, is left out."""
    trip = Trip()
    trip.gate.clear()
    batch = batch_of(trip)
    first, second, third = (asyncio.ensure_future(batch.submit(number)) for number in range(3))
    first_batch = batch_of(trip)
    await turns()
    later = asyncio.ensure_future(batch.submit(3))
    last = asyncio.ensure_future(batch.submit(4))
    await turns()

    later.cancel()
    await turns()
    trip.gate.set()
    await asyncio.gather(first, second, third, last)

    assert trip.batches == [[0, 1, 2], [4]]
    assert first_batch.is_idle


@pytest.mark.parametrize(("may_abandon", "cancelled"), [(True, 1), (False, 0)])
async def test_a_trip_that_nobody_waits_for_is_cancelled_if_it_may_be(may_abandon, cancelled):
    """A read is; a write that was sent goes on. The next call is answered in both cases."""
    trip = Trip()
    trip.gate.clear()
    batch = batch_of(trip, may_abandon=may_abandon)
    tasks = [asyncio.ensure_future(batch.submit(number)) for number in range(2)]
    await turns()

    for task in tasks:
        task.cancel()
    await turns()
    trip.gate.set()

    assert await batch.submit(2) == 2
    assert trip.cancelled == cancelled


async def test_more_than_the_limit_is_refused_at_once():
    """A call beyond `waiting_max` does not wait."""
    trip = Trip()
    trip.gate.clear()
    batch = batch_of(trip, waiting_max=2)
    tasks = [asyncio.ensure_future(batch.submit(0))]
    await turns()
    tasks += [asyncio.ensure_future(batch.submit(number)) for number in (1, 2)]
    await turns()

    with pytest.raises(Overloaded, match="2 calls wait already"):
        await batch.submit(3)
    trip.gate.set()
    await asyncio.gather(*tasks)


async def test_closing_answers_those_who_wait_and_refuses_others():
    """Nothing is lost on the way out."""
    trip = Trip()
    batch = batch_of(trip, items_max=1)
    tasks = [asyncio.ensure_future(batch.submit(number)) for number in range(3)]
    await asyncio.sleep(0)

    assert await batch.close() == set()

    assert await asyncio.gather(*tasks) == [0, 1, 2]
    with pytest.raises(NotOpen):
        await batch.submit(4)


async def test_closing_says_what_still_runs():
    """Whoever closes decides what becomes of it."""
    trip = Trip()
    trip.gate.clear()
    batch = batch_of(trip)
    task = asyncio.ensure_future(batch.submit(1))
    await turns()

    running = await batch.close(timeout_s=0.01)

    assert len(running) == 1
    trip.gate.set()
    assert await task == 1
    await asyncio.wait(running)


async def test_a_batch_does_not_inherit_what_its_first_caller_carries():
    """A request's context belongs to the request; the batch is everybody's."""
    carried = contextvars.ContextVar("carried", default="nothing")
    seen = []

    async def run(items):
        seen.append(carried.get())
        return items

    batch = Batch(run, name="A trip", items_max=10, in_flight_max=1, waiting_max=10)
    carried.set("a request")

    await batch.submit(1)

    assert seen == ["nothing"]
