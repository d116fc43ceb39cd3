"""Answers as they go over the wire: a small one in one piece, a slow one as far as it is."""

import asyncio

import pytest
import uvicorn

from headrace.server.protocol import Protocol

ASK = b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 2\r\n%s\r\nab"
HEAD_LINE = b"HTTP/1.1 200 OK\r\n"


class Wire:
    """A transport that keeps what is written, piece by piece."""

    def __init__(self):
        self.pieces = []
        self.is_closed = False

    def write(self, data):
        self.pieces.append(bytes(data))

    def close(self):
        self.is_closed = True

    def is_closing(self):
        return self.is_closed

    def get_extra_info(self, name, default=None):
        return default

    def pause_reading(self):
        """Nothing is read."""

    resume_reading = pause_reading


def connected(app):
    """A connection to the application, and its wire."""
    config = uvicorn.Config(app, http=Protocol, lifespan="off", log_config=None, ws="none")
    config.load()
    protocol, wire = Protocol(config, uvicorn.server.ServerState(), {}), Wire()
    protocol.connection_made(wire)
    return protocol, wire


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


def answering(*parts, pause=None):
    """An application that answers with a body in these parts, after a pause."""

    async def app(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]})
        if pause is not None:
            await pause.wait()
        for index, part in enumerate(parts):
            await send({"type": "http.response.body", "body": part, "more_body": index + 1 < len(parts)})

    return app


async def test_a_small_answer_is_one_piece():
    """Head and body, for each of several requests on one connection."""
    protocol, wire = connected(answering(b"answer"))
    for count in (1, 2):
        protocol.data_received(ASK % b"")
        await until(lambda count=count: len(wire.pieces) >= count)
        assert len(wire.pieces) == count
        assert wire.pieces[-1].startswith(HEAD_LINE)
        assert wire.pieces[-1].endswith(b"\r\n\r\nanswer")


async def test_pipelined_answers_keep_their_order():
    """Two requests that arrive at once are two whole answers."""
    protocol, wire = connected(answering(b"answer"))
    protocol.data_received(ASK % b"" + ASK % b"")
    await until(lambda: len(wire.pieces) >= 2)
    assert [piece.count(HEAD_LINE) for piece in wire.pieces] == [1, 1]
    assert all(piece.endswith(b"answer") for piece in wire.pieces)


async def test_the_head_does_not_wait_for_a_slow_body():
    """It is on the way in the next turn of the loop, and what follows goes out as it comes."""
    pause = asyncio.Event()
    protocol, wire = connected(answering(b"ans", b"wer", pause=pause))
    protocol.data_received(ASK % b"")
    await until(lambda: wire.pieces)
    assert wire.pieces[0].endswith(b"\r\n\r\n")
    pause.set()
    await until(lambda: len(wire.pieces) == 3)
    assert wire.pieces[1:] == [b"ans", b"wer"]


async def test_a_client_that_waits_for_leave_to_send_gets_it():
    """100 Continue is not held, nor taken for the head of the answer."""
    protocol, wire = connected(answering(b"answer"))
    protocol.data_received((ASK % b"expect: 100-continue\r\n")[:-2])
    await until(lambda: wire.pieces)
    assert wire.pieces == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    protocol.data_received(b"ab")
    await until(lambda: len(wire.pieces) == 2)
    assert wire.pieces[1].endswith(b"\r\n\r\nanswer")


@pytest.mark.parametrize(
    ("request_bytes", "end"),
    [
        ((ASK % b"").replace(b"POST", b"HEAD"), b"\r\n\r\n"),
        (ASK % b"connection: close\r\n", b"\r\n\r\nanswer"),
    ],
    ids=["HEAD", "close"],
)
async def test_an_answer_is_written_to_its_end(request_bytes, end):
    """One without a body, and one after which the connection is closed."""
    protocol, wire = connected(answering(b"answer"))
    protocol.data_received(request_bytes)
    await until(lambda: wire.pieces)
    assert b"".join(wire.pieces).startswith(HEAD_LINE)
    assert b"".join(wire.pieces).endswith(end)
    assert wire.is_closed is (b"close" in request_bytes)


async def test_what_is_no_http_is_answered_and_closed():
    """The answer that the protocol gives by itself leaves before the connection is closed."""
    protocol, wire = connected(answering(b"answer"))
    protocol.data_received(b"\x00 no request\r\n\r\n")
    assert wire.is_closed
    assert b"".join(wire.pieces).startswith(b"HTTP/1.1 400 ")
