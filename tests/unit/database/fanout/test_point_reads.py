"""Which statements may run for many callers at once, and how they are written then."""

import pytest

from headrace.database.catalog import declared
from headrace.database.config import Reference, Sharded
from headrace.database.fanout.point_reads import gathered, is_point_read
from headrace.database.planning.statement import read_statement
from headrace.errors import ConfigError

TABLES = {
    "orders": Sharded(key="tenant", batch_by="id"),
    "notes": Sharded(key="tenant"),
    "countries": Reference(batch_by="code"),
}
BATCH_BY = {"orders": "id", "countries": "code"}


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM orders WHERE id = $1",
        "SELECT v FROM orders o WHERE o.tenant = $1 AND (o.id = $2)",
        "SELECT v FROM orders WHERE $1 = id AND v <> 'x' LIMIT 1",
        "SELECT count(*) FROM orders WHERE id = $1 GROUP BY v ORDER BY v",
        "SELECT n.* FROM orders o JOIN notes n USING (tenant) WHERE o.id = $1 AND o.tenant = $2",
        "SELECT name FROM countries WHERE code = $1",
        "SELECT now(), v FROM orders WHERE id = $1;",
    ],
)
def test_reads_of_a_row_by_its_key_may_travel_together(sql):
    """The column that the table is batched by is held to one parameter."""
    assert is_point_read(read_statement(sql, declared(TABLES)), BATCH_BY)


@pytest.mark.parametrize(
    "sql",
    [
        pytest.param("SELECT * FROM notes WHERE id = $1", id="a table that did not opt in"),
        pytest.param("SELECT * FROM orders WHERE tenant = $1", id="another column"),
        pytest.param("SELECT * FROM orders WHERE id = 5", id="no parameter"),
        pytest.param("SELECT * FROM orders WHERE id > $1", id="a range"),
        pytest.param("SELECT * FROM orders WHERE id = $1 OR v = $2", id="an alternative"),
        pytest.param("SELECT * FROM orders WHERE id = ANY($1)", id="an array"),
        pytest.param("SELECT * FROM orders WHERE id = $1 LIMIT $2", id="a limit of each caller's own"),
        pytest.param("SELECT * FROM orders WHERE id = $1 FOR UPDATE", id="a lock"),
        pytest.param("SELECT nextval('s') FROM orders WHERE id = $1", id="a function that acts"),
        pytest.param("SELECT mine(v) FROM orders WHERE id = $1", id="a function that may act"),
        pytest.param("UPDATE orders SET v = 1 WHERE id = $1", id="a write"),
        pytest.param("SELECT 1 FROM orders WHERE id = $1 UNION SELECT 2", id="more than one SELECT"),
    ],
)
def test_everything_else_travels_alone(sql):
    """Where the answer for many might not be the answers of each."""
    assert not is_point_read(read_statement(sql, declared(TABLES)), BATCH_BY)


@pytest.mark.parametrize("table", [lambda: Sharded(key="tenant", batch_by=""), lambda: Reference(batch_by="")])
def test_a_column_without_a_name_is_refused(table):
    """An empty `batch_by` is a mistake, not a way to leave it out."""
    with pytest.raises(ConfigError, match="batch_by is empty"):
        table()


def test_the_text_of_the_caller_stays_as_it_is():
    """Only its parameters are replaced, and not those in strings, names and comments."""
    sql = """SELECT '$1', "$1", $$ $1 $$ FROM orders -- $1\nWHERE id = $1 AND tenant = $12 -- the end ;"""

    text = gathered(sql.replace("$12", "$2"), ["bigint", "bpchar"])

    keys = "headrace_keys(headrace_1, headrace_2, headrace_call)"
    assert text == (
        "SELECT headrace_keys.headrace_call, headrace_rows.* "
        f"FROM unnest($1::bigint[], $2::bpchar[]) WITH ORDINALITY AS {keys}"
        """ CROSS JOIN LATERAL (\nSELECT '$1', "$1", $$ $1 $$ FROM orders -- $1\n"""
        "WHERE id = headrace_keys.headrace_1 AND tenant = headrace_keys.headrace_2 -- the end ;\n) AS headrace_rows"
    )
