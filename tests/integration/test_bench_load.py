"""The load generator against real servers that stall, refuse, cut off and lie."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest

from headrace.cli.bench.load import LoadReport, LoadSpec, measure_load
from headrace.cli.bench.open_loop import Load
from headrace.errors import BenchFailed
from tests.unit.cli.bench.local_server import OK, answer, serving

BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"
CLOSING = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\nok"


def spec(url: str, **changes) -> LoadSpec:
    fields = {
        "url": url,
        "path": "/status",
        "rate_per_s": 500.0,
        "seconds": 0.6,
        "warmup_s": 0.1,
        "connections": 4,
        "timeout_s": 10.0,
        "connect_timeout_s": 10.0,
    }
    return LoadSpec(**(fields | changes))


async def load(url: str, **changes) -> LoadReport:
    asked = spec(url, **changes)
    async with asyncio.timeout(asked.duration_s_max):
        return await Load(asked).run()


@pytest.fixture
def nobody() -> Iterator[str]:
    """The URL of a port on which nobody listens."""
    with socket.socket() as held:  # bound, so that nobody else takes it meanwhile
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@asynccontextmanager
async def watched() -> AsyncIterator[list[float]]:
    """By how many milliseconds this loop, which the load and its server share, was late whenever it was looked at."""
    loop, late_ms = asyncio.get_running_loop(), [0.0]

    async def watch() -> None:
        while True:
            began = loop.time()
            await asyncio.sleep(0.01)
            late_ms.append((loop.time() - began) * 1e3 - 10)

    watching = loop.create_task(watch())
    try:
        yield late_ms
    finally:
        watching.cancel()
        await asyncio.wait({watching})


async def test_every_request_is_sent_once_and_only_what_follows_the_warm_up_counts():
    """The offered rate arrives whole: 0.7 s at 500 a second, of which 0.6 s are reported."""
    async with serving(answer) as server:
        report = await load(server.url)

    assert server.requests == 350
    assert server.connections == 4
    assert (report.requests, report.ok, report.errors) == (300, 300, {})
    assert report.statuses == {200: 300}
    assert report.latency_ms.count == sum(report.histogram_ms.values()) == 300
    # At most what was due within the longest wait before the end was answered after it.
    late_max = 1 + 500 * report.latency_ms.max / 1e3
    assert (300 - late_max) / 0.6 <= report.achieved_per_s <= 500.1
    assert report.reconnects == 0


async def test_a_stall_counts_for_every_request_that_it_made_wait():
    """One stall of 500 ms is in the 99th percentile and the maximum; a closed-loop measure would have hidden it."""
    held: list[asyncio.Transport] = []

    def stall_once(server, transport, number, data):
        if number < 200 or server.released:
            transport.write(OK)
            return
        held.append(transport)
        if len(held) == 2:
            asyncio.get_running_loop().call_later(0.5, release)

    def release():
        server.released = True
        for transport in held:
            transport.write(OK)

    async with serving(stall_once) as server:
        server.released = False
        report = await load(server.url, seconds=2.0, warmup_s=0.0, connections=2)

    assert report.ok == report.requests == 1000
    # 250 requests were due during the stall; the two that were in flight are all that a closed loop would have seen.
    assert len(held) == 2
    assert report.latency_ms.max >= 500
    assert report.latency_ms.p99 >= 450
    assert report.latency_ms.p90 >= 200
    assert report.service_ms is not None
    assert report.service_ms.p99 < report.latency_ms.p99
    assert report.service_ms.p90 < 200


async def test_a_server_that_fails_fast_does_not_look_fast():
    """Answers other than 2xx are counted by status, and as slow as the time-out."""

    def busy_sometimes(server, transport, number, data):
        transport.write(BUSY if number % 10 == 0 else OK)

    async with serving(busy_sometimes) as server:
        report = await load(server.url, warmup_s=0.0)

    assert report.errors == {"status": 30}
    assert report.statuses == {200: 270, 503: 30}
    assert report.failed_share == pytest.approx(0.1)
    assert report.latency_ms.p50 < 10_000
    assert report.latency_ms.p95 == report.latency_ms.max >= 10_000


async def test_a_server_that_never_answers_yields_timeouts_and_not_a_hang():
    """Requests in flight and requests that wait for a connection all end at their time-out."""

    def silent(server, transport, number, data):
        pass

    async with serving(silent) as server, watched() as late_ms:
        report = await load(server.url, timeout_s=0.3, warmup_s=0.0)

    assert report.ok == 0
    assert report.errors == {"timeout": 300}
    assert 300 <= report.latency_ms.p50 < 1_000 + sum(late_ms)


async def test_a_server_that_nobody_started_yields_connect_errors_at_once(nobody):
    """Without any connection there is nothing to wait for: every request has failed to connect."""
    report = await load(nobody, rate_per_s=1_000.0, seconds=60.0, warmup_s=0.0, timeout_s=5.0, connect_timeout_s=0.3)

    assert report.ok == 0
    assert report.errors == {"connect": 60_000}
    assert report.latency_ms.p50 == 5_000


async def test_a_server_that_dies_under_load_yields_errors_by_kind():
    """Requests in flight are lost with their connections, those behind them find nobody to connect to."""

    def die(server, transport, number, data):
        if number == 100:
            server.close()
        elif number < 100:
            transport.write(OK)

    async with serving(die) as server:
        report = await load(server.url, warmup_s=0.0, connect_attempts_max=3)

    assert report.ok == 100
    assert 1 <= report.errors["disconnect"] <= 4
    assert report.errors["connect"] == 200 - report.errors["disconnect"]


async def test_load_goes_on_when_the_server_is_back():
    """A connection that was lost is opened again; only what was in flight has failed."""

    def cut_once(server, transport, number, data):
        if number == 100:
            for each in list(server.transports):
                each.abort()
        else:
            transport.write(OK)

    async with serving(cut_once) as server:
        report = await load(server.url, warmup_s=0.0)

    assert set(report.errors) == {"disconnect"}
    assert report.ok == 300 - report.errors["disconnect"]
    assert report.errors["disconnect"] <= 4
    assert report.reconnects == 4


async def test_a_server_that_closes_after_each_answer_is_followed():
    """`connection: close` is no error; the next request gets a new connection."""

    def close_each(server, transport, number, data):
        transport.write(CLOSING)
        transport.close()

    async with serving(close_each) as server:
        report = await load(server.url, rate_per_s=100.0, warmup_s=0.0)

    assert (report.ok, report.errors) == (60, {})
    assert server.connections >= 60


async def test_a_server_that_speaks_something_else_is_a_protocol_error():
    """Bytes that are not HTTP are an error of their own kind."""

    def gibberish(server, transport, number, data):
        transport.write(b"220 mail.example.org ESMTP\r\n\r\n")

    async with serving(gibberish) as server:
        report = await load(server.url, rate_per_s=50.0, seconds=0.2, warmup_s=0.0)

    assert report.errors == {"protocol": 10}


async def test_bytes_that_nobody_asked_for_close_the_connection():
    """An answer twice cannot be told from the answer to the next request, so the connection is not used again."""

    def answer_twice(server, transport, number, data):
        transport.write(OK)
        if number == 0:
            asyncio.get_running_loop().call_later(0.005, transport.write, OK)

    async with serving(answer_twice) as server:
        # Two seconds pass before the connection has its next turn.
        report = await load(server.url, rate_per_s=2.0, seconds=3.0, warmup_s=0.0)

    assert report.ok == 6
    assert report.reconnects == 1


async def test_each_request_can_have_a_body_of_its_own():
    """`{sequence}` numbers the requests of a run."""
    bodies: list[bytes] = []

    def keep(server, transport, number, data):
        bodies.append(data.partition(b"\r\n\r\n")[2])
        transport.write(OK)

    async with serving(keep) as server:
        await load(server.url, method="POST", body='{"execution_id": "run-{sequence}"}', warmup_s=0.0)

    assert len(set(bodies)) == 300
    assert min(bodies) == b'{"execution_id": "run-000000000000"}'
    assert max(bodies) == b'{"execution_id": "run-000000000299"}'


async def test_a_generator_that_falls_behind_says_so():
    """When the generator's own loop is late, the run is marked: the server is not to blame."""

    def hold_the_loop(server, transport, number, data):
        # The generator shares this loop, so its schedule slips as if its process had been starved of CPU.
        until = asyncio.get_running_loop().time() + 0.015
        while asyncio.get_running_loop().time() < until:
            server.spins = number
        transport.write(OK)

    async with serving(hold_the_loop) as server:
        report = await load(server.url, rate_per_s=100.0, seconds=0.5)

    assert report.lag_ms is not None
    assert report.lag_ms.p99 > 10
    assert report.generator_bound


async def test_the_generator_runs_in_a_process_of_its_own():
    """Asked through a pipe, it reports what the same run in this process would, and what it cost."""
    async with serving(answer) as server:
        report = await measure_load(spec(server.url))

    assert server.requests == 350
    assert (report.ok, report.errors) == (300, {})
    assert report.cpu_us_per_request > 0
    assert 0 < report.cpu_share < 1


async def test_a_generator_that_crashes_is_an_error_with_its_last_words():
    """What the process said on stderr is in the error."""
    with pytest.raises(BenchFailed, match="UnicodeEncodeError"):
        await measure_load(spec("http://127.0.0.1:1", headers={"x": "€"}))


async def test_a_cancelled_load_leaves_no_process(children):
    """Ctrl-C during a run ends the generator."""
    started = asyncio.Event()

    def note(server, transport, number, data):
        started.set()
        transport.write(OK)

    async with serving(note) as server, asyncio.TaskGroup() as tasks:
        run = tasks.create_task(measure_load(spec(server.url, seconds=60.0)))
        await started.wait()
        (generator,) = children()
        run.cancel()

    assert not generator.is_running()
