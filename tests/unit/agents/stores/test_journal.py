"""Grouped writes: one commit for many, each acknowledged by its own."""

import asyncio

import pytest

from headrace.agents.stores.journal import Journal
from headrace.errors import DatabaseUnavailable, NotOpen, OutcomeUnknown, StatementFailed
from headrace.testing import FakeClock


class Shard:
    """A database that commits what it is given, refuses what it is told to, and can be away."""

    def __init__(self):
        self.batches: list[list[str]] = []
        self.errors: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def write(self, items):
        await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        if "bad" in items:
            raise StatementFailed("no")
        self.batches.append(list(items))


async def turn():
    """Let every task that is ready run until it waits."""
    for _ in range(10):
        await asyncio.sleep(0)


def journal_of(shard, clock=None, batch_max=100, **more):
    return Journal(shard.write, batch_max=batch_max, retry_s=5.0, clock=clock or FakeClock(), **more)


async def test_what_gathers_during_a_commit_is_the_next_batch():
    """The first write goes alone, those that come meanwhile go together, in order."""
    shard = Shard()
    journal = journal_of(shard)
    shard.gate.clear()
    tasks = [asyncio.create_task(journal.append("first"))]
    await turn()
    tasks += [asyncio.create_task(journal.append(str(n))) for n in range(5)]
    await turn()
    shard.gate.set()
    await asyncio.gather(*tasks)
    assert shard.batches == [["first"], ["0", "1", "2", "3", "4"]]


async def test_nobody_is_acknowledged_before_the_commit():
    """append returns only once its batch is written."""
    shard = Shard()
    journal = journal_of(shard)
    shard.gate.clear()
    task = asyncio.create_task(journal.append("x"))
    await turn()
    assert not task.done()
    shard.gate.set()
    await task
    assert shard.batches == [["x"]]


async def test_a_batch_is_bounded():
    """More than batch_max waits for the next commit."""
    shard = Shard()
    journal = journal_of(shard, batch_max=2)
    await asyncio.gather(*(journal.append(str(n)) for n in range(5)))
    assert [len(batch) for batch in shard.batches] == [2, 2, 1]


async def test_a_batch_is_bounded_by_its_weight():
    """Large items go in more batches; one that is above the bound by itself goes alone."""
    shard = Shard()
    journal = journal_of(shard, weight_of=len, weight_max=5)
    await asyncio.gather(*(journal.append(item) for item in ("aa", "bb", "ccc", "d", "eeeeeeee", "f")))
    assert shard.batches == [["aa", "bb"], ["ccc", "d"], ["eeeeeeee"], ["f"]]


async def test_nobody_waits_longer_than_the_patience_behind_others():
    """A shard that stays away is given up once for all that gathered, not once for every batch."""
    shard, clock = Shard(), FakeClock()
    shard.errors = [DatabaseUnavailable("away")] * 1000
    journal = journal_of(shard, clock, batch_max=1)
    waiting = [asyncio.create_task(journal.append(str(n))) for n in range(10)]
    await clock.run_for(6.0)
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [DatabaseUnavailable] * 10


async def test_a_refused_item_fails_its_own_caller_alone():
    """The others of its batch are written."""
    shard = Shard()
    journal = journal_of(shard)
    results = await asyncio.gather(*(journal.append(item) for item in ("a", "bad", "b")), return_exceptions=True)
    assert [type(result) for result in results] == [type(None), StatementFailed, type(None)]
    assert shard.batches == [["a"], ["b"]]


@pytest.mark.parametrize("error", [DatabaseUnavailable("away"), OutcomeUnknown("broke")])
async def test_a_short_absence_is_waited_out(error):
    """Writes are repeated until the shard is back, because they are safe to repeat."""
    shard, clock = Shard(), FakeClock()
    shard.errors = [error, error]
    task = asyncio.create_task(journal_of(shard, clock).append("x"))
    await clock.run_for(1.0)
    await task
    assert shard.batches == [["x"]]


async def test_a_long_absence_is_told():
    """After retry_s the callers get the error, and the journal goes on with the next."""
    shard, clock = Shard(), FakeClock()
    shard.errors = [DatabaseUnavailable("away")] * 100
    journal = journal_of(shard, clock)
    task = asyncio.create_task(journal.append("x"))
    await clock.run_for(6.0)
    with pytest.raises(DatabaseUnavailable):
        await task
    shard.errors = []
    await journal.append("y")
    assert shard.batches == [["y"]]


async def test_a_cancelled_caller_does_not_take_its_item_along():
    """Whoever stops waiting stops waiting; the item is written all the same."""
    shard = Shard()
    journal = journal_of(shard)
    shard.gate.clear()
    task = asyncio.create_task(journal.append("x"))
    await turn()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    shard.gate.set()
    await journal.close()
    assert shard.batches == [["x"]]


async def test_a_closed_journal_has_written_everything_and_takes_no_more():
    """close drains first."""
    shard = Shard()
    journal = journal_of(shard)
    task = asyncio.create_task(journal.append("x"))
    await asyncio.sleep(0)
    await journal.close()
    await task
    assert shard.batches == [["x"]]
    with pytest.raises(NotOpen):
        await journal.append("y")
