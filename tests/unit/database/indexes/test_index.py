"""What an index is called, what it weighs, and which other ones it can stand for."""

import pytest

from headrace.database.indexes.index import ColumnFacts, Index, TableFacts, bare_name, index_bytes

TABLE = TableFacts(
    "orders",
    1_000_000,
    100_000_000,
    {
        "id": ColumnFacts("id", "bigint", distinct=1_000_000),
        "tenant": ColumnFacts("tenant", "integer", width_bytes=4, distinct=1000),
        "total": ColumnFacts("total", "numeric", distinct=1000, packs=False),
    },
)


def test_the_same_index_has_the_same_name():
    """So that an interrupted build is found again, on every shard."""
    one, other = Index("orders", ("tenant", "id")), Index("orders", ("tenant", "id"))

    assert one.name == other.name
    assert one.name.startswith("headrace_orders_tenant_id_")


def test_indexes_that_differ_have_other_names():
    """Also if they differ in what the name does not spell."""
    indexes = [
        Index("orders", ("tenant",)),
        Index("orders", ("tenant",), ("id",)),
        Index("orders", ("tenant",), (), "id IS NULL"),
    ]

    assert len({index.name for index in indexes}) == 3


@pytest.mark.parametrize("table", ['"Größe".t', "a" * 63, '"a.b"'])
def test_a_name_is_one_that_postgres_takes_without_quotes(table):
    """At most 63 bytes of plain letters, whatever the table is called."""
    name = Index(table, ('"Spalte 1"', "b" * 63)).name

    assert len(name.encode()) <= 63
    assert name.isascii()
    assert name.replace("_", "").isalnum()


@pytest.mark.parametrize(("table", "schema"), [("sales.orders", "sales."), ('"a.b".t', '"a.b".'), ("orders", "")])
def test_an_index_is_found_in_the_schema_of_its_table(table, schema):
    """CREATE INDEX takes no schema; everything else needs it."""
    index = Index(table, ("id",))

    assert index.path == schema + index.name
    assert index.sql() == f"CREATE INDEX CONCURRENTLY {index.name} ON {table} (id)"


@pytest.mark.parametrize(
    ("one", "other", "serves"),
    [
        (Index("t", ("a", "b")), Index("t", ("a",)), True),
        (Index("t", ("a", "b")), Index("t", ("b",)), False),
        (Index("t", ("a",)), Index("t", ("a",), (), "b IS NULL"), True),
        (Index("t", ("a",), (), "b IS NULL"), Index("t", ("a",)), False),
        (Index("t", ("a", "b")), Index("t", ("a",), ("b",)), True),
        (Index("t", ("a",)), Index("t", ("a",), ("b",)), False),
        (Index("u", ("a",)), Index("t", ("a",)), False),
    ],
)
def test_an_index_serves_what_it_begins_with(one, other, serves):
    """Prefixes, fewer rows and covered columns; nothing of another table."""
    assert one.serves(other) is serves


def test_equal_keys_share_their_entries():
    """A thousand values of a million rows take about a third of what a million values take."""
    few, many = index_bytes(Index("orders", ("tenant",)), TABLE), index_bytes(Index("orders", ("id",)), TABLE)

    assert 20_000_000 < many < 25_000_000
    assert 6_000_000 < few < 8_000_000


@pytest.mark.parametrize("index", [Index("orders", ("total",)), Index("orders", ("tenant",), ("id",))])
def test_what_postgres_does_not_share_is_counted_in_full(index):
    """Numerics that are equal may be written differently, and included columns differ."""
    assert index_bytes(index, TABLE) > 20_000_000


def test_a_partial_index_weighs_its_share():
    """A hundredth of the rows, a hundredth of the bytes."""
    whole, part = (index_bytes(Index("orders", ("id",)), TABLE, share=share) for share in (1.0, 0.01))

    assert part == pytest.approx(whole / 100, rel=0.15)


@pytest.mark.parametrize(
    ("path", "bare"),
    [("a", "a"), ("s.a", "a"), ('"s.t"."a.b"', "a.b"), ('"a""b"', 'a"b'), ('s."A"', "A")],
)
def test_a_plan_shows_the_bare_name(path, bare):
    """Dots and quotes inside of quotes are part of it."""
    assert bare_name(path) == bare
