"""What the folded counters mean, and the difference between two of them. Pure.

Everything that is told as a rate or over a window is a difference of two totals. Totals only grow; where one went
back, the file was made anew or something is wrong, and there is no difference to tell: that interval is a gap, not a
negative or a guessed number.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from headrace.monitor.catalogue import (
    CACHE_HITS,
    CACHE_MISSES,
    EXECUTION_DURATION,
    EXECUTIONS,
    EXECUTIONS_STARTED,
    HTTP_DURATION,
    HTTP_REQUESTS,
    OTHER,
)
from headrace.monitor.histogram import Distribution
from headrace.monitor.slots import Folded

EMPTY = Distribution()


class EndpointKey(NamedTuple):
    """A method and a route."""

    method: str
    route: str


class EndpointTotals(NamedTuple):
    """Everything that one endpoint answered."""

    requests: int = 0
    errors: int = 0
    latency: Distribution = EMPTY

    def plus(self, other: "EndpointTotals") -> "EndpointTotals":
        """Both together."""
        return EndpointTotals(self.requests + other.requests, self.errors + other.errors, self.latency + other.latency)

    def since(self, earlier: "EndpointTotals") -> "EndpointTotals | None":
        """What came after `earlier`; None when anything went back."""
        latency = self.latency.since(earlier.latency)
        if latency is None or self.requests < earlier.requests or self.errors < earlier.errors:
            return None
        return EndpointTotals(self.requests - earlier.requests, self.errors - earlier.errors, latency)


class TierTotals(NamedTuple):
    """Everything that one cache tier was asked."""

    hits: int = 0
    misses: int = 0


class WorkerKey(NamedTuple):
    """One process: its slot, and which of the slot's owners it is."""

    slot: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """The counters by meaning: since the beginning, or between two instants."""

    identity: int
    """Of the counters' file."""
    endpoints: Mapping[EndpointKey, EndpointTotals] = field(default_factory=dict)
    tiers: Mapping[str, TierTotals] = field(default_factory=dict)
    executions: Mapping[str, int] = field(default_factory=dict)
    """That ended, by status."""
    executions_started: int = 0
    runs: Distribution = EMPTY
    """How long executions ran."""
    worker_requests: Mapping[WorkerKey, int] = field(default_factory=dict)

    @property
    def requests(self) -> int:
        """Answers of any status."""
        return sum(endpoint.requests for endpoint in self.endpoints.values())

    @property
    def errors(self) -> int:
        """Answers of 500 and above."""
        return sum(endpoint.errors for endpoint in self.endpoints.values())

    @property
    def latency(self) -> Distribution:
        """Response times over all endpoints."""
        return Distribution.total(endpoint.latency for endpoint in self.endpoints.values())

    @property
    def lookups(self) -> TierTotals:
        """The cache as its callers see it: a lookup is a hit when any tier had it.

        A miss in memory goes on to the remote tier, so it is final only if that missed as well, or is not there.
        """
        memory, remote = self.tiers.get("memory", TierTotals()), self.tiers.get("remote", TierTotals())
        asks_memory = memory.hits + memory.misses > 0
        misses = max(0, memory.misses - remote.hits) if asks_memory else remote.misses
        return TierTotals(memory.hits + remote.hits, misses)


def digest(folded: Folded) -> Totals:
    """Read the counters by their meaning; those without one here are only exported."""
    endpoints: dict[EndpointKey, EndpointTotals] = {}
    tiers: dict[str, TierTotals] = {}
    executions: dict[str, int] = {}
    for series, value in folded.counters.items():
        if series.name == HTTP_REQUESTS:
            key = EndpointKey(series.label("method", OTHER), series.label("route", OTHER))
            is_error = series.label("status").startswith("5")
            endpoints[key] = endpoints.get(key, EndpointTotals()).plus(EndpointTotals(value, value if is_error else 0))
        elif series.name == CACHE_HITS:
            tier = series.label("tier", OTHER)
            tiers[tier] = tiers.get(tier, TierTotals())._replace(hits=value)
        elif series.name == CACHE_MISSES:
            tier = series.label("tier", OTHER)
            tiers[tier] = tiers.get(tier, TierTotals())._replace(misses=value)
        elif series.name == EXECUTIONS:
            executions[series.label("status", OTHER)] = value
    for series, distribution in folded.histograms.items():
        if series.name == HTTP_DURATION:
            key = EndpointKey(series.label("method", OTHER), series.label("route", OTHER))
            endpoints[key] = endpoints.get(key, EndpointTotals())._replace(latency=distribution)
    return Totals(
        identity=folded.identity,
        endpoints=endpoints,
        tiers=tiers,
        executions=executions,
        executions_started=_by_name(folded.counters.items(), EXECUTIONS_STARTED),
        runs=Distribution.total(d for series, d in folded.histograms.items() if series.name == EXECUTION_DURATION),
        worker_requests={
            WorkerKey(slot.slot, slot.generation): _by_name(slot.contents.counters.items(), HTTP_REQUESTS)
            for slot in folded.slots
        },
    )


def _by_name(counters: Iterable[tuple[tuple[object, ...], int]], name: str) -> int:
    return sum(value for series, value in counters if series[0] == name)


def difference(earlier: Totals, later: Totals) -> Totals | None:
    """What happened between two totals; None when they are of two histories."""
    runs = later.runs.since(earlier.runs)
    endpoints = _endpoints_between(earlier.endpoints, later.endpoints)
    tiers = _tiers_between(earlier.tiers, later.tiers)
    executions = _counts_between(earlier.executions, later.executions)
    if later.identity != earlier.identity or later.executions_started < earlier.executions_started:
        return None
    if runs is None or endpoints is None or tiers is None or executions is None:
        return None
    return Totals(
        identity=later.identity,
        endpoints=endpoints,
        tiers=tiers,
        executions=executions,
        executions_started=later.executions_started - earlier.executions_started,
        runs=runs,
        # A worker that came meanwhile began at zero; one that went is in the totals and needs no row.
        worker_requests={
            key: requests - earlier.worker_requests.get(key, 0) for key, requests in later.worker_requests.items()
        },
    )


def _endpoints_between(
    earlier: Mapping[EndpointKey, EndpointTotals], later: Mapping[EndpointKey, EndpointTotals]
) -> dict[EndpointKey, EndpointTotals] | None:
    if not earlier.keys() <= later.keys():
        return None
    result = {}
    for key, endpoint in later.items():
        known = earlier.get(key)
        between = endpoint if known is None else endpoint.since(known)
        if between is None:
            return None
        result[key] = between
    return result


def _tiers_between(earlier: Mapping[str, TierTotals], later: Mapping[str, TierTotals]) -> dict[str, TierTotals] | None:
    hits = _counts_between({t: n.hits for t, n in earlier.items()}, {t: n.hits for t, n in later.items()})
    misses = _counts_between({t: n.misses for t, n in earlier.items()}, {t: n.misses for t, n in later.items()})
    if hits is None or misses is None:
        return None
    return {tier: TierTotals(hits[tier], misses[tier]) for tier in later}


def _counts_between(earlier: Mapping[str, int], later: Mapping[str, int]) -> dict[str, int] | None:
    if any(later.get(key, -1) < count for key, count in earlier.items()):
        return None
    return {key: count - earlier.get(key, 0) for key, count in later.items()}
