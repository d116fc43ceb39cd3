"""The proxy that fails on demand, between a plain client and a server that echoes."""

import asyncio
import errno
import socket
from collections.abc import AsyncIterator

import pytest

from headrace.clock import SystemClock
from headrace.testing import FakeClock, TcpProxy
from tests.redis_servers import until

Pair = tuple[asyncio.StreamReader, asyncio.StreamWriter]
CLOCK = SystemClock()


@pytest.fixture
async def heard() -> list[bytes]:
    """What the server got."""
    return []


@pytest.fixture
async def upstream(heard: list[bytes]) -> AsyncIterator[str]:
    echoing: set[asyncio.Task[None]] = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        echoing.add(asyncio.current_task())
        try:
            while data := await reader.read(65536):
                heard.append(data)
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await until(lambda: all(task.done() for task in echoing), "the server has noticed that its clients are gone")


@pytest.fixture
async def proxy(upstream: str) -> AsyncIterator[TcpProxy]:
    async with TcpProxy(upstream) as proxy:
        yield proxy


@pytest.fixture
async def client(proxy: TcpProxy) -> AsyncIterator[Pair]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    yield reader, writer
    writer.close()


async def ask(client: Pair, data: bytes) -> bytes:
    reader, writer = client
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), 10)


async def test_it_passes_on_what_it_is_not_told_to_spoil(proxy, client):
    """Bytes go both ways unchanged, however many."""
    data = bytes(range(256)) * 4000
    assert await ask(client, data) == data
    assert (proxy.connections, proxy.accepted) == (1, 1)
    assert proxy.to_client.bytes_passed == proxy.to_server.bytes_passed == len(data)


async def test_the_end_of_a_connection_is_passed_on(proxy, client):
    """When the client is done, the server learns it, and its last words still arrive."""
    reader, writer = client
    writer.write(b"last")
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 10) == b"last"
    await until(lambda: proxy.connections == 0, "the connection has ended")


async def test_deaf_holds_up_and_heal_delivers(proxy, client, heard):
    """Nothing passes and nothing is lost."""
    proxy.deaf()
    reply = asyncio.get_running_loop().create_task(ask(client, b"hello"))
    await asyncio.wait([reply], timeout=0.05)
    assert not reply.done()
    assert heard == []
    proxy.heal()
    assert await reply == b"hello"


async def test_deaf_in_one_direction_loses_replies_alone(proxy, client, heard):
    """The request arrives; after a cut nobody learns its outcome."""
    proxy.deaf(to_server=False)
    client[1].write(b"hello")
    await until(lambda: heard == [b"hello"], "the request arrives")
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(client[0].read(1), 10)
    assert proxy.to_client.bytes_passed == 0


async def test_a_cut_resets_and_new_connections_pass(proxy, client):
    """Connections that are there end with a reset, later ones work."""
    await ask(client, b"x")
    proxy.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(client[0].read(1), 10)
    await until(lambda: proxy.connections == 0, "the connection has ended")
    again = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await ask(again, b"y") == b"y"
    again[1].close()


async def test_a_cut_after_some_bytes_tears_a_reply(proxy, client):
    """So many more bytes arrive, and not one more."""
    assert await ask(client, b"whole") == b"whole"
    proxy.cut(after_bytes=7)
    client[1].write(b"0123")
    await until(lambda: proxy.to_client.bytes_passed == 9, "the first part has passed")
    client[1].write(b"456789")
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await asyncio.wait_for(client[0].readexactly(10), 10)
    assert proxy.to_client.bytes_passed == 12


async def test_a_delay_takes_its_time_and_keeps_the_order(upstream):
    """On a fake clock nothing arrives before its time, and what was sent together arrives together."""
    clock = FakeClock()
    async with TcpProxy(upstream, clock=clock) as proxy:
        client = await asyncio.open_connection("127.0.0.1", proxy.port)
        proxy.delay(5.0)
        replies = asyncio.get_running_loop().create_task(client[0].readexactly(4))
        client[1].write(b"ab")
        await until(lambda: clock.sleepers == 1, "the first waits")
        client[1].write(b"cd")
        clock.advance(5.0)
        await until(lambda: proxy.to_server.bytes_passed >= 2, "the first has reached the server")
        while not replies.done():
            clock.advance(1.0)
            await asyncio.sleep(0.001)
        assert await replies == b"abcd"
        assert clock.monotonic() >= 1010.0
        client[1].close()


async def test_stopped_it_refuses_and_started_it_is_back(proxy, client):
    """The port stays the same, so a client that reconnects finds it."""
    await ask(client, b"x")
    port = proxy.port
    await proxy.stop()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    await proxy.start()
    assert proxy.port == port
    again = await asyncio.open_connection("127.0.0.1", port)
    assert await ask(again, b"y") == b"y"
    again[1].close()


async def test_while_it_is_stopped_its_port_stays_its_own(proxy):
    """Nobody else is given the port meanwhile, or `start` could not listen there again."""
    await proxy.stop()

    with socket.socket() as other, pytest.raises(OSError, match="in use") as refusal:
        other.bind(("127.0.0.1", proxy.port))

    assert refusal.value.errno == errno.EADDRINUSE


async def test_a_stop_that_is_given_up_leaves_nobody_listening(proxy, client):
    """Whoever is cancelled in it finds the port free to listen on again."""
    stopping = asyncio.get_running_loop().create_task(proxy.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    await asyncio.wait([stopping])

    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", proxy.port)
    await proxy.start()
    again = await asyncio.open_connection("127.0.0.1", proxy.port)
    assert await ask(again, b"x") == b"x"
    again[1].close()


@pytest.mark.parametrize("turns", range(8))
async def test_a_stop_resets_a_connection_that_is_just_being_accepted(upstream, turns):
    """However far the loop has come with a new connection, it does not outlive the stop."""
    loop = asyncio.get_running_loop()
    async with TcpProxy(upstream) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.setblocking(False)
            for _ in range(turns):
                await asyncio.sleep(0)

            await proxy.stop()

            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(loop.sock_recv(client, 1), 10)
        assert proxy.connections == 0


async def test_a_server_that_is_not_there_resets_the_client():
    """Without an upstream the connection ends at once."""
    async with TcpProxy("127.0.0.1:1") as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(reader.read(1), 10)
        writer.close()
