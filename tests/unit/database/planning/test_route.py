"""Where statements go: plans as data, from text, parameters and a map alone."""

import uuid
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

import pytest

from headrace.database.planning.aggregation import Combination
from headrace.database.planning.route import (
    AllShards,
    AnyShard,
    Gather,
    OneShard,
    ReferenceWrite,
    Refused,
    Router,
    Shards,
    SplitInsert,
    WriteEach,
)
from headrace.database.planning.scatter import Rows
from headrace.database.planning.scope import TableFacts
from headrace.errors import CallerError

SHARDS = ("s0", "s1", "s2")
CATALOG = {
    "a": TableFacts("k", "bigint", ("k", "x", "n")),
    "b": TableFacts("k", "bigint", ("id", "k", "x")),
    "t": TableFacts("name", "text", ("name", "x")),
    "m": TableFacts("k", "numeric", ("k", "x")),
    "u": TableFacts("id", "uuid", ("id", "x")),
    "p": TableFacts("k", "numeric(10,2)", ("k", "x")),
    "v": TableFacts("k", "character varying(3)", ("k", "x")),
    "s": TableFacts("k", "timestamp(3) without time zone", ("k", "x")),
    "r": TableFacts(None, "", ("id", "label")),
    "c": TableFacts(None, "", ("id", "label", "made"), frozenset({"id", "made"})),
}


class Home(NamedTuple):
    shard: str


class Modulo:
    """Integer keys by their remainder, all others on s0; what it was asked for is kept."""

    def __init__(self):
        self.asked = []

    def locate(self, key):
        self.asked.append(key)
        return Home(f"s{key % 3}" if isinstance(key, int) else "s0")


def plan(sql, *params, everywhere=False):
    return Router(SHARDS, CATALOG, statements_max=10).plan(sql, params, Modulo(), everywhere=everywhere)


@pytest.mark.parametrize(
    ("sql", "params", "shard"),
    [
        ("SELECT * FROM a WHERE k = $1", (4,), "s1"),
        ("SELECT * FROM a WHERE k = 5", (), "s2"),
        ("SELECT * FROM a WHERE k = '5'", (), "s2"),
        ("SELECT * FROM a WHERE -4 = k AND x > 3", (), "s2"),
        ("SELECT * FROM a WHERE k IN (1, 4, $1)", (7,), "s1"),
        ("SELECT * FROM a WHERE k = ANY($1)", ([2, 5],), "s2"),
        ("SELECT * FROM a WHERE k = 1 OR (k = 4 AND x = 2)", (), "s1"),
        ("SELECT * FROM a JOIN b ON a.k = b.k WHERE b.k = $1", (1,), "s1"),
        ("SELECT * FROM a JOIN b USING (k) WHERE a.k = $1", (1,), "s1"),
        ("SELECT * FROM a, b WHERE a.k = 1 AND b.k = 4", (), "s1"),
        ("SELECT * FROM a LEFT JOIN b ON b.k = a.k WHERE a.k = 2", (), "s2"),
        ("SELECT * FROM r LEFT JOIN a ON a.x = r.id AND a.k = 2", (), "s2"),
        ("SELECT * FROM a WHERE k = 1 AND EXISTS (SELECT 1 FROM b WHERE b.k = a.k)", (), "s1"),
        ("WITH c AS (SELECT * FROM b WHERE k = 1) SELECT * FROM a JOIN c ON c.k = a.k", (), "s1"),
        ("SELECT sum(n) OVER () FROM a WHERE k = 2", (), "s2"),
        ("SELECT k FROM a WHERE k = 1 UNION SELECT k FROM b WHERE k = 4", (), "s1"),
        ("UPDATE a SET x = 1 WHERE k = $1", (1,), "s1"),
        ("WITH new AS (INSERT INTO a (k) VALUES (1) RETURNING *) SELECT * FROM new", (), "s1"),
        ("UPDATE a SET k = 4 WHERE k = 1", (), "s1"),
        ("DELETE FROM a USING b WHERE a.k = b.k AND b.k = 2", (), "s2"),
        ("INSERT INTO a (x, k) VALUES ($1, $2)", (7, 2), "s2"),
        ("INSERT INTO a VALUES (1, 2, 3)", (), "s1"),
        ("INSERT INTO a (k, x) VALUES (1, 1), (4, 4) ON CONFLICT (k) DO UPDATE SET x = excluded.x", (), "s1"),
        ("INSERT INTO a (k, x) SELECT k, x FROM b WHERE k = $1", (2,), "s2"),
        ("SELECT * FROM a WHERE k = 1 FOR UPDATE", (), "s1"),
    ],
)
def test_what_is_held_to_keys_of_one_shard_goes_there(sql, params, shard):
    """Whatever else the statement does, its own text runs on that shard."""
    assert plan(sql, *params) == OneShard(shard)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT * FROM a WHERE k > 1",
        "SELECT * FROM a WHERE NOT k = 1",
        "SELECT * FROM a WHERE k = 1 OR x = 2",
        "SELECT * FROM a WHERE k + 1 = 2",
        "SELECT * FROM a WHERE k = x",
        "SELECT * FROM a LEFT JOIN b ON b.k = a.k AND a.k = 1",
        "SELECT * FROM a WHERE k = 1.5",
        "SELECT * FROM a WHERE EXISTS (SELECT 1 FROM b WHERE b.k = a.k AND b.x = 3)",
    ],
)
def test_what_does_not_hold_every_row_to_a_key_asks_every_shard(sql):
    """More shards are asked than needed, never fewer."""
    assert isinstance(plan(sql), AllShards)


