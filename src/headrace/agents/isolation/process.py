"""The host's side of one worker: sends executions, believes nothing, and ends it when it must.

A worker has no say in whether it stops. Deadlines, cancellations and steps that do not end are all met the same way:
it is asked, and after a grace it is killed through its pidfd. Its end is always seen, because it is a child of ours.
"""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Literal, assert_never

from headrace.agents.definition import Source
from headrace.agents.execution import Progress, storable
from headrace.agents.isolation import frames
from headrace.agents.isolation.frames import (
    Bounds,
    Done,
    Emitted,
    Frame,
    FromWorker,
    Garbled,
    Incoming,
    Printed,
    Progressed,
)
from headrace.agents.isolation.limits import IsolationConfig, Limits
from headrace.agents.isolation.page import Page
from headrace.agents.isolation.running import OnEvent, OnOutput, OnProgress, ProcessOutcome, Running, Stopped
from headrace.clock import Clock
from headrace.errors import AgentInvalid, AgentUnhealthy, IsolationUnavailable, WorkerFailed

_RECEIVE_BYTES = 1 << 18
_LAST_WORDS_BYTES = 4096
# A worker reports at most fifty times a second for each execution, in three frames; more is taken for a flood.
_FRAMES_BURST = 256.0
_FRAMES_A_CALL = 64.0
_RESIDENT_AGE_S = 0.02
# A process that exits closes its socket before its pidfd tells: a moment, or longer while its namespaces are undone.
_EXIT_LAG_S = 2.0
_FRAMES_A_SECOND = 200.0
# What a worker says unasked costs its host about 4 us for an event or 4 kB. It may cost 2 % of the host's loop, in
# pieces of some milliseconds; then it is not listened to for a while, and what it cannot say it has to drop.
_TALK_BURST = 1_000.0
_TALK_A_SECOND = 5_000.0
_TALK_BYTES = 4096
_SIGNAL_REASONS = {
    signal.SIGSYS: "it made a forbidden system call",
    signal.SIGSEGV: "it crashed (SIGSEGV)",
    signal.SIGABRT: "it aborted",
}


