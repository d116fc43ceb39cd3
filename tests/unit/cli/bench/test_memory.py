import msgspec
import pytest

from headrace.cli.bench.context import BenchConfig, Context
from headrace.cli.bench.memory import measure_memory
from headrace.cli.bench.scenario import State
from headrace.clock import SystemClock
from headrace.errors import BenchFailed
from tests.unit.cli.bench.local_server import LocalServer, serving


def context(url: str) -> Context:
    async def server() -> str:
        return url

    return Context(
        scenario="server-memory",
        config=BenchConfig(rounds=1, seconds=0.1, warmup_s=0.0, connections=2),
        clock=SystemClock(),
        run_id="test",
        server=server,
        say=lambda _: None,
        records=[],
    )


def naming(health: object):
    """A server that takes deployments and executions, and answers health checks with this."""

    def behave(server: LocalServer, transport, number: int, data: bytes) -> None:
        if b"/deploy " in data:
            transport.write(b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}")
        else:
            body = msgspec.json.encode(health)
            transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    return behave


async def test_the_memory_of_another_machine_is_not_measured():
    """Pids mean nothing on another machine, and that is what the note says."""
    (measurement,) = await measure_memory(context("http://192.0.2.1:80"))

    assert measurement.state is State.NOT_MEASURED
    assert measurement.note == "the server runs on another machine"


async def test_workers_that_are_gone_are_not_measured():
    """A pid that nobody has, as inside of a container, is not taken for a worker without memory."""
    async with serving(naming({"workers": [{"pid": 4_194_305}]})) as server:
        (measurement,) = await measure_memory(context(server.url))

    assert measurement.state is State.NOT_MEASURED
    assert "4194305" in measurement.note


async def test_a_health_check_without_pids_is_an_error():
    """What the scenario needs is named, instead of measuring nothing."""
    async with serving(naming({"workers": [{"name": "worker-0"}]})) as server:
        with pytest.raises(BenchFailed, match="does not name its workers' pids"):
            await measure_memory(context(server.url))