def test_keys_of_several_shards_ask_these_alone():
    """An IN list narrows the shards although it does not name one."""
    found = plan("SELECT * FROM a WHERE k IN (1, 2)")
    assert isinstance(found, Shards)
    assert found.shards == ("s1", "s2")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT a.k FROM a JOIN b ON a.x = b.x",
        "SELECT a.k FROM a JOIN b ON a.k = b.k JOIN a AS c ON c.x = b.x",
        "SELECT * FROM r LEFT JOIN a ON a.x = r.id",
        "SELECT * FROM r WHERE EXISTS (SELECT 1 FROM a WHERE a.x = r.id)",
        "SELECT row_number() OVER (ORDER BY x) FROM a",
        "SELECT string_agg(x::text, ',') FROM a",
        "SELECT k FROM a UNION SELECT k FROM b",
        "SELECT * FROM (SELECT * FROM a ORDER BY x LIMIT 3) AS s",
        "SELECT * FROM a WHERE k IN (SELECT k FROM b LIMIT 1)",
        "SELECT * FROM a WHERE x = (SELECT max(x) FROM a)",
        "WITH c AS (SELECT * FROM a) SELECT * FROM c AS one JOIN c AS two ON one.x = two.n",
        "SELECT * FROM a JOIN (SELECT x, count(*) AS c FROM b GROUP BY x) AS s ON s.x = a.x",
        "SELECT * FROM a FULL JOIN r ON r.id = a.x",
    ],
)
def test_what_no_shard_can_answer_for_itself_is_gathered(sql):
    """The plan says why."""
    found = plan(sql)
    assert isinstance(found, Gather)
    assert found.gathering.reason


def test_a_null_group_of_an_outer_join_is_no_group_of_one_shard():
    """The key of the nullable side is NULL on every shard."""
    found = plan("SELECT b.k, count(*) FROM a LEFT JOIN b ON a.k = b.k GROUP BY b.k")
    assert isinstance(found, AllShards)
    assert isinstance(found.division, Combination)


def test_groups_by_the_key_are_whole_on_their_shards():
    """Then any aggregate may be used, and HAVING holds where the group is."""
    found = plan("SELECT k, string_agg(x::text, ',') FROM a GROUP BY k HAVING count(*) > 1")
    assert isinstance(found, AllShards)
    assert isinstance(found.division, Rows)


