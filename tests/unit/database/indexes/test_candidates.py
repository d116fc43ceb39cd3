"""What statements do with columns, and the indexes that follow from it."""

import pytest

from headrace.database.indexes.candidates import seeds, uses_of, where_share
from headrace.database.indexes.index import ColumnFacts, Index, Schema, TableFacts
from headrace.errors import CallerError


def table(name: str, *columns: str, **facts: ColumnFacts) -> TableFacts:
    return TableFacts(
        name, 1000, 80_000, {each: facts.get(each, ColumnFacts(each, "integer", distinct=10)) for each in columns}
    )


TABLES = {
    "orders": table(
        "orders", "id", "tenant", "state", "made", "total", "gone", id=ColumnFacts("id", "int", distinct=1000)
    ),
    "items": table("items", "order_id", "part", "amount", "doc", doc=ColumnFacts("doc", "jsonb", orders=False)),
    "sales.deals": table("sales.deals", "id", "made"),
}
SCHEMA = Schema(
    TABLES,
    {
        ("", "orders"): "orders",
        ("public", "orders"): "orders",
        ("", "items"): "items",
        ("sales", "deals"): "sales.deals",
    },
)


@pytest.mark.parametrize(
    ("sql", "equal", "ranges"),
    [
        ("SELECT 1 FROM orders WHERE tenant = $1 AND made >= $2", {"tenant"}, {"made"}),
        ("SELECT 1 FROM orders WHERE tenant IN ($1, $2) AND made BETWEEN $3 AND $4", {"tenant"}, {"made"}),
        ("SELECT 1 FROM orders o WHERE o.tenant = ANY($1) OR $2 < o.made", {"tenant"}, {"made"}),
        ("SELECT 1 FROM orders WHERE made::text = $1 AND lower(state) = $2", set(), set()),
        ("SELECT 1 FROM orders WHERE state LIKE 'ab%' AND gone IS NULL", {"gone"}, {"state"}),
        ("SELECT 1 FROM orders WHERE state LIKE '%ab'", set(), set()),
        ("UPDATE orders SET total = 1 WHERE id = $1 AND made < $2", {"id"}, {"made"}),
        ("DELETE FROM orders WHERE id = $1", {"id"}, set()),
    ],
)
def test_compared_columns_are_found(sql, equal, ranges):
    """As equal or as a range; not in expressions, which a plain index does not serve."""
    use = uses_of(sql, SCHEMA)["orders"]

    assert (use.equal, use.ranges) == (equal, ranges)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT part FROM orders JOIN items ON order_id = id WHERE tenant = 1",
        "SELECT 1 FROM orders, items i WHERE i.order_id = orders.id AND orders.tenant = 1",
        "SELECT 1 FROM orders WHERE tenant = 1 AND EXISTS (SELECT FROM items WHERE order_id = orders.id)",
        "WITH mine AS (SELECT id FROM orders WHERE tenant = 1) SELECT 1 FROM mine JOIN items ON order_id = mine.id",
    ],
)
def test_joined_columns_are_found(sql):
    """In joins, in the WHERE, in correlated subqueries, and through WITH."""
    uses = uses_of(sql, SCHEMA)

    assert "order_id" in uses["items"].joined | uses["items"].equal
    assert uses["orders"].equal == {"tenant"}


def test_sorted_and_grouped_columns_are_found():
    """As far as one index can give the order."""
    by = uses_of("SELECT tenant, made FROM orders ORDER BY tenant DESC, made DESC", SCHEMA)["orders"]
    mixed = uses_of("SELECT 1 FROM orders ORDER BY tenant, made DESC", SCHEMA)["orders"]
    grouped = uses_of("SELECT state, count(*) FROM orders GROUP BY state", SCHEMA)["orders"]

    assert by.sorted_by == ("tenant", "made")
    assert mixed.sorted_by == ("tenant",)
    assert grouped.grouped_by == ("state",)


def test_a_table_is_found_by_its_schema():
    """And one that is not there is left out."""
    assert set(uses_of("SELECT 1 FROM sales.deals, public.orders, other.x WHERE made = 1", SCHEMA)) == {
        "sales.deals",
        "orders",
    }


def test_what_cannot_be_read_is_told():
    """Instead of a guess."""
    with pytest.raises(CallerError, match="cannot be read"):
        uses_of("SELECT FROM WHERE", SCHEMA)


def test_equal_columns_come_before_ranges():
    """Equal ones, the most telling first, then what is sorted or bound; and the same as a covering index."""
    sql = "SELECT total FROM orders WHERE tenant = $1 AND id = $2 AND made > $3"

    found = set(seeds([uses_of(sql, SCHEMA)], SCHEMA))

    assert Index("orders", ("id", "tenant", "made")) in found
    assert Index("orders", ("id", "tenant", "made"), ("total",)) in found
    assert Index("orders", ("made",)) in found


def test_a_condition_of_every_call_makes_a_partial_index():
    """IS NULL always; a literal only where other values are parameters, so that it is meant."""
    sql = "SELECT id FROM orders WHERE tenant = $1 AND gone IS NULL AND state = 'open'"
    literals = "SELECT id FROM orders WHERE tenant = 4 AND state = 'open'"

    found = {index.where for index in seeds([uses_of(sql, SCHEMA)], SCHEMA)}

    assert found == {None, "gone IS NULL", "state = 'open'"}
    assert {index.where for index in seeds([uses_of(literals, SCHEMA)], SCHEMA)} == {None}


def test_a_condition_under_or_makes_no_partial_index():
    """It does not hold for all rows that the statement finds."""
    sql = "SELECT id FROM orders WHERE tenant = $1 AND (gone IS NULL OR made > $2)"

    assert {index.where for index in seeds([uses_of(sql, SCHEMA)], SCHEMA)} == {None}


def test_a_column_without_an_order_is_in_no_key():
    """A B-tree cannot hold it."""
    found = seeds([uses_of("SELECT 1 FROM items WHERE doc = $1 AND part = $2", SCHEMA)], SCHEMA)

    assert {index.columns for index in found} == {("part",)}


def test_the_share_of_a_partial_index_is_that_of_the_statistics():
    """NULLs and common values; all rows where nothing is known."""
    facts = TableFacts(
        "t",
        100,
        1,
        {
            "gone": ColumnFacts("gone", "date", null_share=0.9),
            "state": ColumnFacts("state", "text", common=(("open", 0.02),)),
        },
    )

    shares = [
        where_share(Index("t", ("a",), (), where), facts)
        for where in ("gone IS NULL", "gone IS NOT NULL", "state = 'open'", "state = 'new'", None)
    ]

    assert shares == [0.9, pytest.approx(0.1), 0.02, 1.0, 1.0]


def test_a_literal_that_differs_from_call_to_call_makes_no_partial_index():
    """Nor does it get into the advice, where it might be somebody's name."""
    sql = "SELECT total FROM orders WHERE tenant = $1 AND state = 'open'"

    assert any(each.where for each in seeds([uses_of(sql, SCHEMA)], SCHEMA))
    assert not any(each.where for each in seeds([uses_of(sql, SCHEMA, varies=True)], SCHEMA))
