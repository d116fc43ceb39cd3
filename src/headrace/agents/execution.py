"""One run of an agent: its record, and what the agent sees of it."""

import os
import time
from collections.abc import Coroutine, Generator
from itertools import accumulate
from typing import Any, Literal, Protocol

import msgspec

from headrace.clock import Clock
from headrace.errors import InvalidRequest

JSON_DEPTH_MAX = 200
"""How deep an output or a state may be nested: readers that recurse, CPython's 1,000 frames among them, have room."""
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_SQUARE = bytes.maketrans(b"{}", b"[]")
_OPENING = ord("[")
_FLATTENED = 4
"""How many innermost levels are taken away before what is left is counted."""
Status = Literal["queued", "running", "cancelling", "completed", "failed", "timeout", "cancelled", "interrupted"]
Priority = Literal["low", "normal", "high"]

FINISHED = frozenset({"completed", "failed", "timeout", "cancelled", "interrupted"})


def timed_id(wall: float) -> str:
    """An id of 32 hexadecimal digits in the order of time: milliseconds, the microseconds over, 68 random bits."""
    milliseconds, microseconds = divmod(int(wall * 1e6), 1000)
    return f"{milliseconds:012x}{microseconds:03x}{os.urandom(9).hex()[:17]}"


class Progress(msgspec.Struct, frozen=True):
    """How far an execution says it is."""

    done: int
    total: int
    note: str = ""


class Execution(msgspec.Struct, kw_only=True, gc=False):
    """One run of an agent. Times are milliseconds; `started_at` and `finished_at` are wall seconds."""

    id: str
    agent_id: str
    version: str
    status: Status
    tenant: str = "default"
    output_json: bytes | None = None
    """The output as JSON, encoded once."""
    error: str | None = None
    progress: Progress | None = None
    queue_ms: float = 0.0
    """From acceptance to the first step."""
    run_ms: float = 0.0
    cpu_ms: float = 0.0
    """CPU time of the steps; of the whole call for a synchronous agent."""
    memory_bytes: int | None = None
    """None for trusted agents: what one of many in a process holds cannot be told apart."""
    started_at: float | None = None
    finished_at: float | None = None
    input_sha256: str = ""
    attempt: int = 1
    """Which attempt this is, the first being 1; 0 while it has not begun."""

    @property
    def output(self) -> Any:
        """What the agent returned, or None."""
        return None if self.output_json is None else msgspec.json.decode(self.output_json)

    @property
    def is_finished(self) -> bool:
        """Whether its status will not change any more."""
        return self.status in FINISHED


class Room(Protocol):
    """Where an agent's words and memory go; one for all executions of a process."""

    def emit(self, execution: Execution, event: Any) -> None:
        """Give an event to whoever listens."""

    def state_of(self, execution: Execution) -> dict[str, Any]:
        """What the instance that the execution was called for remembers."""


class Context:
    """What an agent is told about its execution, and how it reports back."""

    __slots__ = ("_clock", "_deadline", "_execution", "_room")

    def __init__(self, execution: Execution, clock: Clock, deadline: float, room: Room | None = None) -> None:
        self._execution = execution
        self._clock = clock
        self._deadline = deadline
        self._room = room

    @property
    def agent_id(self) -> str:
        """The agent's id."""
        return self._execution.agent_id

    @property
    def version(self) -> str:
        """The version that runs; it stays the same for the whole execution."""
        return self._execution.version

    @property
    def execution_id(self) -> str:
        """This execution's id: an idempotency key for whatever the agent does outside."""
        return self._execution.id

    @property
    def tenant(self) -> str:
        """On whose behalf it runs."""
        return self._execution.tenant

    def remaining_s(self) -> float:
        """Seconds until the deadline; below 0 when it has passed."""
        return self._deadline - self._clock.monotonic()

    @property
    def should_stop(self) -> bool:
        """Whether nobody wants the result any more: the execution was cancelled, or its deadline has passed.

        For a synchronous agent, whose thread nothing can interrupt: look between two steps, clean up and return. An
        `async` agent need not look; it gets an `asyncio.CancelledError` where it waits.
        """
        return self._execution.status == "cancelling" or self.remaining_s() <= 0

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Say how far the work is; the newest report wins."""
        self._execution.progress = Progress(int(done), int(total), storable(str(note)))

    @property
    def attempt(self) -> int:
        """Which attempt this is, the first being 1; above 1 only for agents that were deployed as idempotent."""
        return self._execution.attempt

    def emit(self, event: Any) -> None:
        """Send a JSON value to whoever reads the execution's events; never waits, slow readers miss the oldest."""
        if self._room is not None:
            self._room.emit(self._execution, event)

    @property
    def state(self) -> dict[str, Any]:
        """What this agent remembers for the `instance` that it was executed for; kept when the execution completes.

        Executions of one instance take turns, so nobody else changes it meanwhile. Raises `InvalidRequest` in an
        execution without an instance.
        """
        if self._room is None:
            raise InvalidRequest(
                f"The execution {self._execution.id!r} has no instance whose state it could be.",
                fix="Execute with instance=...",
            )
        return self._room.state_of(self._execution)


