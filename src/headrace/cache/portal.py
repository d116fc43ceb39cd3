"""One event loop in a thread of its own, for callers that have none.

There is one a process. It starts with its first holder and ends with the last: every open cache holds it, and so does
every call under way, so that no call is left waiting on a loop that nobody runs. Nothing of it survives a fork: the
child has the parent's objects but not the thread that ran them. It puts them aside, never to be touched (an epoll set
is shared with the parent, and closing the loop would take sockets out of it), and begins anew.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

from headrace.errors import CacheUnavailable, CallerError

T = TypeVar("T")
P = ParamSpec("P")
THREADS_MAX = 4


class Portal:
    """The way from threads to the loop. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._left_behind: list[object] = []
        self._begin()

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def after_fork(self) -> None:
        """Begin anew in a child process."""
        self._left_behind.append((self._loop, self._thread))
        self._begin()

    def hold(self) -> asyncio.AbstractEventLoop:
        """The loop, which runs until as many `release`s as `hold`s were called."""
        with self._lock:
            if self._loop is None:
                self._loop, self._thread = _start()
            self._holders += 1
            return self._loop

    def release(self, loop: asyncio.AbstractEventLoop, *, wait: bool = False) -> None:
        """Let go; the last one ends the thread, and with `wait` returns when it has ended."""
        with self._lock:
            if loop is not self._loop:
                return  # held before a fork
            self._holders -= 1
            if self._holders:
                return
            thread, self._loop, self._thread = self._thread, None, None
        loop.call_soon_threadsafe(loop.stop)
        if wait and thread is not None:
            thread.join()

    def refuse_own_thread(self) -> None:
        """Raise where waiting for the loop would be waiting for oneself."""
        thread = self._thread
        if thread is not None and thread.ident == threading.get_ident():
            raise CallerError(
                "A SyncCache was called from its own event loop thread and would wait for itself for ever.",
                fix="Do not call it in an observer or in `change`; use the async Cache inside coroutines.",
            )

    def run(self, work: Coroutine[Any, Any, T], *, wait_max_s: float) -> T:
        """The outcome of `work`, which the loop runs while this thread waits.

        When the wait ends early, by an interrupt or because it took too long (CacheUnavailable), the work is
        cancelled.
        """
        loop = self.hold()
        try:
            outcome = asyncio.run_coroutine_threadsafe(work, loop)
            try:
                return outcome.result(wait_max_s)
            except TimeoutError as error:
                if outcome.done():
                    raise
                raise CacheUnavailable(
                    f"The call took longer than wait_max={wait_max_s:g} s and was cancelled.",
                    fix="Raise `wait_max`, or do less in one call.",
                ) from error
            finally:
                outcome.cancel()
        finally:
            self.release(loop)


def at_once(work: Coroutine[Any, Any, T]) -> T:
    """The outcome of a coroutine that has nothing to wait for, without a loop."""
    try:
        work.send(None)
    except StopIteration as done:
        outcome: T = done.value
        return outcome
    work.close()
    raise AssertionError(f"{work!r} waited although there is nothing to wait for.")


class _LateThreads(ThreadPoolExecutor):
    """Threads for what blocks; once the interpreter is ending and starts no more of them, the caller's own.

    Caches that nobody closed are closed at exit, when their last writes may still have to go to disk.
    """

    def submit(self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> "Future[T]":
        try:
            return super().submit(function, *args, **kwargs)
        except RuntimeError:
            outcome: Future[T] = Future()
            try:
                outcome.set_result(function(*args, **kwargs))
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to whoever asked
                outcome.set_exception(error)
            return outcome


def _start() -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    loop = asyncio.new_event_loop()
    executor = _LateThreads(THREADS_MAX, thread_name_prefix="headrace-cache")
    loop.set_default_executor(executor)
    running = threading.Event()
    loop.call_soon(running.set)
    thread = threading.Thread(target=_run, args=(loop, executor), name="headrace-cache", daemon=True)
    thread.start()
    running.wait()
    return loop, thread


def _run(loop: asyncio.AbstractEventLoop, executor: Executor) -> None:
    try:
        loop.run_forever()
        loop.run_until_complete(_end_calls())
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        executor.shutdown()
        loop.close()


async def _end_calls() -> None:
    """Those whose caller did not wait for their end."""
    calls = asyncio.all_tasks() - {asyncio.current_task()}
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


PORTAL = Portal()
"""The one of this process."""
