"""The client around the load: whatever the server does, an answer or an error that says what happened."""

import asyncio
import socket

import pytest

from headrace.cli.bench.client import Client
from headrace.clock import SystemClock
from headrace.errors import BenchFailed
from tests.unit.cli.bench.local_server import serving

CREATED = b"HTTP/1.1 201 Created\r\ncontent-length: 9\r\n\r\n" + b'{"id": 1}'


def client(url: str, **options) -> Client:
    return Client(url, clock=SystemClock(), **options)


async def test_a_request_carries_json_and_token_and_its_answer_is_decoded():
    """What goes out is what the API documents, what comes back is the body with its time."""
    requests: list[bytes] = []

    def create(server, transport, number, data):
        requests.append(data)
        transport.write(CREATED)

    now = SystemClock().monotonic
    async with serving(create) as server, client(server.url, token="open-sesame") as caller:
        asked_at = now()
        answer = await caller.request("POST", "/things", {"name": "x"}, expect=201)
        took_s = now() - asked_at
        await caller.request("POST", "/things", {"name": "y"}, expect=201)

    assert answer.json() == {"id": 1}
    assert 0 < answer.seconds <= took_s
    assert server.connections == 1
    assert b"\r\nauthorization: Bearer open-sesame\r\n" in requests[0]
    assert requests[1].endswith(b'{"name":"y"}')


async def test_another_status_than_expected_is_an_error_with_the_answer():
    """The server's own words are in the message."""

    def refuse(server, transport, number, data):
        transport.write(b"HTTP/1.1 422 No\r\ncontent-length: 11\r\n\r\nbad version")

    async with serving(refuse) as server, client(server.url) as caller:
        with pytest.raises(BenchFailed, match=r"POST /things was answered with 422 instead of 201.*bad version"):
            await caller.request("POST", "/things", {}, expect=201)


async def test_a_body_that_is_not_json_is_an_error():
    """A proxy's error page is not taken for an answer."""

    def page(server, transport, number, data):
        transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\n<html>")

    async with serving(page) as server, client(server.url) as caller:
        answer = await caller.request("GET", "/")

    with pytest.raises(BenchFailed, match="not JSON"):
        answer.json()


async def test_no_answer_is_an_error_after_the_time_out():
    """Every wait is bounded."""

    def silent(server, transport, number, data):
        pass

    async with serving(silent) as server, client(server.url) as caller:
        caller._timeout_s = 0.1  # from here on, so that connecting has its time
        with pytest.raises(BenchFailed, match="not answered within"):
            await caller.request("GET", "/")


async def test_a_cut_answer_is_an_error():
    """Half an answer is none."""

    def cut(server, transport, number, data):
        transport.write(CREATED[:-3])
        transport.close()

    async with serving(cut) as server, client(server.url) as caller:
        with pytest.raises(BenchFailed, match="before the end of its answer"):
            await caller.request("GET", "/", expect=201)


async def test_an_answer_without_an_end_is_an_error():
    """What one answer may hold is limited."""

    def flood(server, transport, number, data):
        transport.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 17 * 1024 * 1024)

    async with serving(flood) as server, client(server.url) as caller:
        with pytest.raises(BenchFailed, match="larger than"):
            await caller.request("GET", "/")


async def test_nobody_listening_is_an_error():
    """The address is in the message."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

        async with asyncio.timeout(20):
            with pytest.raises(BenchFailed, match=f"No connection to 127.0.0.1:{port}"):
                await client(f"http://127.0.0.1:{port}").__aenter__()