class Metered:
    """Awaits a coroutine and adds up the CPU time of its steps.

    `time.thread_time` is taken around each step, so what other tasks do between two steps is not counted.
    """

    __slots__ = ("_coroutine", "cpu_s")

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine
        self.cpu_s = 0.0

    def __await__(self) -> Generator[Any, Any, Any]:
        """Drive the coroutine, passing values, errors and cancellation through."""
        now = time.thread_time
        step = self._coroutine.send
        sent: Any = None
        while True:
            started = now()
            try:
                waits_for = step(sent)
            except StopIteration as stop:
                return stop.value
            finally:
                self.cpu_s += now() - started
            try:
                sent = yield waits_for
            except GeneratorExit:
                self._coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - passed on into the coroutine, cancellation included
                step, sent = self._coroutine.throw, error
            else:
                step = self._coroutine.send


class Outcome(msgspec.Struct, frozen=True):
    """How a run ended, before it is written down."""

    status: Status
    output_json: bytes | None = None
    error: str | None = None


def failure(error: BaseException) -> Outcome:
    """An agent's own exception as the result of its execution."""
    return Outcome("failed", error=storable(f"{type(error).__name__}: {error}"))


def storable(text: str) -> str:
    """The text without what a Postgres text column cannot hold: NUL and lone surrogates."""
    return text.replace("\x00", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()


def as_json(value: Any) -> bytes:
    """A value of an agent's as JSON that every reader takes, a `msgspec.Raw` in it included, which is not looked at.

    Raises `TypeError`, `ValueError` or `RecursionError` when it is none.
    """
    # A line break in JSON is white space, and the end of a line to whoever streams it.
    json = msgspec.json.encode(value).replace(b"\n", b" ").replace(b"\r", b" ")
    try:
        msgspec.json.decode(json, type=msgspec.Raw)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    if not json.isascii():
        json.decode()
    return json


def is_deep(json: bytes) -> bool:
    """Whether JSON is nested deeper than `JSON_DEPTH_MAX`.

    Nearly all of the work is done by searches of bytes: without its texts, and its innermost pairs several times taken
    away, next to nothing is left of what is wide; only what still could be deep is counted.
    """
    if json.count(b"[") + json.count(b"{") <= JSON_DEPTH_MAX:
        return False
    if b"\\" in json:
        json = json.replace(b"\\\\", b"").replace(b'\\"', b"")
    brackets = b"".join(json.split(b'"')[::2]).translate(_SQUARE, _NO_BRACKETS)
    for _ in range(_FLATTENED):
        brackets = brackets.replace(b"[]", b"")
    left = JSON_DEPTH_MAX - _FLATTENED
    return len(brackets) > 2 * left and max(accumulate(1 if byte == _OPENING else -1 for byte in brackets)) > left


def encoded(output: Any, *, bytes_max: int) -> Outcome:
    """An agent's return value as the result of its execution; what is no JSON or too large fails it."""
    try:
        json = as_json(output)
    except (TypeError, ValueError, RecursionError) as error:
        return Outcome(
            "failed", error=f"The output cannot be written as JSON ({error}). Return dicts, lists and plain values."
        )
    if len(json) > bytes_max:
        return Outcome(
            "failed",
            error=f"The output is {len(json):,} bytes; at most {bytes_max:,} are accepted (agents.output_bytes_max).",
        )
    if is_deep(json):
        return Outcome("failed", error=f"The output is nested deeper than {JSON_DEPTH_MAX}; flatten it.")
    return Outcome("completed", json)
