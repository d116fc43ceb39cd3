"""Rows: tuples that answer by column name."""

from headrace.database.postgres.rows import row_of


def test_a_row_is_a_tuple_with_names():
    """Index, name, unpacking and asdict give the same values."""
    row = row_of(("id", "name"))((7, "x"))
    assert (row[0], row.id, row.name, row.asdict()) == (7, 7, "x", {"id": 7, "name": "x"})
    assert row == (7, "x")


def test_of_two_columns_with_one_name_the_first_answers():
    """`SELECT a.id, b.id` is a fine statement; both values stay reachable by index."""
    row = row_of(("id", "id"))((1, 2))
    assert (row.id, row[1], row.asdict()) == (1, 2, {"id": 1})


def test_a_column_may_be_named_like_a_method():
    """`SELECT count(*)` answers with its value."""
    assert row_of(("count",))((3,)).count == 3


def test_odd_column_names_do_no_harm():
    """`?column?`, dunders and our own names stay reachable by index."""
    row = row_of(("?column?", "__class__", "columns"))((1, 2, 3))
    assert tuple(row) == (1, 2, 3)
    assert row.columns == ("?column?", "__class__", "columns")
