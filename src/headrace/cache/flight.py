"""One load a key at a time: whoever asks for a key that is being loaded waits for that load.

The load runs in a task of its own, which the table owns; callers wait beside it. So a caller that is cancelled takes
nothing with it but itself, and only when the last one has left is the load cancelled too. A flight that nobody waits
for any more leaves the table at once: a late caller starts afresh instead of joining what is being torn down. (Compare
HybridCache's caller count, and what happens to the waiters of caches that await the load in the first caller's own
task.)

A flight belongs to the epoch of its key: after an invalidation the old flight still answers those who waited before,
but new callers start another one, because a value that was read before the invalidation may not answer a question
asked after it.

Waiters may live in other threads and event loops than the load. Wait-for edges between flights are followed on each
join, so that loads that would wait for each other for ever raise RecursiveLoad instead.

A plain loader cannot be cancelled, so whoever waits for one, and every thread that waits, does it in bounds. The first
who has waited too long also takes the flight off the table: a loader that never returns costs its own thread and the
patience of those who had joined it, while the next caller loads for itself.
"""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any

from headrace.cache.fence import Epoch
from headrace.errors import LoadTimeout, NotOpen, RecursiveLoad

Work = Callable[[], Coroutine[Any, Any, Any]]
Settle = Callable[[], None]

WAIT_MAX_S = 60.0
"""How long one call waits for the plain loader of another, where the key's policy has no `load_timeout`."""

_CURRENT: contextvars.ContextVar["Flight | None"] = contextvars.ContextVar("headrace_flight", default=None)


class Flight:
    """One load under way. Its fields are guarded by the lock of its table."""

    __slots__ = (
        "blocked_on",
        "cancelled",
        "epoch",
        "error",
        "finished",
        "in_thread",
        "key",
        "pinned",
        "task",
        "traceback",
        "value",
        "waiters",
    )

    def __init__(self, key: str, epoch: Epoch, *, pinned: bool, in_thread: bool = False) -> None:
        self.key = key
        self.epoch = epoch
        self.pinned = pinned
        """It goes on when its last waiter leaves."""
        self.in_thread = in_thread
        """It has no task, and nothing can end it."""
        self.task: asyncio.Task[Any] | None = None
        self.waiters: dict[object, Settle] = {}
        self.blocked_on: list[Flight] = []
        self.finished = False
        self.cancelled = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.traceback: TracebackType | None = None

    def reaches(self, target: "Flight") -> list[str] | None:
        """The keys on a way from this flight to `target` along what waits for what, if there is one."""
        seen: set[int] = set()
        stack: list[tuple[Flight, list[str]]] = [(self, [self.key])]
        while stack:
            flight, path = stack.pop()
            if flight is target:
                return path
            if id(flight) not in seen and not flight.finished:
                seen.add(id(flight))
                stack.extend((other, [*path, other.key]) for other in flight.blocked_on)
        return None


