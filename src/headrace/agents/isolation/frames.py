"""What host and worker say to each other: typed, length-prefixed, and bounded on the way in.

A frame is its length in four bytes and one array of msgpack. The host takes every byte as written by an enemy: the
length is checked before anything is kept, the decoder knows the few shapes there are, and whatever else comes is a
`Garbled`, after which the worker is killed.
"""

from collections.abc import Generator
from typing import Annotated, Generic, Literal, TypeVar

import msgspec

FRAME_OVERHEAD_BYTES = 64 << 10
"""Room in a frame for everything but its one large field."""
ERROR_CHARACTERS_MAX = 4_000
NOTE_CHARACTERS_MAX = 1_000
PRINTED_BATCH_CHARACTERS_MAX = 12_000
EVENTS_BATCH_BYTES_MAX = 48 << 10
EVENTS_BATCH_MAX = 256
"""Events in a frame: each costs the host microseconds, and a small one is three bytes to whoever sends it."""

COUNT_MAX = 2**53
"""As far as every reader of JSON counts exactly."""

_HEADER_BYTES = 4
# Makes numbers that JSON may write and a float cannot hold visible to plain searches: two digits of exponent and fewer
# than 200 before it are no such number. A regular expression takes 200 ms for some megabytes.
_SHAPES = bytes.maketrans(b"123456789E", b"000000000e")
_LARGE = (b"e000", b"e+000", b"0" * 200)

T = TypeVar("T")


class Garbled(Exception):
    """The other side sent what this protocol does not have."""


class Frame(msgspec.Struct, frozen=True, array_like=True, tag=True, gc=False):
    """One message."""


# -- host to worker -----------------------------------------------------------------------------------------------


class Load(Frame, frozen=True):
    """The agent that this worker is for; the first frame, sent once."""

    agent_id: str
    version: str
    tenant: str
    text: str
    entrypoint: str
    source_bytes_max: int
    limits: "Bounds"


class Execute(Frame, frozen=True):
    """Run the agent once. `deadline` is the machine's monotonic clock, which both sides read."""

    number: int
    execution_id: str
    deadline: float
    input_json: bytes
    state_json: bytes | None = None
    """What the instance remembers; None for an execution without one."""
    attempt: int = 1


class Cancel(Frame, frozen=True):
    """Stop an execution and report it."""

    number: int


class Bounds(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The limits that a worker puts on itself."""

    memory_bytes: int
    cpu_s: float
    files: int
    processes: int
    threads: int
    output_bytes: int
    printed_bytes: int
    scratch_bytes: int


# -- worker to host -----------------------------------------------------------------------------------------------

Text = Annotated[str, msgspec.Meta(max_length=ERROR_CHARACTERS_MAX)]
Note = Annotated[str, msgspec.Meta(max_length=NOTE_CHARACTERS_MAX)]
StreamName = Literal["stdout", "stderr"]
Number = Annotated[int, msgspec.Meta(ge=0, le=COUNT_MAX)]
Count = Annotated[int, msgspec.Meta(ge=-COUNT_MAX, le=COUNT_MAX)]
Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
"""Finite: JSON has no infinity, and a column of a database no null for it."""


class Hardened(Frame, frozen=True):
    """Every part of the isolation is in force; ready for a source."""


class Missing(Frame, frozen=True):
    """A part of the isolation could not be had; the worker ends."""

    part: Note
    reason: Text


class Loaded(Frame, frozen=True):
    """The agent is loaded, started and checked; ready for executions."""

    is_async: bool
    capabilities_json: bytes | None = None
    """What its `get_capabilities` returned."""


class Refused(Frame, frozen=True):
    """The source does not load, or its agent does not start; the worker ends."""

    reason: Text
    is_loaded: bool = False
    """Whether it was a hook that failed."""


class Done(Frame, frozen=True):
    """An execution has stopped."""

    number: Number
    status: Literal["completed", "failed", "cancelled"]
    output_json: bytes | None
    error: Text | None
    cpu_ms: Milliseconds
    dropped_bytes: Number
    state_json: bytes | None = None


class Progressed(Frame, frozen=True):
    """How far an execution says it is."""

    number: Number
    done: Count
    total: Count
    note: Note


class Emitted(Frame, frozen=True):
    """Events of an execution, each as JSON, in their order."""

    number: Number
    events_json: Annotated[list[bytes], msgspec.Meta(max_length=EVENTS_BATCH_MAX)]


class Printed(Frame, frozen=True):
    """What an execution wrote to stdout or stderr."""

    number: Number
    stream: StreamName
    text: Annotated[str, msgspec.Meta(max_length=PRINTED_BATCH_CHARACTERS_MAX)]


FromHost = Load | Execute | Cancel
FromWorker = Hardened | Missing | Loaded | Refused | Done | Progressed | Emitted | Printed

FROM_HOST: msgspec.msgpack.Decoder[FromHost] = msgspec.msgpack.Decoder(FromHost)
FROM_WORKER: msgspec.msgpack.Decoder[FromWorker] = msgspec.msgpack.Decoder(FromWorker)

_encode = msgspec.msgpack.Encoder().encode


def is_json(data: bytes | None, *, bytes_max: int, is_object: bool = False) -> bool:
    """Whether it can be read as JSON, without making objects of it unless a number in it looks too large."""
    if data is None or len(data) > bytes_max or (is_object and not data.startswith(b"{")):
        return False
    try:
        data.decode()
        msgspec.json.decode(data, type=msgspec.Raw)
        shapes = data.translate(_SHAPES)
        if any(large in shapes for large in _LARGE):
            msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def one_line(json: bytes) -> bytes:
    """The same JSON without line breaks: white space to it, and the end of a line to whoever streams it."""
    return json.replace(b"\n", b" ").replace(b"\r", b" ")


def framed(frame: Frame) -> bytes:
    """The frame as bytes on the wire."""
    body = _encode(frame)
    return len(body).to_bytes(_HEADER_BYTES, "little") + body


class Incoming(Generic[T]):
    """Cuts a stream into frames."""

    __slots__ = ("_buffer", "_bytes_max", "_decoder")

    def __init__(self, decoder: msgspec.msgpack.Decoder[T], *, bytes_max: int) -> None:
        self._decoder = decoder
        self._bytes_max = bytes_max
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Generator[T, None, None]:
        """The frames that are complete with this data; raises `Garbled` at the first that is none.

        Frames that nobody asked for before it was closed come again at the next call.
        """
        buffer = self._buffer
        buffer += data
        start = 0
        try:
            while len(buffer) - start >= _HEADER_BYTES:
                body = start + _HEADER_BYTES
                size = int.from_bytes(buffer[start:body], "little")
                if size > self._bytes_max:
                    raise Garbled(f"a frame of {size:,} bytes; at most {self._bytes_max:,} are taken")
                if len(buffer) < body + size:
                    return
                start = body + size
                try:
                    frame = self._decoder.decode(bytes(buffer[body:start]))
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    raise Garbled(f"a frame that cannot be read: {error}") from error
                yield frame
        finally:
            del buffer[:start]
