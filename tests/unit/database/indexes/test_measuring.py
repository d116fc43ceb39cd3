"""Whether an index stays, by what was measured; and what may be run to measure it."""

import pytest

from headrace.database.indexes.measuring import Measured, fastest, judge, may_run
from headrace.database.indexes.workload import Sample

USED = frozenset({"x"})


def test_faster_statements_keep_their_index():
    """By the mean call of those that use it, weighted by how often each runs."""
    before = {0: Measured(10.0, frozenset()), 1: Measured(1.0, frozenset()), 2: Measured(50.0, frozenset())}
    after = {0: Measured(12.0, USED), 1: Measured(0.2, USED), 2: Measured(50.0, frozenset())}

    found = judge(before, after, [1, 99, 5], "x", creates=True)

    assert found.keep
    assert (found.before_ms, found.after_ms) == (pytest.approx(1.09), pytest.approx(0.318))


def test_slower_statements_drop_it():
    """By more than a twentieth and what a measurement is off by."""
    found = judge({0: Measured(20.0, frozenset())}, {0: Measured(40.0, USED)}, [1], "x", creates=True)

    assert not found.keep
    assert found.reason == "slower, the statements that use it: 20.00 ms before, 40.00 ms after"


def test_noise_is_no_reason():
    """Half a millisecond, and a twentieth."""
    assert judge({0: Measured(0.1, frozenset())}, {0: Measured(0.5, USED)}, [1], "x", creates=True).keep
    assert judge({0: Measured(100.0, frozenset())}, {0: Measured(105.0, USED)}, [1], "x", creates=True).keep


def test_a_slower_machine_is_no_reason():
    """What does not use the index became slower by as much."""
    before = {0: Measured(20.0, frozenset()), 1: Measured(100.0, frozenset())}
    after = {0: Measured(30.0, USED), 1: Measured(150.0, frozenset())}

    assert judge(before, after, [1, 1], "x", creates=True).keep
    assert not judge(before, after | {1: Measured(100.0, frozenset())}, [1, 1], "x", creates=True).keep


def test_a_faster_machine_hides_nothing():
    """That the others became faster is no reason to condemn it, either."""
    before = {0: Measured(20.0, frozenset()), 1: Measured(100.0, frozenset())}
    after = {0: Measured(20.0, USED), 1: Measured(50.0, frozenset())}

    assert judge(before, after, [1, 1], "x", creates=True).keep


def test_what_no_plan_uses_is_dropped():
    """It would only cost writes."""
    found = judge({0: Measured(20.0, frozenset())}, {0: Measured(19.0, frozenset({"y"}))}, [1], "x", creates=True)

    assert (found.keep, found.reason) == (False, "no measured statement uses it")


def test_a_dropped_index_must_be_missed_by_nobody():
    """The statements that used it count."""
    used, unused = {0: Measured(2.0, USED)}, {0: Measured(2.0, frozenset({"y"}))}
    slow, same = {0: Measured(20.0, frozenset())}, {0: Measured(2.0, frozenset({"y"}))}

    assert judge(used, same, [1], "x", creates=False).keep
    assert not judge(used, slow, [1], "x", creates=False).keep
    assert judge(unused, slow, [1], "x", creates=False).keep


def test_what_cannot_be_measured_is_kept_and_said():
    """Nothing speaks against it."""
    found = judge({}, {}, [], "x", creates=True)

    assert found.keep
    assert "not measured" in found.reason


def test_the_better_of_two_measurements_counts():
    """Others on the machine only make it slower."""
    one = {0: Measured(5.0, frozenset()), 1: Measured(1.0, USED)}
    other = {0: Measured(3.0, USED), 2: Measured(9.0, USED)}

    assert fastest(one, other) == {0: Measured(3.0, USED), 1: Measured(1.0, USED), 2: Measured(9.0, USED)}


@pytest.mark.parametrize(
    ("sql", "runs"),
    [
        ("SELECT count(*) FROM t WHERE lower(a) = 'x'", True),
        ("SELECT 1 FROM t FOR UPDATE", False),
        ("DELETE FROM t", False),
        ("WITH gone AS (DELETE FROM t RETURNING 1) SELECT 1 FROM gone", False),
        ("SELECT pg_advisory_lock(1)", False),
        ("SELECT my_function(a) FROM t", False),
    ],
)
def test_only_what_surely_reads_is_run(sql, runs):
    """No locks, no writes, no function that headrace does not know."""
    assert may_run(Sample(sql)) is runs
