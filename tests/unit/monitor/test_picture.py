"""The snapshot: what is told of the last seconds, and what is left unknown."""

import pytest

from headrace.monitor.catalogue import (
    CACHE_AVAILABLE,
    CACHE_ENTRIES,
    EXECUTIONS_RUNNING,
    WORKER_CPU,
    WORKER_IN_FLIGHT,
    WORKER_LAG,
    WORKER_MEMORY,
    WORKER_START,
)
from headrace.monitor.histogram import Distribution, Histogram
from headrace.monitor.picture import lags, latency_of, snapshot_of, summary_of
from headrace.monitor.slots import Contents, Folded, Series, SlotReading
from headrace.monitor.snapshot import Host
from headrace.monitor.totals import EndpointKey, EndpointTotals, TierTotals, Totals, WorkerKey
from headrace.monitor.windows import Window

HOST = Host(None, 1.0, None, None, None, None, None, None)
NOTHING = Totals(identity=1)


def recorded(*seconds):
    histogram = Histogram()
    for duration in seconds:
        histogram.record(duration)
    return histogram.distribution()


def folded(*gauges):
    """A fold of living processes with these gauges."""
    slots = tuple(
        SlotReading(number, 100 + number, 1, Contents(), {Series(*key): value for key, value in one.items()}, 0)
        for number, one in enumerate(gauges)
    )
    return Folded(1, Contents(), slots)


def painted(totals, *gauges, seconds=10.0, lag=None):
    return snapshot_of(Window(seconds, totals, lag or {}), folded(*gauges), HOST, 5.0)


def test_a_quiet_system_is_quiet_and_unknown():
    """No requests: rates are zero, because that is known; error rate, means and quantiles are not."""
    snapshot = painted(NOTHING)

    assert (snapshot.at, snapshot.interval_s, snapshot.requests_per_s, snapshot.connections) == (5.0, 10.0, 0.0, 0)
    assert snapshot.error_rate is None
    assert snapshot.latency.mean_ms is None
    assert (snapshot.endpoints, snapshot.tiers, snapshot.workers) == ((), (), ())


def test_rates_are_per_second_of_the_window():
    """Twenty answers of which five failed, in ten seconds."""
    endpoint = EndpointTotals(20, 5, recorded(*[0.15] * 20))

    snapshot = painted(Totals(identity=1, endpoints={EndpointKey("GET", "/a"): endpoint}))

    assert (snapshot.requests_per_s, snapshot.errors_per_s, snapshot.error_rate) == (2.0, 0.5, 0.25)
    assert snapshot.latency.count == 20
    assert snapshot.latency.mean_ms == pytest.approx(150.0)
    assert snapshot.latency.p50_ms == pytest.approx(150.0, rel=0.011)
    assert snapshot.latency.p95_ms is None


def test_promises_are_counted_exactly():
    """How many took longer than 100, 200, 500 and 1000 ms."""
    latency = latency_of(recorded(0.1, 0.11, 0.25, 0.6, 0.7, 3.0))

    assert (latency.over_100_ms, latency.over_200_ms, latency.over_500_ms, latency.over_1000_ms) == (5, 4, 3, 1)


def test_endpoints_are_sorted_by_the_time_spent_on_them():
    """What to optimise first is on top, and an endpoint without a request is not listed."""
    endpoints = {
        EndpointKey("GET", "/often"): EndpointTotals(100, 0, recorded(*[0.001] * 100)),
        EndpointKey("POST", "/slow"): EndpointTotals(2, 0, recorded(1.0, 2.0)),
        EndpointKey("GET", "/idle"): EndpointTotals(),
    }

    snapshot = painted(Totals(identity=1, endpoints=endpoints))

    assert [(row.method, row.route) for row in snapshot.endpoints] == [("POST", "/slow"), ("GET", "/often")]
    assert snapshot.endpoints[0].total_s == pytest.approx(3.0)