@pytest.mark.parametrize(
    ("sql", "why"),
    [
        ("UPDATE a SET x = 1", "names no key"),
        ("DELETE FROM a WHERE x = 1", "names no key"),
        ("DELETE FROM a WHERE k IN (1, 2)", "names no key"),
        ("UPDATE a SET k = 2 WHERE k = 1", "changes the shard key"),
        ("UPDATE a SET k = x WHERE k = 1", "changes the shard key"),
        ("UPDATE a SET k = 1", "shard keys"),
        ("INSERT INTO a (k) VALUES (1) ON CONFLICT (k) DO UPDATE SET k = 2", "changes the shard key"),
        ("INSERT INTO a (k, x) VALUES (1, 1), (2, 2)", "2 shards"),
        ("INSERT INTO a (x) VALUES (1)", "has no shard key"),
        ("INSERT INTO a (k, x) VALUES (NULL, 1), (2, 2)", "no shard key"),
        ("INSERT INTO a (k) SELECT id FROM r", "cannot be known"),
        ("UPDATE r SET label = 'x' FROM a WHERE a.x = r.id", "what one shard knows"),
        ("INSERT INTO r (id) SELECT x FROM a WHERE k = 1", "one shard only"),
        ("INSERT INTO r VALUES (1, random()::text)", "random"),
        ("UPDATE r SET label = now()::text", "differently"),
        ("UPDATE r SET label = my_function(id)", "my_function"),
        ("SELECT * FROM r FOR UPDATE", "lock"),
        ("SELECT * FROM a FOR UPDATE", "locks"),
        ("WITH new AS (INSERT INTO a (k) VALUES (1), (2) RETURNING *) SELECT * FROM new", "writes"),
        ("WITH gone AS (DELETE FROM a RETURNING *) SELECT * FROM gone", "writes"),
        ("SELECT * FROM undeclared", "not declared"),
        ("SELECT * FROM a JOIN undeclared ON true WHERE k = 1", "not declared"),
        ("SELECT 1", "names no key"),
        ("CREATE TABLE c (x int)", "names no key"),
        ("VACUUM a", "names no key"),
    ],
)
def test_what_cannot_be_done_right_is_refused_with_a_reason_and_a_fix(sql, why):
    """Nothing is guessed, and the caller learns the way out."""
    found = plan(sql)
    assert isinstance(found, Refused)
    assert why in found.reason
    assert found.fix


@pytest.mark.parametrize(
    ("sql", "shards"),
    [
        ("UPDATE a SET x = 1", SHARDS),
        ("DELETE FROM a WHERE k IN (1, 2)", ("s1", "s2")),
        ("INSERT INTO a (k, x) SELECT k, x FROM b", SHARDS),
        ("CREATE TABLE c (x int)", SHARDS),
    ],
)
def test_everywhere_allows_a_write_on_several_shards(sql, shards):
    """Those that its keys name, or all."""
    assert plan(sql, everywhere=True) == WriteEach(shards)


def test_everywhere_does_not_allow_what_would_be_wrong():
    """A join over shards is no matter of permission."""
    assert isinstance(plan("DELETE FROM a USING b WHERE a.x = b.x", everywhere=True), Refused)


def test_an_insert_is_split_by_shard():
    """Each shard gets its rows with the parameters that these use, counted anew."""
    found = plan("INSERT INTO a (k, x) VALUES ($1,$2),($3,$2),(7,'it''s $1') RETURNING x", 1, "x", 3, everywhere=True)
    assert isinstance(found, SplitInsert)
    assert dict(found.rows) == {"s0": (1,), "s1": (0, 2)}
    assert found.text.insert((1,), (1, "x", 3)) == ("INSERT INTO a (k, x) VALUES ($1, $2) RETURNING x", (3, "x"))
    assert found.text.insert((0, 2), (1, "x", 3)) == (
        "INSERT INTO a (k, x) VALUES ($1, $2), (7, 'it''s $1') RETURNING x",
        (1, "x"),
    )


def test_reference_tables_are_read_anywhere_and_written_everywhere():
    """They stand whole on every shard, and must stay alike."""
    assert plan("SELECT * FROM r") == AnyShard(SHARDS)
    assert plan("UPDATE r SET label = $1 WHERE id = 1", "x") == ReferenceWrite(SHARDS)


