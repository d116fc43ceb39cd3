"""The worker: one process that gave up its rights and runs one version of one agent, many executions at once.

Only its own agent is kept apart from the machine here. Executions of the same tenant and version share the process, as
they would share it in the host.
"""

import asyncio
import contextvars
import faulthandler
import inspect
import io
import os
import selectors
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Generator
from typing import Any, Literal, NoReturn

import msgspec

from headrace.agents.definition import Definition, Source, load, unhealthy
from headrace.agents.execution import Context, Execution, Metered, Outcome, encoded, failure, storable
from headrace.agents.isolation import frames, hardening, kernel
from headrace.agents.isolation.frames import Cancel, Done, Execute, Frame, FromHost, Incoming, Load, StreamName
from headrace.agents.isolation.page import Page
from headrace.agents.threads import DaemonThreads
from headrace.clock import SystemClock
from headrace.errors import AgentInvalid, AgentUnhealthy, InvalidRequest

_REPORT_S = 0.02
_RECEIVE_BYTES = 1 << 18
_THREAD_STACK_BYTES = 1 << 20
# The host is trusted: this bound only keeps a bug from asking for all memory.
_FRAME_BYTES_MAX = 1 << 30

_current: contextvars.ContextVar["Working | None"] = contextvars.ContextVar("headrace_execution", default=None)


def run(
    descriptors: list[int],
    is_mapped: bool,  # noqa: FBT001 - the zygote's word to its child
    *,
    scratch_bytes: int,
    base_bytes: int,
    readable: Collection[str],
) -> NoReturn:
    """Harden this process, take one source and execute it until the host is gone. Never returns."""
    try:
        host_fd, printed_fd, page_fd = descriptors
        page = Page(page_fd)
        os.dup2(printed_fd, 1)
        os.dup2(printed_fd, 2)
        host = socket.socket(fileno=host_fd)
        faulthandler.enable(file=2)
        threading.stack_size(_THREAD_STACK_BYTES)
        incoming = Incoming(frames.FROM_HOST, bytes_max=_FRAME_BYTES_MAX)
        try:
            hardening.harden(
                is_mapped=is_mapped, scratch_bytes=scratch_bytes, readable=readable, keep={0, 1, 2, host_fd}
            )
        except kernel.PartMissing as missing:
            host.sendall(frames.framed(frames.Missing(missing.part, missing.reason)))
            os._exit(1)
        host.sendall(frames.framed(frames.Hardened()))
        _serve(host, incoming, page, base_bytes)
    except BaseException:  # noqa: BLE001 - its last words, which the host reads; the process ends in any case
        traceback.print_exc(file=sys.__stderr__)
    finally:
        # Whatever happened, nothing of the zygote that was forked is to run on in here.
        os._exit(1)


def _serve(host: socket.socket, incoming: Incoming[FromHost], page: Page, base_bytes: int) -> None:
    order, rest = _first(host, incoming)
    if not isinstance(order, Load):
        raise frames.Garbled("the first frame is no source")
    hardening.limit(order.limits, base_bytes=base_bytes)
    sys.stdout, sys.stderr = Stream("stdout"), Stream("stderr")
    definition = _loaded(order, host)
    Worker(order, definition, host, incoming, page).serve(rest)


def _first(host: socket.socket, incoming: Incoming[FromHost]) -> tuple[FromHost, list[FromHost]]:
    while data := host.recv(_RECEIVE_BYTES):
        found = list(incoming.feed(data))
        if found:
            return found[0], found[1:]
    os._exit(0)


def _loaded(order: Load, host: socket.socket) -> Definition:
    source = Source(agent_id=order.agent_id, version=order.version, text=order.text, entrypoint=order.entrypoint)
    try:
        return load(source, bytes_max=order.source_bytes_max)
    except AgentInvalid as error:
        reason = error.message
    except BaseException as error:  # noqa: BLE001 - foreign code at its top level: whatever it raises is the reason
        reason = f"The source of {order.agent_id!r} cannot be loaded: {type(error).__name__}: {error}"
    host.sendall(frames.framed(frames.Refused(_short(reason))))
    os._exit(0)


def _worker_status(outcome: Outcome) -> Literal["completed", "failed", "cancelled"]:
    """The three that a worker can give."""
    match outcome.status:
        case "completed" | "cancelled" as status:
            return status
        case _:
            return "failed"


def _short(text: str) -> str:
    return storable(text[: frames.ERROR_CHARACTERS_MAX])


