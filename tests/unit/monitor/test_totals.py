"""What the counters mean, and what may be said of two readings."""

import pytest

from headrace.monitor.catalogue import (
    CACHE_HITS,
    CACHE_MISSES,
    EXECUTION_DURATION,
    EXECUTIONS,
    EXECUTIONS_STARTED,
    HTTP_DURATION,
    HTTP_REQUESTS,
)
from headrace.monitor.counters import Counters
from headrace.monitor.totals import EndpointKey, TierTotals, Totals, WorkerKey, difference, digest


@pytest.fixture
def counters():
    counters = Counters.open(None)
    yield counters
    counters.close()


def answer(counters, route, status="2xx", seconds=0.01, times=1):
    for _ in range(times):
        counters.counter(HTTP_REQUESTS, method="GET", route=route, status=status).add()
        counters.histogram(HTTP_DURATION, method="GET", route=route).record(seconds)


def test_answers_are_grouped_by_endpoint(counters):
    """Status classes add up to requests, 5xx are the errors, and latency is the endpoint's histogram."""
    answer(counters, "/a", times=3)
    answer(counters, "/a", "5xx", seconds=0.3)
    answer(counters, "/b", "4xx")

    totals = digest(counters.fold())

    a = totals.endpoints[EndpointKey("GET", "/a")]
    assert (a.requests, a.errors, a.latency.count, a.latency.over(0.2)) == (4, 1, 4, 1)
    assert (totals.requests, totals.errors, totals.latency.count) == (5, 1, 5)
    assert list(totals.worker_requests.values()) == [5]


def test_cache_and_executions_are_read_by_their_labels(counters):
    """Tiers and statuses keep apart, and everything else is left to the exporters."""
    counters.counter(CACHE_HITS, tier="memory").add(7)
    counters.counter(CACHE_MISSES, tier="memory").add(3)
    counters.counter(EXECUTIONS, status="completed").add(2)
    counters.counter(EXECUTIONS_STARTED).add(4)
    counters.histogram(EXECUTION_DURATION).record(0.5)
    counters.counter("somebody_elses_total").add(9)

    totals = digest(counters.fold())

    assert totals.tiers == {"memory": TierTotals(7, 3)}
    assert (totals.executions, totals.executions_started, totals.runs.count) == ({"completed": 2}, 4, 1)


@pytest.mark.parametrize(
    ("memory", "remote", "seen"),
    [
        (None, None, (0, 0)),
        ((8, 2), None, (8, 2)),
        (None, (5, 5), (5, 5)),
        ((8, 4), (3, 1), (11, 1)),
        ((8, 4), (1, 1), (9, 3)),
        ((8, 4), (6, 0), (14, 0)),
    ],
)
def test_a_lookup_is_a_hit_when_any_tier_had_it(memory, remote, seen):
    """A miss in memory that the remote tier answered is no miss; one that it was not asked for is."""
    tiers = {name: TierTotals(*pair) for name, pair in (("memory", memory), ("remote", remote)) if pair}

    assert Totals(identity=1, tiers=tiers).lookups == seen


def test_the_difference_is_what_happened_in_between(counters):
    """Also for endpoints, tiers and statuses that were not there before."""
    answer(counters, "/a", times=2)
    earlier = digest(counters.fold())
    answer(counters, "/a", "5xx")
    answer(counters, "/new")
    counters.counter(CACHE_HITS, tier="memory").add(7)
    counters.counter(EXECUTIONS, status="failed").add(2)
    counters.histogram(EXECUTION_DURATION).record(0.5)

    happened = difference(earlier, digest(counters.fold()))

    assert {key.route: (e.requests, e.errors) for key, e in happened.endpoints.items()} == {
        "/a": (1, 1),
        "/new": (1, 0),
    }
    assert happened.latency.count == 2
    assert happened.tiers == {"memory": TierTotals(7, 0)}
    assert (happened.executions, happened.runs.count) == ({"failed": 2}, 1)
    assert list(happened.worker_requests.values()) == [2]


def test_a_worker_that_came_meanwhile_began_at_zero():
    """Its requests are all new; one that went away has no row."""
    earlier = Totals(identity=1, worker_requests={WorkerKey(0, 1): 100, WorkerKey(1, 2): 50})
    later = Totals(identity=1, worker_requests={WorkerKey(0, 3): 8, WorkerKey(1, 2): 55})

    assert difference(earlier, later).worker_requests == {WorkerKey(0, 3): 8, WorkerKey(1, 2): 5}


def test_totals_of_another_file_have_no_difference(counters):
    """Even larger numbers say nothing when they are of another history."""
    answer(counters, "/a")
    again = Counters.open(None)
    answer(again, "/a", times=5)

    assert difference(digest(counters.fold()), digest(again.fold())) is None
    again.close()


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ({"executions": {"failed": 2}}, {"executions": {"failed": 1}}),
        ({"executions": {"failed": 2}}, {"executions": {}}),
        ({"executions_started": 2}, {"executions_started": 1}),
        ({"tiers": {"memory": TierTotals(5, 5)}}, {"tiers": {"memory": TierTotals(4, 9)}}),
        ({"tiers": {"memory": TierTotals(5, 5)}}, {"tiers": {"memory": TierTotals(9, 4)}}),
    ],
)
def test_totals_that_went_back_have_no_difference(earlier, later):
    """One number that fell makes the whole interval a gap: nothing is clamped to zero, nothing is negative."""
    assert difference(Totals(identity=1, **earlier), Totals(identity=1, **later)) is None


def test_an_endpoint_that_went_back_has_no_difference(counters):
    """Requests, errors, latency and the endpoint itself may only grow."""
    answer(counters, "/a")
    less = digest(counters.fold())
    answer(counters, "/a", "5xx")
    answer(counters, "/b")

    more = digest(counters.fold())

    assert difference(more, less) is None
    assert difference(less, more) is not None