def test_a_key_is_hashed_as_its_column_holds_it():
    """`'5'` for a bigint is 5, and a uuid may be written as text; what does not fit asks every shard."""
    router, shard_map = Router(SHARDS, CATALOG, statements_max=10), Modulo()
    router.plan("SELECT * FROM a WHERE k = $1", ("5",), shard_map)
    router.plan("SELECT * FROM u WHERE id = $1", ("00000000-0000-4000-8000-000000000001",), shard_map)
    router.plan("SELECT * FROM t WHERE name = $1", ("5",), shard_map)
    assert shard_map.asked == [5, uuid.UUID("00000000-0000-4000-8000-000000000001"), "5"]
    assert isinstance(router.plan("SELECT * FROM t WHERE name = $1", (5,), shard_map), AllShards)


def test_names_fold_as_postgres_folds_them():
    """Unquoted names have no case; quoted ones do."""
    assert plan('SELECT * FROM A WHERE "k" = 1') == OneShard("s1")
    assert isinstance(plan('SELECT * FROM "A" WHERE k = 1'), Refused)
    assert isinstance(plan('SELECT * FROM a WHERE "K" = 1'), AllShards)
    assert plan("SELECT * FROM public.a WHERE k = 1") == OneShard("s1")


def test_two_statements_in_one_text_are_refused():
    """The second one would go where the first belongs."""
    with pytest.raises(CallerError, match="2 statements"):
        plan("SELECT * FROM a WHERE k = 1; DELETE FROM a WHERE k = 2")


def test_a_parameter_that_is_missing_is_said_so():
    """Instead of a shard chosen by something else."""
    with pytest.raises(CallerError, match=r"uses \$1"):
        plan("SELECT * FROM a WHERE k = $1")


def test_the_memory_of_texts_is_bounded():
    """The oldest text goes, and is read again when it comes back."""
    router = Router(SHARDS, CATALOG, statements_max=2)
    for number in range(4):
        router.plan(f"SELECT {number} FROM a WHERE k = 1", (), Modulo())
    assert not router.knows("SELECT 0 FROM a WHERE k = 1")
    assert router.knows("SELECT 3 FROM a WHERE k = 1")


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1 FROM a CROSS JOIN b LEFT JOIN a AS c ON c.k = a.k AND c.k = b.k",
        "SELECT 1 FROM a CROSS JOIN b LEFT JOIN a AS c ON a.k = b.k AND c.k = a.k",
        "SELECT 1 FROM (a CROSS JOIN b) FULL JOIN a AS c ON c.k = a.k AND c.k = b.k",
        "SELECT 1 FROM a CROSS JOIN b LEFT JOIN LATERAL (SELECT FROM a AS c WHERE c.k = a.k AND c.k = b.k) d ON 1 = 1",
        "SELECT 1 FROM a, b WHERE NOT EXISTS (SELECT 1 FROM a AS c WHERE c.k = a.k AND c.k = b.k)",
        "SELECT (SELECT max(c.n) FROM a AS c WHERE c.k = a.k AND c.k = b.k) FROM a, b",
        "SELECT (SELECT count(*) FROM b LEFT JOIN a AS c ON c.k = a.k AND c.k = b.k) FROM a",
        "SELECT 1 FROM a, b WHERE NOT EXISTS "
        "(SELECT 1 FROM a AS c WHERE c.k = b.k AND a.k IN (SELECT d.k FROM a AS d WHERE d.k = c.k))",
        "SELECT 1 FROM a JOIN m ON m.k = a.k",
        "SELECT 1 FROM a JOIN m USING (k)",
        "SELECT 1 FROM a WHERE k IN (SELECT k FROM m)",
        "SELECT 1 FROM a WHERE EXISTS (SELECT 1 FROM m WHERE m.k = a.k)",
        "WITH c(x, k) AS (SELECT k, x FROM a) SELECT 1 FROM c JOIN b USING (k)",
    ],
)
def test_rows_of_several_shards_are_not_taken_for_neighbours(sql):
    """What is looked up by two keys, or by a key with another hash, does not bring their rows to one shard."""
    assert isinstance(plan(sql), Gather)


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1 FROM a JOIN b ON a.k = b.k LEFT JOIN a AS c ON c.k = a.k AND c.k = b.k",
        "SELECT 1 FROM a CROSS JOIN b LEFT JOIN a AS c ON c.k = a.k AND c.k = b.k WHERE a.k = b.k",
        "SELECT 1 FROM a LEFT JOIN (b CROSS JOIN a AS c) ON b.k = a.k AND c.k = a.k",
        "SELECT 1 FROM a FULL JOIN b ON a.k = b.k FULL JOIN a AS c ON c.k = b.k",
        "SELECT 1 FROM a, b WHERE a.k = b.k AND NOT EXISTS (SELECT 1 FROM a AS c WHERE c.k = a.k AND c.k = b.k)",
        "SELECT 1 FROM a WHERE EXISTS (SELECT 1 FROM b, a AS c WHERE b.k = a.k AND c.k = a.k)",
    ],
)
def test_rows_that_are_looked_up_by_one_key_are_neighbours(sql):
    """An outer join or a subquery is answered shard by shard, if the rows that it is run for are on one shard each."""
    assert isinstance(plan(sql), AllShards)