def _counted(count: int) -> int:
    """A count that fits into a frame."""
    return max(-frames.COUNT_MAX, min(frames.COUNT_MAX, count))


class MarkedSelector(selectors.DefaultSelector):
    """Notes on the page when the loop waits and when it works."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self._page = page

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait."""
        if timeout != 0:
            self._page.mark_idle()
        events = super().select(timeout)
        self._page.mark_busy()
        return events


class Stream(io.TextIOBase):
    """`sys.stdout` or `sys.stderr`: what is written belongs to the execution that writes it."""

    encoding = "utf-8"

    def __init__(self, name: StreamName) -> None:
        self._name = name

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, text: str) -> int:
        """Keep it for the current execution; text of none, such as of an import, is dropped."""
        working = _current.get()
        if working is not None:
            working.printed(self._name, text)
        return len(text)


class Marked(Coroutine[Any, Any, Any]):
    """A coroutine whose every step is noted on the page."""

    __slots__ = ("_coroutine", "_number", "_page")

    def __init__(self, coroutine: Coroutine[Any, Any, Any], page: Page, number: int) -> None:
        self._coroutine = coroutine
        self._page = page
        self._number = number

    def __await__(self) -> Generator[Any, Any, Any]:
        return self._coroutine.__await__()

    def send(self, value: Any) -> Any:
        """Take the next step."""
        self._page.mark_step(self._number)
        return self._coroutine.send(value)

    def throw(self, *error: Any) -> Any:
        """Take the next step with an error, which cancellation is."""
        self._page.mark_step(self._number)
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """End it where it is."""
        self._coroutine.close()


class Working:
    """An execution in this worker."""

    __slots__ = (
        "_bytes_left", "_dirty", "_event_bytes", "_events", "_text", "cpu_s", "dropped_bytes", "execution",
        "is_begun", "is_cancelled", "number", "state", "task",
    )  # fmt: skip

    def __init__(
        self, number: int, execution: Execution, *, bytes_left: int, dirty: Callable[["Working"], None]
    ) -> None:
        self.number = number
        self.execution = execution
        self.cpu_s = 0.0
        self.dropped_bytes = 0
        self.is_begun = False
        """Whether its task has taken a step."""
        self.is_cancelled = False
        self.task: asyncio.Task[None]
        self._bytes_left = bytes_left
        self._dirty = dirty
        self._text: deque[tuple[StreamName, str]] = deque()
        self._events: deque[bytes] = deque()
        self._event_bytes = 0
        self.state: dict[str, Any] | None = None
        """What the instance remembers; None without an instance."""

    def printed(self, stream: StreamName, text: str) -> None:
        """Keep what fits."""
        kept = storable(text[: self._bytes_left])
        size = len(kept.encode())
        if size > self._bytes_left:
            kept = kept.encode()[: self._bytes_left].decode(errors="ignore")
            size = len(kept.encode())
        self._bytes_left -= size
        self.dropped_bytes += max(0, len(text) - len(kept))
        if kept:
            self._text.append((stream, kept))
            self._dirty(self)

    def emit(self, execution: Execution, event: Any) -> None:
        """Keep an event for the next report; what does not fit into one drives out the oldest."""
        data = msgspec.json.encode(event)
        self._events.append(data)
        self._event_bytes += len(data)
        while self._event_bytes > frames.EVENTS_BATCH_BYTES_MAX or len(self._events) > frames.EVENTS_BATCH_MAX:
            lost = len(self._events.popleft())
            self._event_bytes -= lost
            self.dropped_bytes += lost
        self._dirty(self)

    def state_of(self, execution: Execution) -> dict[str, Any]:
        """What the instance remembers."""
        if self.state is None:
            raise InvalidRequest(
                f"The execution {execution.id!r} has no instance whose state it could be.",
                fix="Execute with instance=...",
            )
        return self.state

    def progressed(self) -> None:
        """A new progress is to be reported."""
        self._dirty(self)

    def reports(self) -> list[Frame]:
        """What the host has not been told yet."""
        found: list[Frame] = []
        if (progress := self.execution.progress) is not None:
            self.execution.progress = None
            note = progress.note[: frames.NOTE_CHARACTERS_MAX]
            found.append(frames.Progressed(self.number, _counted(progress.done), _counted(progress.total), note))
        if self._events:
            events = [self._events.popleft() for _ in range(len(self._events))]
            self._event_bytes -= sum(map(len, events))
            found.append(frames.Emitted(self.number, events))
        stream: StreamName = "stdout"
        parts: list[str] = []
        for _ in range(len(self._text)):
            name, text = self._text.popleft()
            if name != stream:
                found += self._batches(stream, parts)
                stream, parts = name, []
            parts.append(text)
        return found + self._batches(stream, parts)

    def _batches(self, stream: StreamName, parts: list[str]) -> list[Frame]:
        text, size = "".join(parts), frames.PRINTED_BATCH_CHARACTERS_MAX
        return [frames.Printed(self.number, stream, text[at : at + size]) for at in range(0, len(text), size)]


