import pytest

from headrace.cli.bench.scenario import FAILED_SHARE_MAX, Measurement, State
from headrace.cli.bench.targets import API_P99, API_PEAK, TARGETS


def test_the_median_of_the_rounds_counts_and_the_spread_is_their_range():
    """One slow round neither decides nor disappears."""
    measurement = Measurement(target=API_P99, case="", values=(20.0, 900.0, 10.0))

    assert measurement.measured == 20.0
    assert measurement.spread == (10.0, 900.0)


@pytest.mark.parametrize(
    ("target", "value", "state"),
    [
        (API_P99, 499.9, State.MET),
        (API_P99, 500.0, State.MISSED),
        (API_PEAK, 10_000.0, State.MET),
        (API_PEAK, 9_999.0, State.MISSED),
    ],
)
def test_a_target_is_met_on_the_right_side_of_its_limit(target, value, state):
    """Below means below; at least includes the limit."""
    assert Measurement(target=target, case="", values=(value,)).state is state


def test_without_values_nothing_is_measured():
    """No number is made up for what could not be measured."""
    measurement = Measurement(target=API_P99, case="", values=())

    assert (measurement.state, measurement.measured, measurement.spread) == (State.NOT_MEASURED, None, None)


def test_a_latency_that_many_requests_never_got_is_missed():
    """Failing fast is not being fast."""
    few = Measurement(target=API_P99, case="", values=(5.0,), failed_share=FAILED_SHARE_MAX)
    many = Measurement(target=API_P99, case="", values=(5.0,), failed_share=FAILED_SHARE_MAX * 1.1)

    assert (few.state, many.state) == (State.MET, State.MISSED)


def test_a_slow_generator_is_not_held_against_the_server_nor_in_its_favour():
    """Missed with a late generator says nothing about the server; met with a late generator is met."""
    slow = Measurement(target=API_P99, case="", values=(800.0,), generator_bound=True)
    fast = Measurement(target=API_P99, case="", values=(80.0,), generator_bound=True)

    assert (slow.state, fast.state) == (State.GENERATOR_BOUND, State.MET)


def test_every_target_has_a_name_of_its_own():
    """Programs tell targets apart by name."""
    assert len({target.name for target in TARGETS}) == len(TARGETS) == 22