class Flights:
    """The table of loads under way in one cache."""

    def __init__(self, *, refreshes_max: int = 256) -> None:
        self._lock = threading.Lock()
        self._table: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refreshes = 0
        self._refreshes_max = refreshes_max
        self._closed = False

    def __len__(self) -> int:
        return len(self._table)

    async def run(self, key: str, epoch: Epoch, work: Work, *, wait_max_s: float = WAIT_MAX_S) -> tuple[Any, bool]:
        """The outcome of the load of `key`, and whether this call joined one under way instead of starting `work`.

        Raises what the load raised, to every waiter; RecursiveLoad when waiting could never end; LoadTimeout after
        `wait_max_s` of waiting for a load that runs in a thread and cannot be cancelled there.
        """
        loop = asyncio.get_running_loop()
        while True:
            done: asyncio.Future[None] = loop.create_future()
            flight, joined = self._join_or_start(key, epoch, done, _waker(done, loop))
            if not joined:
                self._launch(flight, work, loop)
            limit = asyncio.timeout(wait_max_s if joined and flight.in_thread else None)
            try:
                async with limit:
                    await done
            except TimeoutError as error:
                self._leave(flight, done)
                self._strike(flight)
                raise _overdue(key, wait_max_s) from error
            except asyncio.CancelledError:
                self._leave(flight, done)
                raise
            finally:
                self._unblock(flight)
            if not flight.cancelled or self._closed:
                return _outcome(flight), joined
            if flight.task is not None and flight.task.get_loop() is loop:
                raise asyncio.CancelledError
            # The load died with another loop or thread; that says nothing about this caller's own chances.

    def start(self, key: str, epoch: Epoch, work: Work) -> bool:
        """Load `key` behind the caller unless a load is under way or too many such refreshes are; True if started."""
        with self._lock:
            current = self._table.get(key)
            if (
                self._closed
                or self._refreshes >= self._refreshes_max
                or (current is not None and current.epoch == epoch)
            ):
                return False
            flight = Flight(key, epoch, pinned=True)
            self._table[key] = flight
            self._refreshes += 1
        self._launch(flight, work, asyncio.get_running_loop())
        return True

    def run_in_thread(
        self, key: str, epoch: Epoch, work: Callable[[], Any], *, wait_max_s: float = WAIT_MAX_S
    ) -> tuple[Any, bool]:
        """As `run` for a caller that blocks: `work` runs in this very thread, or another's outcome is waited for.

        LoadTimeout after `wait_max_s` of waiting, wherever the load runs.
        """
        while True:
            landed = threading.Event()
            flight, joined = self._join_or_start(key, epoch, landed, landed.set, in_thread=True)
            try:
                if not joined:
                    return self._run_here(flight, work), False
                has_landed = landed.wait(wait_max_s)
            finally:
                # An interrupt too must not leave a waiter behind.
                if joined:
                    self._leave(flight, landed)
                self._unblock(flight)
            if not has_landed:
                self._strike(flight)
                raise _overdue(key, wait_max_s)
            if not flight.cancelled or self._closed:
                return _outcome(flight), True

    async def close(self) -> None:
        """Cancel every load and wait until each has ended; their waiters get NotOpen."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            _cancel(task)
        here = asyncio.get_running_loop()
        await asyncio.gather(*(task for task in tasks if task.get_loop() is here), return_exceptions=True)

    async def settled(self) -> None:
        """Return when no load of this loop is under way any more."""
        here = asyncio.get_running_loop()
        while tasks := [
            task for task in self._tasks if task.get_loop() is here and task is not asyncio.current_task()
        ]:
            await asyncio.wait(tasks)

    def _join_or_start(
        self, key: str, epoch: Epoch, token: object, settle: Settle, *, in_thread: bool = False
    ) -> tuple[Flight, bool]:
        me = _CURRENT.get()
        if me is not None and me.finished:
            me = None
        with self._lock:
            if self._closed:
                raise NotOpen(f"The cache was closed; {key!r} is not loaded.")
            flight = self._table.get(key)
            if flight is None or flight.epoch != epoch:
                flight = Flight(key, epoch, pinned=in_thread, in_thread=in_thread)
                flight.waiters[token] = settle
                self._table[key] = flight
                if me is not None:
                    me.blocked_on.append(flight)
                return flight, False
            if me is not None:
                _refuse_cycle(me, flight)
                me.blocked_on.append(flight)
            flight.waiters[token] = settle
            return flight, True

    def _launch(self, flight: Flight, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        context = contextvars.copy_context()
        context.run(_CURRENT.set, flight)
        task = loop.create_task(_start(work), context=context)
        flight.task = task
        self._tasks.add(task)
        task.add_done_callback(lambda task: self._land_task(flight, task))

    def _land_task(self, flight: Flight, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if flight.pinned:
            with self._lock:
                self._refreshes -= 1
        if task.cancelled():
            self._land(flight, cancelled=True)
        elif (error := task.exception()) is not None:
            self._land(flight, error=error)
        else:
            self._land(flight, value=task.result())

    def _run_here(self, flight: Flight, work: Callable[[], Any]) -> Any:
        context = contextvars.copy_context()
        context.run(_CURRENT.set, flight)
        try:
            value = context.run(work)
        except BaseException as error:  # whatever it is, the others must not wait for ever; it is raised again
            # An interrupt of this thread is not the outcome of the load: the others try again.
            self._land(flight, error=error, cancelled=not isinstance(error, Exception))
            raise
        self._land(flight, value=value)
        return value

    def _land(
        self, flight: Flight, *, value: Any = None, error: BaseException | None = None, cancelled: bool = False
    ) -> None:
        with self._lock:
            flight.value, flight.error, flight.cancelled = value, error, cancelled
            flight.traceback = error.__traceback__ if error is not None else None
            flight.finished = True
            if self._table.get(flight.key) is flight:
                del self._table[flight.key]
            waiters = list(flight.waiters.values())
            flight.waiters.clear()
            flight.blocked_on.clear()
        for settle in waiters:
            settle()

    def _unblock(self, flight: Flight) -> None:
        me = _CURRENT.get()
        if me is not None:
            with self._lock:
                if flight in me.blocked_on:
                    me.blocked_on.remove(flight)

    def _strike(self, flight: Flight) -> None:
        """Let nobody else join a load that may never end."""
        with self._lock:
            if self._table.get(flight.key) is flight:
                del self._table[flight.key]

    def _leave(self, flight: Flight, token: object) -> None:
        with self._lock:
            flight.waiters.pop(token, None)
            if flight.finished or flight.waiters or flight.pinned:
                return
            if self._table.get(flight.key) is flight:
                del self._table[flight.key]
        if flight.task is not None:
            _cancel(flight.task)


def _overdue(key: str, waited_s: float) -> LoadTimeout:
    return LoadTimeout(f"{key!r} is being loaded by another thread, and was waited for longer than {waited_s:g} s.")


async def _start(work: Work) -> Any:
    return await work()


def _cancel(task: asyncio.Task[Any]) -> None:
    try:
        task.get_loop().call_soon_threadsafe(task.cancel)
    except RuntimeError:
        return  # its loop is closed, and the task with it


def _refuse_cycle(me: Flight, flight: Flight) -> None:
    path = flight.reaches(me)
    if path is not None:
        raise RecursiveLoad(f"Loaders wait for each other: {' -> '.join([me.key, *path])}.")


def _waker(done: "asyncio.Future[None]", loop: asyncio.AbstractEventLoop) -> Settle:
    def wake() -> None:
        if not done.done():
            done.set_result(None)

    def wake_from_anywhere() -> None:
        if running_loop() is loop:
            wake()
            return
        try:
            loop.call_soon_threadsafe(wake)
        except RuntimeError:
            return  # the waiter's loop is closed; nobody is left to tell

    return wake_from_anywhere


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The loop that runs in this thread, if any."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def _outcome(flight: Flight) -> Any:
    if flight.cancelled:
        raise NotOpen(f"The cache was closed while {flight.key!r} was being loaded.")
    if flight.error is not None:
        # The traceback of the load itself: each raise would else lengthen the one that all waiters share.
        raise flight.error.with_traceback(flight.traceback)
    return flight.value