class WorkerContext(Context):
    """What the agent sees of its execution."""

    __slots__ = ("_working",)

    def __init__(self, working: Working, clock: SystemClock, deadline: float) -> None:
        super().__init__(working.execution, clock, deadline, working)
        self._working = working

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say how far the work is; the newest report wins."""
        super().progress(done, total, note)
        self._working.progressed()

    @property
    def should_stop(self) -> bool:
        """Whether nobody wants the result any more: its host said so, or its deadline has passed."""
        return self._working.is_cancelled or super().should_stop


class Worker:
    """Runs executions of one definition in one event loop."""

    def __init__(
        self, order: Load, definition: Definition, host: socket.socket, incoming: Incoming[FromHost], page: Page
    ) -> None:
        self._order = order
        self._definition = definition
        self._host = host
        self._incoming = incoming
        self._page = page
        self._clock = SystemClock()
        self._loop = asyncio.SelectorEventLoop(MarkedSelector(page))
        self._threads = DaemonThreads(order.limits.threads, name="headrace-agent")
        self._places = asyncio.Semaphore(order.limits.threads)
        self._caretaker: Any = None
        self._working: dict[int, Working] = {}
        self._unreported: set[Working] = set()
        self._is_report_due = False
        self._unsent = bytearray()

    def serve(self, orders: list[FromHost]) -> None:
        """Execute until the host closes its end."""
        asyncio.set_event_loop(self._loop)
        try:
            capabilities_json = self._started()
        except AgentUnhealthy as error:
            self._host.sendall(frames.framed(frames.Refused(_short(error.message), is_loaded=True)))
            os._exit(0)
        self._host.setblocking(False)  # noqa: FBT003 - the socket's own signature
        self._loop.add_reader(self._host.fileno(), self._receive)
        self._send(frames.Loaded(self._definition.is_async, capabilities_json))
        for order in orders:
            self._obey(order)
        while True:  # an agent may stop the loop; it would only stop itself
            self._loop.run_forever()

    def _started(self) -> bytes | None:
        """Start and check the agent; what it says that it can do.

        `stop` is not called: a worker has nothing that does not end with it.
        """
        if self._definition.caretaker is None:
            return None
        self._caretaker = self._hook("__init__", self._definition.caretaker)
        self._call_hook("start")
        if self._call_hook("check") is False:
            raise self._unhealthy("check", "it returned False")
        said = self._call_hook("get_capabilities")
        if said is None:
            return None
        capabilities = encoded(said, bytes_max=self._order.limits.output_bytes)
        if capabilities.status != "completed":
            raise self._unhealthy("get_capabilities", str(capabilities.error))
        return capabilities.output_json

    def _call_hook(self, name: str) -> Any:
        hook = getattr(self._caretaker, name, None)
        return self._hook(name, hook) if callable(hook) else None

    def _hook(self, name: str, hook: Callable[[], Any]) -> Any:
        try:
            said = hook()
            return self._loop.run_until_complete(said) if inspect.iscoroutine(said) else said
        except BaseException as error:  # foreign code: whatever it raises is the reason
            raise self._unhealthy(name, f"{type(error).__name__}: {error}") from error

    def _unhealthy(self, hook: str, reason: str) -> AgentUnhealthy:
        return unhealthy(self._order.agent_id, self._order.version, hook, reason)

    def _receive(self) -> None:
        try:
            data = self._host.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            os._exit(0)
        for order in self._incoming.feed(data):
            self._obey(order)

    def _obey(self, order: FromHost) -> None:
        if isinstance(order, Execute):
            self._begin(order)
        elif isinstance(order, Cancel) and (working := self._working.get(order.number)) is not None:
            working.is_cancelled = True
            if working.is_begun:  # a task that is cancelled before its first step never reports its end
                working.task.cancel()

    def _begin(self, order: Execute) -> None:
        execution = Execution(
            id=order.execution_id,
            agent_id=self._order.agent_id,
            version=self._order.version,
            status="running",
            tenant=self._order.tenant,
            attempt=order.attempt,
        )
        working = Working(
            order.number, execution, bytes_left=self._order.limits.printed_bytes, dirty=self._report_soon
        )
        self._working[order.number] = working
        context = contextvars.copy_context()
        context.run(_current.set, working)
        working.task = self._loop.create_task(self._work(working, order), context=context)

    async def _work(self, working: Working, order: Execute) -> None:
        working.is_begun = True
        try:
            outcome = await self._outcome(working, order)
        except asyncio.CancelledError:
            outcome = Outcome("cancelled", error="It cancelled itself.")
        except BaseException as error:  # noqa: BLE001 - foreign code: whatever it raises, sys.exit too, is its result
            outcome = failure(error)
        outcome, state_json = self._with_state(working, outcome)
        for report in working.reports():
            self._send(report)
        self._unreported.discard(working)
        del self._working[working.number]
        self._send(
            Done(
                working.number,
                _worker_status(outcome),
                outcome.output_json,
                None if outcome.error is None else outcome.error[: frames.ERROR_CHARACTERS_MAX],
                working.cpu_s * 1000,
                working.dropped_bytes,
                state_json,
            )
        )

    async def _outcome(self, working: Working, order: Execute) -> Outcome:
        if working.is_cancelled:
            raise asyncio.CancelledError
        value = msgspec.json.decode(order.input_json)
        if order.state_json is not None:
            working.state = msgspec.json.decode(order.state_json, type=dict[str, Any])
        work = self._in_loop if self._definition.is_async else self._in_thread
        return await work(working, value, WorkerContext(working, self._clock, order.deadline))

    def _with_state(self, working: Working, outcome: Outcome) -> tuple[Outcome, bytes | None]:
        """What the instance remembers from now on; a state that cannot be kept fails the execution."""
        if working.state is None or outcome.status != "completed":
            return outcome, None
        kept = encoded(working.state, bytes_max=self._order.limits.output_bytes)
        if kept.status != "completed":
            return Outcome("failed", error=f"Its state: {kept.error}"), None
        return outcome, kept.output_json

    async def _in_loop(self, working: Working, value: Any, context: WorkerContext) -> Outcome:
        coroutine = self._definition.make()(value, context)
        metered = Metered(Marked(coroutine, self._page, working.number))
        try:
            output = await metered
        finally:
            working.cpu_s = metered.cpu_s
        return encoded(output, bytes_max=self._order.limits.output_bytes)

    async def _in_thread(self, working: Working, value: Any, context: WorkerContext) -> Outcome:
        async with self._places:
            self._threads.reserve()
            surroundings = contextvars.copy_context()
            call = self._threads.run(lambda: surroundings.run(self._call, working, value, context))
            while not call.done():
                try:
                    await asyncio.wait((call,))
                except asyncio.CancelledError:
                    working.is_cancelled = True  # said again below: a thread cannot be stopped
            outcome: Outcome = call.result()
        if working.is_cancelled:
            raise asyncio.CancelledError
        return outcome

    def _call(self, working: Working, value: Any, context: WorkerContext) -> Outcome:
        started = time.thread_time()
        try:
            output = self._definition.make()(value, context)
        finally:
            working.cpu_s = time.thread_time() - started
        return encoded(output, bytes_max=self._order.limits.output_bytes)

    # -- to the host --------------------------------------------------------------------------------------------

    def _report_soon(self, working: Working) -> None:
        """Called from agents' threads too."""
        self._unreported.add(working)
        if not self._is_report_due:
            self._is_report_due = True
            self._loop.call_soon_threadsafe(self._loop.call_later, _REPORT_S, self._report)

    def _report(self) -> None:
        if self._unsent:  # the host is behind; what it misses meanwhile is dropped, not kept
            self._loop.call_later(_REPORT_S, self._report)
            return
        self._is_report_due = False
        while self._unreported:
            working = self._unreported.pop()
            if working.number in self._working:  # what a thread or task that it left behind still says is nobody's
                for report in working.reports():
                    self._send(report)

    def _send(self, frame: Frame) -> None:
        data = frames.framed(frame)
        if not self._unsent:
            try:
                sent = self._host.send(data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._host.fileno(), self._send_rest)
        self._unsent += data

    def _send_rest(self) -> None:
        try:
            sent = self._host.send(self._unsent)
        except BlockingIOError:
            return
        del self._unsent[:sent]
        if not self._unsent:
            self._loop.remove_writer(self._host.fileno())
