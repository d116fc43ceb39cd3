from typing import Any

import pytest

from headrace.cli.bench.api import holds, latency_measurements
from headrace.cli.bench.distribution import distribution
from headrace.cli.bench.scenario import State
from tests.unit.cli.bench.circumstances import report


def late_by(milliseconds: float) -> dict[str, Any]:
    """What a report says whose generator fell behind."""
    return {"lag_ms": distribution([milliseconds]), "generator_bound": True}


def test_four_percentiles_are_measured_with_a_value_a_round():
    """Each response-time target gets the median and the spread over the rounds."""
    rounds = [report([float(value) for value in range(1, 1001)]), report([2.0 * value for value in range(1, 1001)])]

    p50, p95, p99, p999 = latency_measurements("reads", rounds)

    assert [each.target.name for each in (p50, p95, p99, p999)] == ["api-p50", "api-p95", "api-p99", "api-p99.9"]
    assert p50.values == (500.0, 1000.0)
    assert p95.values == (950.0, 1900.0)
    assert p99.values == (990.0, 1980.0)
    assert p999.values == (999.0, 1998.0)


def test_failures_and_a_late_generator_are_noted():
    """Whoever reads the number sees what is behind it."""
    late = report([1.0] * 100, ok=90, errors={"timeout": 7, "status": 3}, **late_by(31.0))

    (measurement, *_) = latency_measurements("reads", [late, report([1.0] * 100, errors={"timeout": 1}, ok=99)])

    assert measurement.note == "3 x status, 8 x timeout, generator late by 31 ms (p99)"
    assert measurement.failed_share == pytest.approx(0.055)
    assert measurement.state is State.MISSED


@pytest.mark.parametrize(
    ("latency_ms", "late_ms", "state"),
    [
        (90.0, 50.0, State.MET),
        (150.0, 50.0, State.GENERATOR_BOUND),
        (150.0, 20.0, State.MISSED),
        (5_000.0, 50.0, State.MISSED),
    ],
)
def test_a_late_generator_excuses_only_what_it_can_have_caused(latency_ms, late_ms, state):
    """A miss of p50 < 100 ms by less than twice the generator's lateness is not held against the server."""
    rounds = [report([latency_ms] * 100, **late_by(late_ms))]

    p50, *_ = latency_measurements("reads", rounds)

    assert p50.state is state


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"achieved_per_s": 96.0}, False),
        ({"ok": 990}, False),
        ({"ok": 996}, True),
    ],
)
def test_a_rate_holds_when_answers_are_fast_complete_and_keep_pace(changes, expected):
    """A queue that grows behind still short waits is seen by the rate that was achieved."""
    assert holds(report([10.0] * 1000, **changes)) is expected


def test_a_rate_with_a_slow_tail_does_not_hold():
    """One request in fifty above 500 ms is too slow for p99."""
    assert not holds(report([10.0] * 980 + [600.0] * 20))
