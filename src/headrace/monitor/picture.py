"""Paints the Snapshot and the Summary from what was counted. Pure."""

from collections.abc import Mapping

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
from headrace.monitor.histogram import Distribution
from headrace.monitor.slots import Folded, Series, SlotReading
from headrace.monitor.snapshot import Agents, Endpoint, Host, Latency, Snapshot, Summary, Tier, Worker
from headrace.monitor.totals import EndpointKey, EndpointTotals, TierTotals, Totals, WorkerKey
from headrace.monitor.windows import Step, Window, milliseconds

COMPLETED, TIMEOUT = "completed", "timeout"
"""How an execution ends well, and how it ends late; every other ending is a failure."""


def latency_of(distribution: Distribution) -> Latency:
    """Response times as they are told."""
    count = distribution.count
    return Latency(
        count=count,
        mean_ms=distribution.sum_s / count * 1e3 if count else None,
        p50_ms=milliseconds(distribution.quantile(0.5)),
        p95_ms=milliseconds(distribution.quantile(0.95)),
        p99_ms=milliseconds(distribution.quantile(0.99)),
        p999_ms=milliseconds(distribution.quantile(0.999)),
        over_100_ms=distribution.over(0.1),
        over_200_ms=distribution.over(0.2),
        over_500_ms=distribution.over(0.5),
        over_1000_ms=distribution.over(1.0),
    )


def endpoints_of(endpoints: Mapping[EndpointKey, EndpointTotals], seconds: float) -> tuple[Endpoint, ...]:
    """The endpoints that answered something within so many seconds, by the time spent on them."""
    rows = [
        Endpoint(
            method=key.method,
            route=key.route,
            requests_per_s=endpoint.requests / seconds,
            errors_per_s=endpoint.errors / seconds,
            total_s=endpoint.latency.sum_s,
            latency=latency_of(endpoint.latency),
        )
        for key, endpoint in endpoints.items()
        if endpoint.requests
    ]
    return tuple(sorted(rows, key=lambda row: (-row.total_s, row.method, row.route)))


def lags(folded: Folded) -> dict[WorkerKey, float]:
    """How late each worker's event loop woke since its last tick."""
    series = Series(WORKER_LAG)
    return {WorkerKey(s.slot, s.generation): s.gauges[series] for s in folded.slots if series in s.gauges}


def snapshot_of(window: Window, folded: Folded, host: Host, at: float) -> Snapshot:
    """The one picture of the last seconds."""
    totals, seconds = window.totals, window.seconds
    requests, errors = totals.requests, totals.errors
    return Snapshot(
        at=at,
        interval_s=seconds,
        requests_per_s=requests / seconds,
        errors_per_s=errors / seconds,
        error_rate=errors / requests if requests else None,
        connections=int(sum(gauge_values(folded, WORKER_IN_FLIGHT))),
        latency=latency_of(totals.latency),
        endpoints=endpoints_of(totals.endpoints, seconds),
        tiers=tuple(_tier(name, tier, folded, seconds) for name, tier in sorted(totals.tiers.items())),
        agents=_agents(totals, folded, seconds),
        workers=tuple(_worker(slot, window) for slot in folded.slots if Series(WORKER_START) in slot.gauges),
        host=host,
    )


def gauge_values(folded: Folded, name: str, **labels: str) -> list[float]:
    """What each living process says that this gauge is."""
    series = Series(name, tuple(sorted(labels.items())))
    return [slot.gauges[series] for slot in folded.slots if series in slot.gauges]


def _tier(name: str, totals: TierTotals, folded: Folded, seconds: float) -> Tier:
    lookups = totals.hits + totals.misses
    entries = gauge_values(folded, CACHE_ENTRIES, tier=name)
    # Every process has a memory of its own, and all of them look at the same remote tier.
    held = sum(entries) if name == "memory" else max(entries, default=0.0)
    return Tier(
        tier=name,
        hits_per_s=totals.hits / seconds,
        misses_per_s=totals.misses / seconds,
        hit_rate=totals.hits / lookups if lookups else None,
        entries=int(held) if entries else None,
        available=all(gauge_values(folded, CACHE_AVAILABLE, tier=name)),
    )


def _agents(totals: Totals, folded: Folded, seconds: float) -> Agents:
    ended = sum(totals.executions.values())
    completed, late = totals.executions.get(COMPLETED, 0), totals.executions.get(TIMEOUT, 0)
    return Agents(
        running=int(sum(gauge_values(folded, EXECUTIONS_RUNNING))),
        # Where nobody counts starts, ends stand for them: over a window they differ by what runs longer than it.
        started_per_s=(totals.executions_started or ended) / seconds,
        completed_per_s=completed / seconds,
        failed_per_s=(ended - completed - late) / seconds,
        timeouts_per_s=late / seconds,
        run_latency=latency_of(totals.runs),
    )


def _worker(slot: SlotReading, window: Window) -> Worker:
    key = WorkerKey(slot.slot, slot.generation)
    cpu, memory = slot.gauges.get(Series(WORKER_CPU)), slot.gauges.get(Series(WORKER_MEMORY))
    return Worker(
        slot=slot.slot,
        pid=slot.pid,
        started_at=slot.gauges[Series(WORKER_START)],
        requests_per_s=window.totals.worker_requests.get(key, 0) / window.seconds,
        cpu_percent=None if cpu is None else cpu * 100.0,
        memory_bytes=None if memory is None else int(memory),
        loop_lag_ms=milliseconds(window.lag_s.get(key)),
    )


def summary_of(
    minutes: int, step: Step | None, endpoints: tuple[float, Mapping[EndpointKey, EndpointTotals]], at: float
) -> Summary:
    """What happened in the last minutes; with no step, that nothing is known of them."""
    if step is None:
        step = Step(seconds=0.0, requests=0, errors=0, latency=Distribution().pack(), hits=0, misses=0, executions=0)
    lookups = step.hits + step.misses
    seconds, by_endpoint = endpoints
    return Summary(
        at=at,
        minutes=minutes,
        covered_s=step.seconds,
        requests=step.requests,
        errors=step.errors,
        error_rate=step.errors / step.requests if step.requests else None,
        latency=latency_of(Distribution.unpack(step.latency)),
        hit_rate=step.hits / lookups if lookups else None,
        executions=step.executions,
        cpu_percent_mean=step.cpu_percent_mean,
        cpu_percent_max=step.cpu_percent_max,
        memory_bytes_mean=step.memory_bytes_mean,
        memory_bytes_max=step.memory_bytes_max,
        endpoints=endpoints_of(by_endpoint, seconds) if seconds > 0.0 else (),
    )