@pytest.mark.parametrize(
    "sql",
    [
        "WITH c(x, k) AS (SELECT k, x FROM a) SELECT 1 FROM c WHERE k = 3",
        "SELECT 1 FROM a WHERE NOT EXISTS (SELECT 1 FROM r WHERE a.k IN (SELECT k FROM b WHERE k = 3))",
    ],
)
def test_a_value_of_something_else_is_not_taken_for_the_key(sql):
    """Columns under new names, and keys that rows must not have, leave every shard to be asked."""
    assert not isinstance(plan(sql), OneShard)


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE a SET k = r.id FROM r WHERE a.k = 3",
        "UPDATE a SET k = r.k FROM (SELECT 4 AS k) AS r WHERE a.k = 3",
        "WITH c AS (UPDATE a SET k = 4 WHERE k = 3 RETURNING 1) UPDATE b SET k = 3 WHERE k = 3",
    ],
)
def test_rows_do_not_get_a_key_of_another_shard(sql):
    """From a column of another table with the key's name, or in a WITH query: they would not be found again."""
    assert isinstance(plan(sql), Refused)


@pytest.mark.parametrize(
    ("table", "kept", "changed"),
    [
        ("p", Decimal("1.50"), Decimal("1.505")),
        ("p", Decimal("1.5000"), Decimal("0.001")),
        ("v", "abc", "abc "),
        ("s", datetime(2026, 1, 1, microsecond=5000), datetime(2026, 1, 1, microsecond=5001)),  # noqa: DTZ001 - as the column
    ],
)
def test_a_key_that_its_column_would_round_or_cut_is_not_hashed(table, kept, changed):
    """Stored, it is another key, under which the row would be looked for elsewhere."""
    insert, select = f"INSERT INTO {table} VALUES ($1, 1)", f"SELECT x FROM {table} WHERE k = $1"
    assert isinstance(plan(insert, kept), OneShard)
    assert isinstance(plan(insert, changed, everywhere=True), Refused)
    assert isinstance(plan(select, changed), AllShards)


@pytest.mark.parametrize("sql", ["INSERT INTO a VALUES ($1, 1, 1)", "INSERT INTO a SELECT $1, 1, 1"])
def test_a_row_whose_key_is_not_known_is_not_written_on_every_shard(sql):
    """`everywhere` allows a write on several shards, not the same row on all of them."""
    assert isinstance(plan(sql, Decimal(3), everywhere=True), Refused)


@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO c (label) VALUES ('x')",
        "INSERT INTO c VALUES (1, 'x')",
        "INSERT INTO c VALUES (1, 'x', '2026-01-01'), (DEFAULT, 'x', '2026-01-01')",
        "INSERT INTO c (id, label) SELECT 1, 'x'",
        "INSERT INTO c DEFAULT VALUES",
    ],
)
def test_a_reference_table_gets_no_value_that_each_shard_makes_for_itself(sql):
    """A sequence or now() as a default would give its copies different rows."""
    found = plan(sql)
    assert isinstance(found, Refused)
    assert "default" in found.reason
    assert isinstance(plan("INSERT INTO c VALUES (1, 'x', '2026-01-01')"), ReferenceWrite)


