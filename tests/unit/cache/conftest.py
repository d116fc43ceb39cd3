"""A clock that stands still until it is told to move, and an observer that remembers."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from headrace.cache import Cache
from headrace.events import Event
from tests.loaders import Source


class StoppedClock:
    """Both times move by hand; sleeping gives way once and moves nothing."""

    def __init__(self) -> None:
        self.elapsed = 0.0

    def monotonic(self) -> float:
        return 1000.0 + self.elapsed

    def wall(self) -> float:
        return 1_700_000_000.0 + self.elapsed

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(0)

    def advance(self, seconds: float) -> None:
        self.elapsed += seconds


class Witness:
    """Keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on(self, event: Event) -> None:
        self.events.append(event)

    def seen(self, kind: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kind)]


@pytest.fixture
def clock() -> StoppedClock:
    return StoppedClock()


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
async def cache(clock) -> AsyncIterator[Cache]:
    async with Cache(clock=clock) as cache:
        yield cache
