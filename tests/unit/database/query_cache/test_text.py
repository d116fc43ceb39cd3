"""What the text of a statement alone says: what must not be cached, and which tables it writes."""

import pytest

from headrace.database.query_cache.text import read_text, written_tables


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("SELECT  1", "select 1 ;"),
        ("select a -- it's\nfrom t", "SELECT A /* and /* 'this' */ */ FROM T"),
        ("\tselect 'A  b'\n", "select 'A  b'"),
        ("select É from t", "SELECT É FROM T"),
    ],
)
def test_texts_that_postgres_reads_alike_are_one(one, two):
    """White space, comments, the case of words and a last semicolon are no difference."""
    assert read_text(one).text == read_text(two).text


@pytest.mark.parametrize(
    ("one", "two"),
    [
        ("select 'a'", "select 'A'"),
        ('select "a"', 'select "A"'),
        ("select $$a$$", "select $$A$$"),
        ("select e'\\'a -- '", "select e'\\'A -- '"),
        ("select 'a  b'", "select 'a b'"),
        ("select '--a'", "select '--b'"),
        ("select É", "select é"),
        ("select a1", "select a 1"),
        ("select 'a'\n'b'", "select 'a' 'b'"),
        ("select a - -1", "select a --1"),
        ("select $1", "select $11"),
        ("select $a$ $b$ $a$", "select $a$ $c$ $a$"),
    ],
)
def test_texts_that_postgres_may_read_differently_are_two(one, two):
    """Strings of every kind, quoted identifiers, letters beyond ASCII, and what white space keeps apart."""
    assert read_text(one).text != read_text(two).text


@pytest.mark.parametrize(
    "sql",
    [
        "select 1; select 2", "insert into t values (1)", "select * into t from u", "select 1 for share",
        "select /* 1", "select current_date", "select U&\"d\\0061t\" from t", "select 'NOW'::timestamptz",
        "begin", "", "select 'oops",
        "select ' today 10:00'::timestamp", "select E'now'::date", "select $$tomorrow$$::date", "explain select 1",
        "select session_user", "select xmin from t", 'select "ctid" from t', "select 't'::regclass",
        "select '{today}'::date[]", "select '10:00 today'::timestamp", "select E'\\x74oday'::date",
        "select U&'\\0074oday'::date", "select '[today,tomorrow)'::daterange", "select $a$(1,now)$a$::t",
        "select 'to'\n'day'::date", "select 1" + " " * 20_000,
        "with a as (update t set b = 1 returning b) select * from a",
    ],
)  # fmt: skip
def test_what_the_text_forbids_has_a_reason(sql):
    """Writes, locks, moments, physical places, several statements, and what cannot be read."""
    assert read_text(sql).reason


@pytest.mark.parametrize(
    "sql",
    [
        "(select 1)", "values (1), (2)", "table t", "select 'nowhere', 'updated', \"current_date\" from t",
        "select e'a\\n', 'to' || 'day', $a$a$a$, 'sometoday'",
        "with a as (select 1) select * from a", "select date '2026-01-01', interval '1 day'", "select 1 -- for update",
    ],
)  # fmt: skip
def test_what_only_looks_forbidden_is_not(sql):
    """Words in strings, comments and quoted identifiers mean nothing."""
    assert read_text(sql).reason is None


def test_calls_are_the_words_before_a_parenthesis():
    """With or without white space, quoted or not; the catalogue knows which of them are functions."""
    found = read_text('select f (1), "G"(2), a.h(3), count(*) from t where a in (1)')

    assert found.calls == ("f", "G", "h", "count", "in")


def test_complexity_grows_with_what_makes_a_query_dear():
    """One for a plain read, more for joins, grouping, sorting and subqueries."""
    plain, heavy = (
        read_text(sql).complexity
        for sql in (
            "select a from t where b = 1",
            "select a, count(*) from t join u on t.a = u.a group by a having count(*) > (select 3) order by a",
        )
    )

    assert plain == 1
    assert heavy >= 5


@pytest.mark.parametrize(
    ("sql", "tables"),
    [
        ("INSERT INTO a VALUES (1) ON CONFLICT DO UPDATE SET b = 1", {"a"}),
        ('update only s."T x" as t set b = 1 from c', {"T x"}),
        ("DELETE FROM a USING b WHERE a.id = b.id", {"a"}),
        ("WITH x AS (DELETE FROM a), y AS (UPDATE b SET c = 1) INSERT INTO d SELECT * FROM x", {"a", "b", "d"}),
        ("MERGE INTO a USING b ON true WHEN MATCHED THEN DELETE WHEN NOT MATCHED THEN INSERT VALUES (1)", {"a"}),
        ("TRUNCATE TABLE a, ONLY s.b, c RESTART IDENTITY", {"a", "b", "c"}),
        ("SELECT * FROM a FOR UPDATE OF a", set()),
        ("SELECT 'update b set c'", set()),
        ("-- update a\nSELECT 1", set()),
        ("WITH x AS (SELECT 1) SELECT * FROM x", set()),
        ("BEGIN", set()),
    ],
)  # fmt: skip
def test_written_tables_are_those_that_the_statement_names(sql, tables):
    """Wherever in it they are written; locks and clauses are no writes."""
    assert written_tables(sql) == tables


@pytest.mark.parametrize(
    "sql",
    [
        "DROP TABLE a",
        "CALL f()",
        "DO $$ $$",
        "COPY a FROM STDIN",
        "update",
        "insert '",
        "x",
        "TRUNCATE a CASCADE",
        'UPDATE U&"\\0061" SET b = 1',
        "INSERT INTO a VALUES ('" + "x" * 20_000 + "')",
    ],
)
def test_what_cannot_be_told_may_write_anything(sql):
    """DDL, procedures, and what is not understood."""
    assert written_tables(sql) is None
