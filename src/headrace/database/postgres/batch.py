"""Calls that come while others are under way travel together: one trip for many, each told its own outcome.

What is asked for in one turn of the event loop leaves at the end of it. While `in_flight_max` batches are under way
the next one gathers, so a batch is as large as the load makes it and a lonely call waits for nobody.
"""

import asyncio
import copy
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from typing import Generic, TypeVar

from headrace.errors import BugError, HeadraceError, NotOpen, Overloaded

T = TypeVar("T")
R = TypeVar("R")


class Batch(Generic[T, R]):
    """A gatherer of calls that `run` answers together.

    `run` is given the items in the order of their calls and returns for each its answer, or the error that it alone
    met. An error that `run` raises is everybody's. An item whose caller left before its batch did is left out; of a
    batch under way a caller that leaves takes nothing with it, and only when the last one has left, and with
    `may_abandon`, is `run` cancelled.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T]], Awaitable[Sequence[R | HeadraceError]]],
        *,
        name: str,
        items_max: int,
        in_flight_max: int,
        waiting_max: int,
        may_abandon: bool = False,
    ) -> None:
        self._run = run
        self._name = name
        self._items_max = items_max
        self._in_flight_max = in_flight_max
        self._waiting_max = waiting_max
        self._may_abandon = may_abandon
        self._waiting: deque[tuple[T, asyncio.Future[R]]] = deque()
        self._under_way: dict[asyncio.Task[None], list[tuple[T, asyncio.Future[R]]]] = {}
        self._is_flush_due = False
        self._closed = False

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is under way."""
        return not self._waiting and not self._under_way

    @property
    def waiting(self) -> int:
        """Calls that are in no batch yet."""
        return len(self._waiting)

    async def submit(self, item: T) -> R:
        """The answer to this item, or the error that the batch or the item met."""
        if self._closed:
            raise NotOpen(f"{self._name} is closed.")
        if len(self._waiting) >= self._waiting_max:
            raise Overloaded(f"{self._name}: {self._waiting_max} calls wait already.")
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[R] = loop.create_future()
        self._waiting.append((item, answer))
        if not self._is_flush_due and len(self._under_way) < self._in_flight_max:
            self._is_flush_due = True
            # In a context of its own: what the first caller's request carries is not that of the others.
            loop.call_soon(self._flush, context=Context())
        try:
            return await answer
        except asyncio.CancelledError:
            if self._may_abandon:
                self._abandon()
            raise

    async def close(self, *, timeout_s: float | None = None) -> set[asyncio.Task[None]]:
        """Refuse more calls and answer those that wait; the tasks that still run after `timeout_s`."""
        self._closed = True
        if self._waiting and not self._under_way:
            self._flush()
        # A task that ends starts the next one where calls still wait.
        while self._under_way:
            ended, running = await asyncio.wait(self._under_way, timeout=timeout_s)
            if not ended:
                return running
        return set()

    def _flush(self) -> None:
        self._is_flush_due = False
        wanted = -(-len(self._waiting) // self._items_max)
        loop = asyncio.get_running_loop()
        for _ in range(min(wanted, self._in_flight_max - len(self._under_way))):
            task = loop.create_task(self._drain(), name=self._name)
            self._under_way[task] = []
            task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        for _, answer in self._under_way.pop(task):
            answer.cancel()
        if not task.cancelled() and (error := task.exception()):
            message = f"{self._name} failed in a way that it does not know"
            asyncio.get_running_loop().call_exception_handler({"message": message, "exception": error, "task": task})
        if self._waiting and not self._is_flush_due:
            self._flush()

    async def _drain(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while batch := self._take():
            self._under_way[task] = batch
            await self._answer(batch)
            self._under_way[task] = []

    def _take(self) -> list[tuple[T, asyncio.Future[R]]]:
        batch: list[tuple[T, asyncio.Future[R]]] = []
        while self._waiting and len(batch) < self._items_max:
            call = self._waiting.popleft()
            if not call[1].done():
                batch.append(call)
        return batch

    async def _answer(self, batch: list[tuple[T, asyncio.Future[R]]]) -> None:
        outcomes: Sequence[R | HeadraceError]
        try:
            outcomes = await self._run([item for item, _ in batch])
        except HeadraceError as error:
            outcomes = [_copy(error) for _ in batch]
        except Exception as error:
            # A fault of ours: its own callers are told, and the next batch goes all the same.
            bug = BugError(f"{self._name}: {type(error).__name__}: {error}.")
            _settle(batch, [_copy(bug) for _ in batch])
            raise
        _settle(batch, outcomes)

    def _abandon(self) -> None:
        for task, batch in self._under_way.items():
            if batch and all(answer.done() for _, answer in batch):
                task.cancel()


def _settle(batch: Sequence[tuple[T, asyncio.Future[R]]], outcomes: Sequence[R | HeadraceError]) -> None:
    for (_, answer), outcome in zip(batch, outcomes, strict=True):
        if answer.done():
            continue
        if isinstance(outcome, HeadraceError):
            answer.set_exception(outcome)
        else:
            answer.set_result(outcome)


def _copy(error: HeadraceError) -> HeadraceError:
    """Each caller's own: an error that is raised collects the frames that it passes through."""
    mine = copy.copy(error)
    mine.__cause__ = error.__cause__
    return mine
