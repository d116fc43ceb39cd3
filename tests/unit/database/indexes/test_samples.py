"""Parameters for statements whose own nobody noted."""

import pytest

from headrace.database.indexes.index import ColumnFacts, Schema, TableFacts
from headrace.database.indexes.samples import parameters, repaired, sampled

BOUNDS = tuple(str(value) for value in range(0, 1001, 10))
TABLE = TableFacts(
    "t",
    1000,
    1,
    {
        "a": ColumnFacts("a", "integer", bounds=BOUNDS),
        "kind": ColumnFacts("kind", "text", common=(("often", 0.9), ("rare", 0.1))),
        "day": ColumnFacts("day", "date", bounds=("2020-01-01", "2021-01-01", "2022-01-01")),
    },
)
SCHEMA = Schema({"t": TABLE}, {("", "t"): "t"})


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("SELECT 1 FROM t WHERE day >= date $1", "select 1 from t where day >= $1::date"),
        ("SELECT 1 FROM t WHERE day < date $1 + interval $2", "select 1 from t where day < $1::date + $2::interval"),
        ("SELECT extract($1 FROM day) FROM t", "select extract(year from day) from t"),
        ("SELECT a FROM t WHERE kind = $1", "select a from t where kind = $1"),
    ],
)
def test_what_postgres_has_normalised_can_be_read_again(text, meant):
    """A literal behind a type name, and the field of extract, may not be parameters."""
    assert repaired(text) == meant


def test_equality_gets_values_of_the_column():
    """One from the middle, and the most common one."""
    found = {sample.params for sample in sampled("SELECT 1 FROM t WHERE a = $1", SCHEMA, ["integer"])}

    assert found == {("500",), ("250",), ("750",)}
    assert ("often",) in {each.params for each in sampled("SELECT 1 FROM t WHERE kind = $1", SCHEMA, ["text"])}


def test_the_values_of_a_list_differ():
    """Else three would cost what one costs."""
    for sample in sampled("SELECT 1 FROM t WHERE a IN ($1, $2, $3)", SCHEMA, ["integer"] * 3):
        assert len(set(sample.params)) == 3


def test_an_array_is_one_parameter():
    """In Postgres' spelling."""
    [first, *_] = sampled("SELECT 1 FROM t WHERE a = ANY($1)", SCHEMA, ["integer[]"])

    assert first.params[0].startswith("{")
    assert first.params[0].count(",") == 2


@pytest.mark.parametrize("condition", ["a >= $1 AND a < $2", "a BETWEEN $1 AND $2", "$1 <= a AND $2 > a"])
def test_a_range_with_two_ends_holds_a_tenth(condition):
    """In the right order, so that it is not empty."""
    for sample in sampled(f"SELECT 1 FROM t WHERE {condition}", SCHEMA, ["integer"] * 2):
        low, high = map(int, sample.params)
        assert 80 <= high - low <= 120


def test_a_range_with_one_end_holds_a_third():
    """On either side."""
    [above, *_] = sampled("SELECT 1 FROM t WHERE a > $1", SCHEMA, ["integer"])
    [below, *_] = sampled("SELECT 1 FROM t WHERE a < $1", SCHEMA, ["integer"])

    assert (above.params, below.params) == (("670",), ("330",))


def test_what_is_compared_with_nothing_gets_a_neutral_value():
    """A limit of ten, and what the type allows."""
    sql = "SELECT $1 FROM t WHERE day < $2::date + $3::interval LIMIT $4"
    [first, *_] = sampled(sql, SCHEMA, ["text", "date", "interval", "bigint"])

    assert first.params == ("x", "2021-01-01", "1 month", "10")


def test_a_statement_without_parameters_is_its_own_sample():
    """As it stands."""
    [only] = sampled("SELECT a FROM t", SCHEMA, [])

    assert (only.sql, only.params) == ("SELECT a FROM t", ())


def test_parameters_in_strings_are_none():
    """The highest outside of them counts."""
    assert parameters("SELECT '$9', $2, $1") == 2
