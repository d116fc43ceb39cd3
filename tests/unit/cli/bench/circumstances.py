"""Results as a run would leave them, without a run."""

from headrace.cli.bench.context import BenchConfig, Context, LoadRecord
from headrace.cli.bench.distribution import distribution
from headrace.cli.bench.load import LoadReport
from headrace.cli.bench.machine import Machine
from headrace.cli.bench.results import Results
from headrace.cli.bench.scenario import Measurement, Scenario
from headrace.cli.bench.targets import API_P50, API_P99, SERVER_MEMORY


async def unused(context: Context) -> list[Measurement]:
    raise AssertionError("this scenario is not run")


READS = Scenario(name="reads", group="api", title="reads", targets=(API_P50, API_P99), run=unused)
MEMORY = Scenario(name="memory", group="memory", title="memory", targets=(SERVER_MEMORY,), run=unused)
MACHINE = Machine(
    date="2026-01-02T03:04:05+00:00",
    cpu="Difference Engine",
    cores=2,
    memory_bytes=8_000_000_000,
    load_average=0.25,
    platform="Brass",
    python="CPython 3.11.0",
    versions={"headrace": "0.1.0"},
    build="plain",
    commit=None,
)


def report(latencies_ms: list[float], **changes) -> LoadReport:
    """A run in which each of these latencies was measured once."""
    fields = {
        "method": "GET",
        "path": "/",
        "connections": 1,
        "offered_per_s": 100.0,
        "achieved_per_s": 100.0,
        "requests": len(latencies_ms),
        "ok": len(latencies_ms),
        "errors": {},
        "statuses": {200: len(latencies_ms)},
        "latency_ms": distribution(latencies_ms),
        "service_ms": None,
        "lag_ms": distribution([0.1]),
        "histogram_ms": {},
        "reconnects": 0,
        "cpu_us_per_request": 15.0,
        "cpu_share": 0.1,
        "generator_bound": False,
    }
    return LoadReport(**(fields | changes))


def results() -> Results:
    """One target met, one missed, one that could not be measured, one that nobody measures."""
    found = Results(machine=MACHINE, config=BenchConfig(token="secret-token"), unmeasured=(API_P99,))
    found.add(READS, [Measurement(target=API_P50, case="1,000/s", values=(12.25, 11.0, 14.5))])
    found.add(READS, [Measurement(target=API_P99, case="1,000/s", values=(700.0, 650.0, 720.0), note="3 x timeout")])
    found.fail(MEMORY, "The server went away.\nIts output ended with:\nTraceback")
    found.records.append(LoadRecord(scenario="reads", case="1,000/s", report=report([1.0, 2.0])))
    return found
