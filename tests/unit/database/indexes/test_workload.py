"""The statements that are weighed, and what a process remembers of its own."""

from itertools import pairwise

import pytest

from headrace.database.indexes.observation import StatementHistogram
from headrace.database.indexes.workload import Query, Workload, merged, parametrised, statements
from headrace.errors import CallerError
from headrace.testing import FakeClock


def histogram(every: int = 1, statements_max: int = 10) -> StatementHistogram:
    return StatementHistogram(every=every, statements_max=statements_max, clock=FakeClock())


def test_statements_that_differ_in_literals_are_one():
    """Numbers and strings, not names."""
    one = parametrised("SELECT a1 FROM t WHERE x = 5 AND y = 'it''s' LIMIT 10")

    assert one == parametrised("select a1 from t where x = 77 and y = 'b'  limit 1")
    assert one == "select a1 from t where x = ? and y = ? limit ?"


def test_a_timed_call_stands_for_those_in_between():
    """One in four is looked at, and never two in a row."""
    seen, clock = histogram(every=4), FakeClock()

    due = [seen.is_due() for _ in range(20)]
    seen.note("SELECT $1", (1,), clock.monotonic(), clock.monotonic() + 0.25)
    [query] = seen.workload().queries

    assert (sum(due), any(one and other for one, other in pairwise(due))) == (4, False)
    assert (query.calls, query.mean_ms) == (4, pytest.approx(250.0))


def test_none_is_timed_when_it_is_turned_off():
    """`sample_every = 0`."""
    seen = histogram(every=0)

    assert not any(seen.is_due() for _ in range(100))


def test_few_parameters_are_remembered():
    """Three, whatever the number of calls."""
    seen = histogram()

    for value in range(100):
        seen.note("SELECT $1", (value,), 0.0, 1.0)

    [query] = seen.workload().queries
    assert len(query.samples) == 3
    assert query.calls == 100


def test_the_statements_are_bounded():
    """The one that was seen longest ago goes, and that is told."""
    seen = histogram(statements_max=3)

    for name in ("a", "b", "c", "a", "d"):
        seen.note(f"SELECT 1 FROM {name}", (), 0.0, 1.0)

    assert {query.text[-1] for query in seen.workload().queries} == {"a", "c", "d"}
    assert seen.workload().notes[-1] == "1 statements were forgotten"


def test_the_calls_of_several_shards_are_added_up():
    """And their mean times weighted by them."""
    shards = [
        Workload((Query("a", 10, 1.0), Query("b", 1, 1.0)), "x", 60.0),
        Workload((Query("a", 30, 2.0),), "x", 90.0),
    ]

    both = merged(shards)

    assert {query.text: (query.calls, query.mean_ms) for query in both.queries} == {"a": (40, 1.75), "b": (1, 1.0)}
    assert (both.source, both.seconds) == ("x", 90.0)


def test_the_heaviest_statements_are_kept():
    """By all of their time, and it is told how many are not."""
    found = Workload((Query("a", 1, 5.0), Query("b", 100, 1.0), Query("c", 1, 1.0))).heaviest(2)

    assert [query.text for query in found.queries] == ["b", "a"]
    assert found.notes == ("1 lighter statements left out",)


def test_a_workload_needs_statements():
    """An empty one is a mistake of the caller."""
    with pytest.raises(CallerError, match="no statements"):
        Workload.of([])


def test_a_file_holds_statements():
    """Ended by semicolons, which may also stand in strings and comments."""
    assert statements("SELECT ';' -- a; b\nFROM t;\n\nDELETE FROM t;;") == ["select ';' from t", "delete from t"]


def test_large_parameters_are_not_remembered():
    """A sample stays for as long as its statement: calls with a file in them are counted only."""
    seen = histogram()

    seen.note("SELECT 1 FROM a WHERE b = $1", (b"x" * 5000,), 0.0, 1.0)
    seen.note("SELECT 1 FROM a WHERE b = $1", (b"x",), 0.0, 1.0)

    [query] = seen.workload().queries
    assert [each.params for each in query.samples] == [(b"x",)]
    assert query.calls == 2
