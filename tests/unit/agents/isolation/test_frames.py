"""Frames between host and worker, cut from a stream that the other side may have forged."""

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.agents.isolation import frames
from headrace.agents.isolation.frames import Done, FromWorker, Garbled, Incoming, Progressed

BYTES_MAX = 1000


def incoming() -> Incoming[FromWorker]:
    return Incoming(frames.FROM_WORKER, bytes_max=BYTES_MAX)


def raw(*fields: object) -> bytes:
    body = msgspec.msgpack.encode(fields)
    return len(body).to_bytes(4, "little") + body


@given(st.integers(1, 40))
def test_frames_survive_any_cutting(size: int) -> None:
    """However the stream is cut, the same frames come out."""
    sent = [Done(1, "completed", b"[1]", None, 0.5, 0), Progressed(1, 1, 2, "half"), frames.Hardened()]
    stream = b"".join(map(frames.framed, sent))
    cutter = incoming()

    received = [frame for at in range(0, len(stream), size) for frame in cutter.feed(stream[at : at + size])]

    assert received == sent


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_frames_or_garbled(data: bytes) -> None:
    """No byte string raises anything else, and what is kept of it stays within the bound."""
    cutter = incoming()
    try:
        for frame in cutter.feed(data):
            assert isinstance(frame, frames.Frame)
    except Garbled:
        return


def test_a_length_above_the_bound_is_refused_before_the_body_comes() -> None:
    """Four bytes are enough to know; nothing is kept for them."""
    with pytest.raises(Garbled, match="1,001 bytes; at most 1,000"):
        list(incoming().feed((BYTES_MAX + 1).to_bytes(4, "little")))


@pytest.mark.parametrize(
    "forged",
    [
        raw("Done", -1, "completed", b"1", None, 0.0, 0),
        raw("Done", 1, "timeout", None, None, 0.0, 0),
        raw("Done", 1, "completed", "text", None, 0.0, 0),
        raw("Done", 1, "failed", None, "x" * (frames.ERROR_CHARACTERS_MAX + 1), 0.0, 0),
        raw("Done", 1, "failed", None, None, -1.0, 0),
        raw("Done", 1, "failed", None, None, math.inf, 0),
        raw("Done", 1, "failed", None, None, math.nan, 0),
        raw("Done", 1, "failed", None, None, 0.0, 2**63),
        raw("Progressed", 1, 2**60, 0, ""),
        raw("Emitted", 1, [b"1"] * (frames.EVENTS_BATCH_MAX + 1)),
        raw("Progressed", 1, "two", 0, ""),
        raw("Printed", 1, "stdin", "x"),
        raw("Load", "a", "1", "t", "", "Agent", 1),
        raw("Unknown"),
    ],
)
def test_a_frame_of_another_shape_is_garbled(forged: bytes) -> None:
    """Types, ranges, lengths and statuses are checked on the way in; what only the host may say is not taken."""
    with pytest.raises(Garbled):
        list(incoming_wide().feed(forged))


def test_frames_that_were_not_taken_come_again() -> None:
    """Who listens may stop between two frames and go on later."""
    sent = [Progressed(1, done, 3, "") for done in range(3)]
    cutter = incoming()
    first = cutter.feed(b"".join(map(frames.framed, sent)))

    heard = [next(first)]
    first.close()

    assert [*heard, *cutter.feed(b"")] == sent


@pytest.mark.parametrize(
    ("text", "is_json"),
    [
        (b'{"a":[1,2.5e99,"text"]}', True),
        (b'"1e400, and ' + b"9" * 400 + b' digits in a text"', True),
        (b"1e400", False),
        (b"1E+0400", False),
        (b"9" * 250 + b"e99", False),
        (b"{]", False),
        (b'"\xff"', False),
        (b'"\\ud800"', False),
        (b"[" * 5000 + b"]" * 5000, False),
        (b"1" * 1001, False),
        (None, False),
    ],
)
def test_json_is_what_everybody_can_read(text: bytes | None, is_json: bool) -> None:
    """No number above a float, no half character, no depth that ends a reader, and no more than was permitted."""
    assert frames.is_json(text, bytes_max=1000) is is_json


def incoming_wide() -> Incoming[FromWorker]:
    return Incoming(frames.FROM_WORKER, bytes_max=1 << 20)


def test_frames_before_a_garbled_one_are_delivered() -> None:
    """What was said well is heard, then the rest is refused."""
    stream = incoming().feed(frames.framed(frames.Loaded(True)) + raw("Unknown"))

    assert next(stream) == frames.Loaded(True)
    with pytest.raises(Garbled):
        next(stream)