def test_an_aggregate_of_the_users_own_is_not_run_shard_by_shard():
    """Nobody has said how its partial results would be combined."""
    router = Router(SHARDS, CATALOG, statements_max=10, aggregates={"product"})
    assert isinstance(router.plan("SELECT product(n) FROM a", (), Modulo()), Gather)


def test_an_ordinal_behind_a_star_is_the_column_that_stands_there():
    """Only the server knows which that is, so its text form cannot be asked for."""
    for sql in ("SELECT * FROM a ORDER BY 3", "SELECT *, x AS y, n AS z FROM a ORDER BY 3"):
        division = plan(sql).division
        assert (division.order[0].position, division.in_text) == (2, None)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize(
    "sql",
    [
        "INSERT INTO a VALUES (1, 1, 1) RETURNING (SELECT count(*) FROM a)",
        "INSERT INTO a VALUES (1, 1, 1), (2, 1, 1) RETURNING (SELECT count(*) FROM b)",
        "INSERT INTO a VALUES (1, 1, 1) ON CONFLICT (k) DO UPDATE SET x = (SELECT count(*) FROM a)",
        "INSERT INTO a VALUES (1, 1, 1) ON CONFLICT (k) DO UPDATE SET x = 1 WHERE a.n < (SELECT max(n) FROM b)",
    ],
)
def test_what_an_insert_looks_up_must_be_on_its_shard(sql, everywhere):
    """In RETURNING and ON CONFLICT, too: one shard's rows would pass for all."""
    assert isinstance(plan(sql, everywhere=everywhere), Refused)


def test_an_insert_may_look_up_rows_of_its_own_key():
    """They are on the same shard."""
    sql = "INSERT INTO a VALUES (1, 1, 1) RETURNING (SELECT count(*) FROM b WHERE b.k = 1)"
    assert plan(sql) == OneShard("s1")


@pytest.mark.parametrize("sql", ["PREPARE TRANSACTION 'x'", "prepare /**/ transaction 'x'", "PREPARE p AS SELECT 1"])
def test_what_nobody_would_end_is_not_begun(sql: str) -> None:
    """A prepared transaction or statement that a text makes is refused, on every shard too."""
    assert isinstance(plan(sql, everywhere=True), Refused)


def test_a_merge_is_not_run_on_every_shard():
    """Each of them would insert the rows that it does not find."""
    sql = "MERGE INTO a USING b ON a.k = b.k WHEN NOT MATCHED THEN INSERT VALUES (b.k, 1, 1)"
    found = plan(sql, everywhere=True)
    assert isinstance(found, Refused)
    assert "MERGE" in found.reason


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT nextval('q'), x FROM a",
        "UPDATE a SET x = nextval('q')",
        "INSERT INTO a VALUES (1, nextval('q')), (2, 0)",
    ],
)
def test_a_sequence_does_not_count_over_several_shards(sql):
    """Each of them has one of its own, and would give the same numbers."""
    found = plan(sql, everywhere=True)
    assert isinstance(found, Refused)
    assert "nextval" in found.reason
    assert plan("UPDATE a SET x = nextval('q') WHERE k = 1") == OneShard("s1")


@pytest.mark.parametrize("condition", ["random() < 0.5 + 0 * a.n", "mine(a.n) > 0"])
def test_a_condition_that_may_answer_differently_is_asked_once(condition):
    """Applied where rows are gathered and again over these, half of them would become a quarter."""
    found = plan(f"SELECT a.x FROM a JOIN b ON a.x = b.x WHERE {condition} AND a.n > 1")
    assert isinstance(found, Gather)
    pulled = "".join("".join(pull.select.pieces) for pull in found.gathering.pulls)
    assert condition[:5] not in pulled.lower()
    assert "> 1" in pulled
