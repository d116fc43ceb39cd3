"""Loaders that count, and small steps with the event loop, for the tests of the cache."""

import asyncio
from collections.abc import Callable


class Source:
    """A loader that counts its runs and returns what it was told last."""

    def __init__(self, value: object = "value") -> None:
        self.value = value
        self.runs = 0
        self.error: Exception | None = None

    async def __call__(self) -> object:
        self.runs += 1
        await asyncio.sleep(0)
        if self.error is not None:
            raise self.error
        return self.value


def start(work) -> asyncio.Task:
    return asyncio.get_running_loop().create_task(work)


async def until(condition: Callable[[], bool]) -> None:
    """Give way to the loop until the condition holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never came true")