def test_memory_entries_add_up_and_remote_entries_do_not():
    """Every worker has a memory of its own; the remote tier is one, whoever reports it."""
    totals = Totals(identity=1, tiers={"memory": TierTotals(90, 10), "remote": TierTotals(0, 10)})
    one, two = (
        {(CACHE_ENTRIES, (("tier", tier),)): n for tier, n in (("memory", 5.0), ("remote", r))} for r in (70.0, 71.0)
    )

    memory, remote = painted(totals, one, two).tiers

    assert (memory.tier, memory.hit_rate, memory.entries, memory.hits_per_s) == ("memory", 0.9, 10, 9.0)
    assert (remote.tier, remote.hit_rate, remote.entries, remote.misses_per_s) == ("remote", 0.0, 71, 1.0)


def test_a_tier_is_available_when_every_process_can_reach_it():
    """One worker that lost its connection makes the tier unavailable; nobody complaining makes it available."""
    totals = Totals(identity=1, tiers={"remote": TierTotals(0, 0)})
    up, down = ({(CACHE_AVAILABLE, (("tier", "remote"),)): state} for state in (1.0, 0.0))

    assert painted(totals).tiers[0].available
    assert painted(totals, up, up).tiers[0].available
    assert not painted(totals, up, down).tiers[0].available
    assert painted(totals).tiers[0].hit_rate is None
    assert painted(totals).tiers[0].entries is None


def test_executions_are_told_by_how_they_end():
    """Completed, late, and everything else that went wrong."""
    totals = Totals(
        identity=1,
        executions={"completed": 60, "timeout": 10, "failed": 20, "cancelled": 10},
        runs=recorded(*[0.2] * 100),
    )

    agents = painted(totals, {(EXECUTIONS_RUNNING, ()): 3.0}, {(EXECUTIONS_RUNNING, ()): 4.0}).agents

    assert (agents.completed_per_s, agents.timeouts_per_s, agents.failed_per_s) == (6.0, 1.0, 3.0)
    assert agents.running == 7
    assert agents.started_per_s == 10.0
    assert agents.run_latency.p50_ms == pytest.approx(200.0, rel=0.011)


def test_starts_are_those_that_were_counted():
    """Where starts are counted they are told, and not guessed from the ends."""
    totals = Totals(identity=1, executions={"completed": 10}, executions_started=30)

    assert painted(totals).agents.started_per_s == 3.0


def test_workers_are_the_processes_that_serve():
    """A process without a start of service is not a worker; what a worker does not know of itself is None."""
    worker = {
        (WORKER_START, ()): 77.0,
        (WORKER_CPU, ()): 0.5,
        (WORKER_MEMORY, ()): 4096.0,
        (WORKER_IN_FLIGHT, ()): 2.0,
        (WORKER_LAG, ()): 0.003,
    }
    totals = Totals(identity=1, worker_requests={WorkerKey(0, 1): 50})

    snapshot = painted(totals, worker, {(WORKER_START, ()): 78.0}, {}, lag={WorkerKey(0, 1): 0.02})

    first, second = snapshot.workers
    assert (first.slot, first.pid, first.started_at, first.requests_per_s) == (0, 100, 77.0, 5.0)
    assert (first.cpu_percent, first.memory_bytes, first.loop_lag_ms) == (50.0, 4096, 20.0)
    assert (second.requests_per_s, second.cpu_percent, second.memory_bytes, second.loop_lag_ms) == (
        0.0,
        None,
        None,
        None,
    )
    assert snapshot.connections == 2
    assert lags(folded(worker, {})) == {WorkerKey(0, 1): 0.003}


def test_a_summary_of_nothing_says_so():
    """Covered seconds are zero, counts are zero, and the rest is unknown."""
    summary = summary_of(60, None, (0.0, {}), 9.0)

    assert (summary.at, summary.minutes, summary.covered_s, summary.requests) == (9.0, 60, 0.0, 0)
    assert (summary.error_rate, summary.hit_rate, summary.cpu_percent_max, summary.endpoints) == (None, None, None, ())
    assert summary.latency == latency_of(Distribution())
