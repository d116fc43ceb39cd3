"""Threads for foreign code that blocks: bounded, never queued, and no reason for the process to stay.

The standard library's executor waits for its threads when the interpreter ends; one agent that never returns would
keep a stopped service alive. These threads are daemons. And they keep no queue: a call that finds no free thread is
refused by whoever asked first for room, instead of starting long after its caller was told that it is over.
"""

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

_Call = tuple[asyncio.AbstractEventLoop, "asyncio.Future[Any]", Callable[[], Any]]


class DaemonThreads:
    """Up to `threads_max` calls at once, each in a thread that is used again afterwards."""

    def __init__(self, threads_max: int, *, name: str) -> None:
        self._threads_max = threads_max
        self._name = name
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._threads = 0
        self.busy = 0
        """Places taken: calls that run, and places that were reserved for calls to come."""

    def reserve(self) -> bool:
        """Take a place for one call to `run`, or for `release`; False when all are taken."""
        if self.busy >= self._threads_max:
            return False
        self.busy += 1
        return True

    @property
    def free(self) -> int:
        """Places that are not taken."""
        return self._threads_max - self.busy

    def release(self) -> None:
        """Give back a place that was reserved and not used."""
        self.busy -= 1

    def run(self, function: Callable[[], Any]) -> "asyncio.Future[Any]":
        """Call the function in a thread, in a place that was reserved; the future has what it returned or raised.

        Cancelling the future does not stop the thread; its place stays taken until the function returns.
        """
        loop = asyncio.get_running_loop()
        done = loop.create_future()
        # A thread for each place in use: with as many threads as places, a call never waits behind another.
        if self._threads < self.busy:
            self._threads += 1
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
        self._calls.put((loop, done, function))
        return done

    def close(self) -> None:
        """Let the threads end when they are done; nobody waits for them."""
        for _ in range(self._threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            loop, done, function = call
            result, error = None, None
            try:
                result = function()
            except BaseException as raised:  # noqa: BLE001 - foreign code; it goes to whoever awaits
                error = raised
            try:
                loop.call_soon_threadsafe(self._settle, done, result, error)
            except RuntimeError:
                return  # the loop is closed: the process ends, and nobody waits any more

    def _settle(self, done: "asyncio.Future[Any]", result: Any, error: BaseException | None) -> None:
        self.busy -= 1
        if done.done():
            return
        if error is None:
            done.set_result(result)
        elif isinstance(error, StopIteration):
            # A future refuses it, because a coroutine that raised it would look finished.
            done.set_exception(RuntimeError(f"StopIteration: {error}"))
        else:
            done.set_exception(error)
