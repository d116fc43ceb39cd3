"""So many in a turn of the loop, in order."""

import asyncio

from headrace.agents.running.turnstile import Turnstile


async def test_whoever_comes_alone_is_not_delayed():
    """Up to its width, nobody waits for a turn."""
    turnstile, passed = Turnstile(3), []

    async def visitor(number):
        await turnstile.go_through()
        passed.append(number)

    for number in range(3):
        coroutine = visitor(number)
        try:
            coroutine.send(None)
        except StopIteration:
            continue

    assert passed == [0, 1, 2]


async def test_a_loop_that_never_waits_lets_others_go_on():
    """Even one task that goes through again and again leaves room for a turn."""
    turnstile, turns = Turnstile(10), 0

    async def count():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    for _ in range(1_000):
        await turnstile.go_through()
    counting.cancel()

    assert turns >= 90


async def test_a_crowd_goes_through_in_its_order_a_few_in_a_turn():
    """None is lost, and none of those who left is let through in another's place."""
    turnstile, passed, widths = Turnstile(4), [], []

    async def visitor(number):
        await turnstile.go_through()
        passed.append(number)

    visitors = [asyncio.create_task(visitor(number)) for number in range(50)]
    await asyncio.sleep(0)
    visitors[20].cancel()
    while len(passed) < 49:
        before = len(passed)
        await asyncio.sleep(0)
        widths.append(len(passed) - before)

    assert passed == [number for number in range(50) if number != 20]
    assert max(widths) <= 4
