"""Counting what the rooms report."""

import pytest

from headrace.events import ExecutionFinished, LoadFailed, TierRecovered, TierUnavailable
from headrace.monitor.catalogue import CACHE_AVAILABLE, EVENTS, EXECUTION_DURATION, EXECUTIONS
from headrace.monitor.counters import Counters
from headrace.monitor.facts import FactCounter
from headrace.monitor.picture import gauge_values
from headrace.monitor.slots import Series


@pytest.fixture
def counters():
    counters = Counters.open(None)
    yield counters
    counters.close()


def counted(counters, name, label):
    return {series.label(label): n for series, n in counters.fold().counters.items() if series.name == name}


def test_facts_are_counted_by_type(counters):
    """Every fact counts, whatever it says."""
    facts = FactCounter(counters)
    for _ in range(3):
        facts.on(LoadFailed(key="k", error="e", stale=False))
    facts.on(TierRecovered(tier="remote", down_s=1.0))

    assert counted(counters, EVENTS, "type") == {"LoadFailed": 3, "TierRecovered": 1}


def test_executions_are_counted_by_how_they_ended(counters):
    """And how long they ran, without their time in the queue."""
    facts = FactCounter(counters)
    for status, run_ms in (("completed", 250.0), ("completed", 500.0), ("timeout", 1_250.0)):
        facts.on(ExecutionFinished("a", "1", "e", status=status, queue_ms=9_999.0, run_ms=run_ms))

    assert counted(counters, EXECUTIONS, "status") == {"completed": 2, "timeout": 1}
    runs = counters.fold().histograms[Series(EXECUTION_DURATION)]
    assert (runs.count, runs.sum_s, runs.over(1.0)) == (3, 2.0, 1)


def test_a_tier_that_comes_and_goes(counters):
    """The gauge is the last word."""
    facts = FactCounter(counters)
    facts.on(TierUnavailable(tier="remote", reason="refused"))
    assert gauge_values(counters.fold(), CACHE_AVAILABLE, tier="remote") == [0.0]

    facts.on(TierRecovered(tier="remote", down_s=1.0))

    assert gauge_values(counters.fold(), CACHE_AVAILABLE, tier="remote") == [1.0]
