"""Servers that speak nonsense: the shared tier is left alone, and nobody is harmed."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import hiredis
import pytest

from headrace.cache import Cache, RemoteConfig
from headrace.events import TierUnavailable
from tests.redis_servers import CLOCK, Witness

HELLO = b"%1\r\n$5\r\nproto\r\n:3\r\n"
OK = b"+OK\r\n"

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture
async def listen() -> AsyncIterator[Callable[[bytes], Awaitable[str]]]:
    """A server that greets as Redis does and answers each command after that with the same bytes; its URL."""
    servers: list[asyncio.Server] = []

    async def start(answer: bytes) -> str:
        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            commands = hiredis.Reader()
            try:
                while data := await reader.read(65536):
                    commands.feed(data)
                    while (command := commands.gets()) is not False:
                        writer.write(HELLO if b"HELLO" in command else OK if b"SETNAME" in command else answer)
                    await writer.drain()
            except ConnectionError:
                return
            finally:
                writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        servers.append(server)
        return f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"

    yield start
    for server in servers:
        server.close()
        await server.wait_closed()


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x00\xff\x00\xff",
        b"*-5\r\n",
        b"+OK\r\n" * 50,
        b"$10\r\nabc",
        b"-ERR no such thing\r\n",
        b":7\r\n",
        b"+OK\r\n",
        b"$17\r\nc123456789abcdef0\r\n",
        b"*2\r\n+a\r\n+b\r\n",
        b"_\r\n",
        b">2\r\n+invalidate\r\n_\r\n",
        b">3\r\n+other\r\n+push\r\n+message\r\n",
        b"",
    ],
    ids=[
        *("http", "noise", "length", "too-many", "cut", "error", "number", "fine", "generation", "array", "nil"),
        *("flush", "push", "silence"),
    ],
)
@pytest.mark.parametrize("memory", [True, False], ids=["memory", "alone"])
async def test_nonsense_is_survived(listen, answer, memory):
    """Whatever the server answers, callers get their loads within the timeouts and no exception."""
    url = await listen(answer)
    remote = RemoteConfig(url=url, timeout=0.1, connect_timeout=0.3, reconnect_wait_max=0.05, lease_wait_max=0.2)
    options = {} if memory else {"memory": None}
    started = CLOCK.monotonic()
    async with Cache(remote=remote, observer=Witness(), **options) as cache:
        assert await cache.get("k", "miss") == "miss"
        assert await cache.get_or_load("k", lambda: 1) == 1
        await cache.set("k", 2)
        assert await cache.get_many(["k", "l"]) in ({}, {"k": 2})
        await cache.delete("k")
        await cache.invalidate_tag("t")
        await cache.invalidate_pattern("k*")
        await cache.clear()
    assert CLOCK.monotonic() - started < 20  # less than any timeout that is not given here


async def test_a_port_without_redis_is_told(witness):
    """Nothing listens: the observer learns why, the caller only waits for the first attempt."""
    async with Cache(remote=RemoteConfig(url="redis://127.0.0.1:1/0"), memory=None, observer=witness) as cache:
        assert await cache.get_or_load("k", lambda: 1) == 1
    assert "127.0.0.1:1" in witness.seen(TierUnavailable)[0].tier
