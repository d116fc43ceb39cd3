"""How long a request may take."""

import asyncio

import pytest

from headrace.server.patience import Patience


async def waits(patience, began=None):
    """A request that would take for ever."""
    with patience.turn():
        if began is not None:
            began.set()
        await asyncio.Event().wait()


async def test_a_request_that_takes_too_long_is_ended():
    """With a TimeoutError, and nothing waits any more."""
    patience = Patience(0.01)
    with pytest.raises(TimeoutError):
        await waits(patience)
    assert not patience.waiting


async def test_each_request_has_its_own_time():
    """One timer rings for the oldest first; who is done in time hears nothing."""
    patience, ended = Patience(0.05), []

    async def request(name):
        with pytest.raises(TimeoutError):
            await waits(patience)
        ended.append(name)

    first = asyncio.create_task(request("first"))
    with patience.turn():
        pass
    while not patience.waiting:
        await asyncio.sleep(0)
    await asyncio.gather(first, request("last"))
    assert ended == ["first", "last"]
    assert not patience.waiting


async def test_who_is_cancelled_from_outside_is_cancelled():
    """It is no timeout, not even when both come at once."""
    patience, began = Patience(60.0), asyncio.Event()
    request = asyncio.create_task(waits(patience, began))
    await began.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert not patience.waiting
    began.clear()
    both = asyncio.create_task(waits(patience, began))
    await began.wait()
    (turn,) = patience.waiting
    both.cancel()
    del patience.waiting[turn]
    turn.end()
    with pytest.raises(asyncio.CancelledError):
        await both


async def test_an_error_of_the_request_goes_before_its_timeout():
    """What it raises while it is being ended is what it raises."""

    async def cleans_up_badly():
        with patience.turn():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError from None

    patience = Patience(0.01)
    with pytest.raises(ValueError):  # noqa: PT011 - it has no message
        await cleans_up_badly()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