class WorkerProcess:
    """One worker from its birth to its end. Owns its descriptors; `exited` is done when the process is gone."""

    def __init__(
        self,
        pid: int,
        connection: socket.socket,
        page: Page,
        last_words: int,
        *,
        config: IsolationConfig,
        limits: Limits,
        clock: Clock,
        on_end: Callable[["WorkerProcess", str, int], None],
    ) -> None:
        self.pid = pid
        self.limits = limits
        self.running: dict[int, Running] = {}
        self.calls = 0
        """Executions that it was given."""
        self.started_at = self.idle_since = clock.monotonic()
        self.is_leaving = False
        """Whether it gets no more executions."""
        self.is_retired = False
        """Whether it ended in peace."""
        self.killed_for: str | None = None
        """Why we killed it, once we have."""
        self.is_hog = False
        """Whether it was killed for a step that did not end."""
        self._config = config
        self._clock = clock
        self._on_end = on_end
        self._connection = connection
        self._page = page
        self._last_words = last_words
        self._loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[None] = self._loop.create_future()
        self._report: asyncio.Future[Frame] = self._loop.create_future()
        self._incoming: Incoming[FromWorker] = Incoming(frames.FROM_WORKER, bytes_max=self._frame_bytes_max())
        self._unsent = bytearray()
        self._numbers = 0
        self._culprit: int | None = None
        self._long_since, self._is_garbled = 0.0, False
        self._hang_up: asyncio.TimerHandle | None = None
        self._credit, self._credit_at = _FRAMES_BURST, self.started_at
        self._talk, self._talk_at = _TALK_BURST, self.started_at
        self._pause: asyncio.TimerHandle | None = None
        self._pidfd = os.pidfd_open(pid)
        self._resident: int | None = None
        self._resident_at = float("-inf")
        self._statm = _opened(f"/proc/{pid}/statm")
        self._loop.add_reader(self._pidfd, self._ended)
        self._loop.add_reader(connection.fileno(), self._receive)

    def _frame_bytes_max(self) -> int:
        return 2 * self.limits.output_bytes + frames.FRAME_OVERHEAD_BYTES  # a result and a state

    # -- its life -----------------------------------------------------------------------------------------------

    async def wait_until_hardened(self) -> None:
        """Raises `IsolationUnavailable` naming the part that it could not have."""
        report = await self._reported(self._config.start_timeout_s, "did not report that it is hardened")
        if isinstance(report, frames.Missing):
            raise IsolationUnavailable(
                f"This kernel does not give a part of level 'process': {report.part} ({report.reason})."
            )
        if not isinstance(report, frames.Hardened):
            raise WorkerFailed("A worker reported something else than that it is hardened.")

    async def load(self, source: Source, *, tenant: str, limits: Limits) -> bytes | None:
        """Give it its agent; what that says it can do, as JSON. Raises `AgentInvalid` when it does not load."""
        self.limits = limits
        self._incoming = Incoming(frames.FROM_WORKER, bytes_max=self._frame_bytes_max())
        self._report = self._loop.create_future()
        self._send(
            frames.Load(
                source.agent_id,
                source.version,
                tenant,
                source.text,
                source.entrypoint,
                self._config.source_bytes_max,
                Bounds(*(getattr(limits, name) for name in Bounds.__struct_fields__)),
            )
        )
        try:
            report = await self._reported(self._config.load_timeout_s, "did not load")
        except WorkerFailed as error:
            raise AgentInvalid(f"The source of {source.agent_id!r} cannot be loaded: {error.message}") from error
        if isinstance(report, frames.Refused):
            raise (AgentUnhealthy if report.is_loaded else AgentInvalid)(storable(report.reason))
        if not isinstance(report, frames.Loaded):
            raise AgentInvalid(f"The source of {source.agent_id!r} made its worker say something else than 'loaded'.")
        capabilities = report.capabilities_json
        if capabilities is not None and not frames.is_json(capabilities, bytes_max=limits.output_bytes):
            raise AgentInvalid(f"The capabilities of {source.agent_id!r} are no JSON of the permitted size.")
        return capabilities

    async def _reported(self, within_s: float, failing: str) -> Frame:
        try:
            return await asyncio.wait_for(asyncio.shield(self._report), within_s)
        except TimeoutError:
            self.kill(f"it {failing} within {within_s:g} s")
            await self.wait_until_exited()
            raise WorkerFailed(f"A worker {failing} within {within_s:g} s and was killed.") from None
        except asyncio.CancelledError:
            self.kill("nobody waits for it")
            raise

    async def wait_until_exited(self) -> None:
        """Its process is gone and collected."""
        await asyncio.wait((self.exited,))

    @property
    def has_room(self) -> bool:
        """Whether it takes one more execution."""
        is_heard = len(self._unsent) <= self._config.input_bytes_max  # else one that does not read would fill the host
        return is_heard and not self.is_leaving and len(self.running) < self.limits.concurrent

    def retire(self) -> None:
        """Give it no more executions, and end it when the last one has stopped."""
        self.is_leaving = True
        if not self.running:
            self._leave()

    def _kill_for(self, deed: str) -> None:
        """Kill it for what it did itself, in whichever execution."""
        self.kill(deed, culprit=self._suspect())

    def _leave(self) -> None:
        self.is_retired = self.killed_for is None
        self.kill("it is retired")

    def kill(self, reason: str, *, culprit: int | None = None) -> None:
        """End it now. Its executions are interrupted; the culprit, if there is one, failed."""
        self.is_leaving = True
        if self.killed_for is None and not self.exited.done():
            self.killed_for = reason
            self._culprit = culprit
            self._loop.remove_reader(self._connection.fileno())  # what it says is heard if it had ended before
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def resident_bytes(self, now: float) -> int | None:
        """Its resident memory, some milliseconds old at the most; None when the kernel does not tell."""
        if self._statm is not None and now - self._resident_at >= _RESIDENT_AGE_S:
            self._resident_at = now
            try:
                self._resident = int(os.pread(self._statm, 100, 0).split()[1]) * _PAGE_BYTES
            except (OSError, IndexError):
                self._resident = None  # it has ended
        return self._resident

    def cpu_s(self) -> float:
        """CPU time that it has used."""
        try:
            return time.clock_gettime(~self.pid << 3 | 2)  # the kernel's clock id of a process: make_process_cpuclock
        except OSError:
            return 0.0  # it has ended

    def watch(self, now: float) -> None:
        """Kill it for a step that does not end; retire it when it is due."""
        if self.running:
            since, number = self._page.read()
            self._long_since, before = since if since and now - since > self.limits.step_s else 0.0, self._long_since
            if since and since == before:  # seen twice: after a pause of the whole machine it gets a moment to end
                self.is_hog = True
                self.kill(f"one step kept its event loop for more than {self.limits.step_s:g} s", culprit=number)
                return
        config = self._config
        is_due = (
            self.calls >= config.calls_max
            or now - self.started_at >= config.age_s
            or self.cpu_s() >= self.limits.cpu_s / 2
            or (self.resident_bytes(now) or 0) >= config.resident_bytes_max
        )
        if is_due and not self.is_leaving:
            self.retire()

    # -- executions ---------------------------------------------------------------------------------------------

    async def execute(
        self,
        input_json: bytes,
        *,
        execution_id: str,
        deadline_s: float,
        due_at: float,
        state_json: bytes | None = None,
        attempt: int = 1,
        on_progress: OnProgress | None,
        on_event: OnEvent | None,
        on_output: OnOutput | None,
    ) -> ProcessOutcome:
        """Run the agent once, until `due_at` at the longest. Cancelled, it is `Stopped` when the work has."""
        self._numbers = number = self._numbers + 1
        running = Running(
            number,
            deadline_s=deadline_s,
            due_at=due_at,
            printed_left=self.limits.printed_bytes,
            has_state=state_json is not None,
            on_event=on_event,
            on_progress=on_progress,
            on_output=on_output,
        )
        self.running[number] = running
        self.calls += 1
        self._credit = min(self._credit + _FRAMES_A_CALL, _FRAMES_A_CALL * (self.limits.concurrent + 1))
        self._send(frames.Execute(number, execution_id, due_at, input_json, state_json, attempt))
        left_s = due_at - self._clock.monotonic()
        running.timer = self._loop.call_later(left_s, self._stop, running, "timeout")
        try:
            return await running.done
        except asyncio.CancelledError:
            if running.outcome is not None:  # it came a moment before, or between the cancellation and us
                raise Stopped(running.outcome) from None
            running.done = self._loop.create_future()  # the cancellation took the first one; this one is not awaited
            self._stop(running, "cancelled")
            while not running.done.done():
                try:
                    await asyncio.wait((running.done,))
                except asyncio.CancelledError:
                    continue  # asked twice; the kill after the grace bounds the wait
            raise Stopped(running.done.result()) from None

    def _stop(self, running: Running, why: Literal["timeout", "cancelled"]) -> None:
        """Ask it to stop, and kill the worker when it has not after a grace."""
        if running.done.done() or running.ended_by is not None:
            return
        running.ended_by = why
        if running.timer is not None:
            running.timer.cancel()
        self._send(frames.Cancel(running.number))
        kill = partial(self.kill, "an execution did not stop when it was told to", culprit=running.number)
        running.timer = self._loop.call_later(self._config.cancel_grace_s, kill)

    # -- what it says -------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        try:
            data = self._connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._connection.fileno())
            self._hang_up = self._loop.call_later(_EXIT_LAG_S, self._kill_for, "it closed its connection")
            return
        self._hear(data)

    def _hear(self, data: bytes) -> None:
        """Take what is complete with this data; what comes too fast is left for later."""
        if self.killed_for is not None:
            return
        with closing(self._incoming.feed(data)) as heard:
            try:
                for frame in heard:
                    self._pay()
                    self._take(frame)
                    if self._talk < 0 and (pause_s := self._overdrawn_s()) > 0:
                        self._loop.remove_reader(self._connection.fileno())
                        self._pause = self._loop.call_later(pause_s, self._listen)
                        return
            except Garbled as error:
                self._is_garbled = True
                self._kill_for(f"it sent {error}")

    def _listen(self) -> None:
        if self.killed_for is None:
            self._loop.add_reader(self._connection.fileno(), self._receive)
            self._hear(b"")

    def _overdrawn_s(self) -> float:
        """How long it should be silent for what it said."""
        now = self._clock.monotonic()
        self._talk = min(self._talk + (now - self._talk_at) * _TALK_A_SECOND, _TALK_BURST)
        self._talk_at = now
        return -self._talk / _TALK_A_SECOND

    def _pay(self) -> None:
        self._credit -= 1
        if self._credit < 0:
            now = self._clock.monotonic()
            earned = (now - self._credit_at) * _FRAMES_A_SECOND * max(1, len(self.running))
            self._credit, self._credit_at = min(self._credit + earned, _FRAMES_BURST), now
            if self._credit < 0:
                raise Garbled("more frames than its executions can need")

    def _take(self, frame: FromWorker) -> None:
        if isinstance(frame, Done):
            self._take_done(frame)
            return
        self._talk -= 1
        if isinstance(frame, Progressed):
            running = self._known(frame.number)
            if running.on_progress is not None:
                running.on_progress(Progress(frame.done, frame.total, frame.note))
        elif isinstance(frame, Printed):
            self._take_printed(frame)
        elif isinstance(frame, Emitted):
            self._take_emitted(frame)
        elif isinstance(frame, frames.Hardened | frames.Missing | frames.Loaded | frames.Refused):
            if self._report.done():
                raise Garbled("a report that nobody asked for")
            self._report.set_result(frame)
        else:
            assert_never(frame)

    def _known(self, number: int) -> Running:
        running = self.running.get(number)
        if running is None:
            raise Garbled(f"a frame about execution {number}, which it does not have")
        return running

    def _take_printed(self, frame: Printed) -> None:
        running = self._known(frame.number)
        running.printed_left -= len(frame.text.encode())
        if running.printed_left < 0:
            raise Garbled("more output than it may keep")
        if running.on_output is not None:
            running.on_output(frame.stream, frame.text)

    def _take_emitted(self, frame: Emitted) -> None:
        running = self._known(frame.number)
        events, most = frame.events_json, frames.EVENTS_BATCH_BYTES_MAX
        size = sum(map(len, events))
        self._talk -= len(events) + size // _TALK_BYTES
        if size > most or not all(frames.is_json(event, bytes_max=most) for event in events):
            raise Garbled("events that are no JSON of the permitted size")
        if running.on_event is not None:
            for event in events:
                running.on_event(event)

    def _take_done(self, frame: Done) -> None:
        running = self._known(frame.number)
        bytes_max = self.limits.output_bytes
        if frame.status == "completed":
            if not frames.is_json(frame.output_json, bytes_max=bytes_max):
                raise Garbled("a result that is no JSON of the permitted size")
            if running.has_state and not frames.is_json(frame.state_json, bytes_max=bytes_max, is_object=True):
                raise Garbled("a state that is no JSON object of the permitted size")
        now = self._clock.monotonic()
        is_late = running.is_late(now)
        is_kept = frame.status == "completed" and not is_late
        outcome = ProcessOutcome(
            "timeout" if is_late else frame.status,
            frames.one_line(frame.output_json) if is_kept and frame.output_json else None,
            f"{running.longer_than} and was stopped." if is_late else frame.error,
            cpu_ms=frame.cpu_ms,
            memory_bytes=self.resident_bytes(now),
            dropped_bytes=frame.dropped_bytes,
            state_json=frame.state_json if running.has_state and is_kept else None,
        )
        self._finish(running, outcome)

    def _finish(self, running: Running, outcome: ProcessOutcome) -> None:
        self.running.pop(running.number, None)
        running.settle(outcome)
        if not self.running:
            self.idle_since = self._clock.monotonic()
            if self.is_leaving and not self.exited.done():
                self._leave()

    def _send(self, frame: Frame) -> None:
        data = frames.framed(frame)
        if not self._unsent:
            try:
                sent = self._connection.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:
                return  # it has ended, which its pidfd tells
            if sent == len(data):
                return
            data = data[sent:]
            self._loop.add_writer(self._connection.fileno(), self._send_rest)
        self._unsent += data

    def _send_rest(self) -> None:
        try:
            del self._unsent[: self._connection.send(self._unsent)]
        except BlockingIOError:
            return
        except OSError:
            self._unsent.clear()  # it has ended, which its pidfd tells
        if not self._unsent:
            self._loop.remove_writer(self._connection.fileno())

    # -- its end ------------------------------------------------------------------------------------------------

    def _ended(self) -> None:
        """Its process is gone: take what it still said, collect it, and tell whoever waited."""
        self._loop.remove_reader(self._pidfd)
        for timer in (self._hang_up, self._pause):
            if timer is not None:
                timer.cancel()
        _, status, usage = os.wait4(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        if code != -signal.SIGKILL and not self._is_garbled:
            self.killed_for, self.is_hog, self.is_leaving = None, False, False  # it had ended before it was
        if self.killed_for is None:
            self._drain()
        reason = self.killed_for or self._reason(code, usage.ru_utime + usage.ru_stime)
        last = self._read_last_words()
        for descriptor in (self._pidfd, self._last_words, *([] if self._statm is None else [self._statm])):
            os.close(descriptor)
        culprit = self._suspect() if self.killed_for is None else self._culprit
        self._loop.remove_reader(self._connection.fileno())
        self._loop.remove_writer(self._connection.fileno())
        self._connection.close()
        self._page.close()
        self.is_leaving = True
        self.exited.set_result(None)
        if not self._report.done():
            self._report.set_exception(WorkerFailed(f"A worker ended: {reason}.{last}"))
            self._report.exception()  # asked for once here: it may be that nobody waits for it
        outcomes = [(each, each.last_outcome(culprit, f"{reason}.{last}")) for each in self.running.values()]
        for running, outcome in outcomes:
            self._finish(running, outcome)
        self._on_end(self, reason, sum(outcome.status == "interrupted" for _, outcome in outcomes))

    def _drain(self) -> None:
        data = b""
        while self.killed_for is None:
            try:
                for frame in self._incoming.feed(data):
                    self._pay()
                    if isinstance(frame, Done) or self._talk >= 0:
                        self._take(frame)
                data = self._connection.recv(_RECEIVE_BYTES)
            except (OSError, Garbled):
                return
            if not data:
                return

    def _reason(self, status: int, cpu_s: float) -> str:
        if status >= 0:
            return f"it exited with {status}"
        number = signal.Signals(-status)
        if number == signal.SIGKILL and cpu_s >= self.limits.cpu_s:
            return "it used up its CPU time (Limits.cpu_s)"
        return _SIGNAL_REASONS.get(number, f"it ended by {number.name}")

    def _suspect(self) -> int:
        """The execution that did it: the only one, or the one whose step began last."""
        return next(iter(self.running)) if len(self.running) == 1 else self._page.read()[1]

    def _read_last_words(self) -> str:
        """What the interpreter itself wrote to stderr: the name of a crash, or the error that ended it."""
        try:
            text = os.read(self._last_words, _LAST_WORDS_BYTES).decode(errors="replace").strip()
        except OSError:
            return ""
        lines = text.splitlines() or [""]
        said = next((line for line in lines if line.startswith("Fatal Python error")), lines[-1])
        return f" {said[:200]}" if said else ""


_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def _opened(path: str) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
