"""What is read out of a statement's text."""

import logging
import time

import pytest

from headrace.database.planning.route import OneShard, Router
from headrace.database.planning.scope import TableFacts
from headrace.database.planning.statement import Kind, read_statement
from headrace.database.shard_map import ShardMap

CATALOG = {"a": TableFacts("k", "bigint", ("k", "x"))}


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("SELECT 1", Kind.SELECT),
        ("VALUES (1)", Kind.SELECT),
        ("SELECT 1 UNION SELECT 2", Kind.SELECT),
        ("INSERT INTO a VALUES (1)", Kind.INSERT),
        ("UPDATE a SET x = 1", Kind.UPDATE),
        ("DELETE FROM a", Kind.DELETE),
        ("CREATE INDEX ON a (x)", Kind.SCHEMA),
        ("TRUNCATE a", Kind.SCHEMA),
        ("VACUUM a", Kind.OTHER),
        ("EXPLAIN SELECT 1", Kind.OTHER),
        ("this is no SQL at all (", Kind.OTHER),
    ],
)
def test_the_kind_says_what_a_statement_does(sql, kind):
    """What nobody understands is OTHER, not a guess."""
    assert read_statement(sql, CATALOG).kind is kind


@pytest.mark.parametrize(
    ("sql", "is_read_only"),
    [
        ("SELECT x FROM a", True),
        ("SELECT lower(x), now() FROM a", True),
        ("SELECT x FROM a FOR SHARE", False),
        ("SELECT nextval('s')", False),
        ("SELECT random() FROM a", False),
        ("SELECT my_function(x) FROM a", False),
        ("WITH d AS (DELETE FROM a RETURNING x) SELECT * FROM d", False),
        ("SELECT * INTO b FROM a", False),
        ("UPDATE a SET x = 1", False),
    ],
)
def test_only_what_is_known_to_change_nothing_is_read_only(sql, is_read_only):
    """A function that nobody knows might do anything."""
    assert read_statement(sql, CATALOG).read_only is is_read_only


def test_parameters_are_found_beside_each_other_and_not_in_quotes():
    """`$1,$2` is no dollar quote, and what stands in strings or comments is no parameter."""
    sql = "SELECT $1,$2,'$3',$$ $4 $$,$tag$ $5 $tag$,\"$6\",E'\\'$7' /* $8 */ FROM a -- $9"
    assert read_statement(sql, CATALOG).parameters == 2


def test_reading_is_silent(caplog):
    """What sqlglot has to say about strange statements is nothing that a user can act on."""
    with caplog.at_level(logging.DEBUG):
        read_statement("CALL f()", CATALOG)
    assert not [record for record in caplog.records if record.name.partition(".")[0] in {"sqlglot", "headrace"}]


def test_a_statement_that_was_read_before_is_routed_in_microseconds():
    """Far from the budget of 5 us even on a busy machine, measured as the best of many."""
    router = Router(("s0", "s1"), CATALOG, statements_max=10)
    shard_map = ShardMap.plan(4096, {"s0": 1.0, "s1": 1.0})
    sql = "SELECT x FROM a WHERE k = $1"
    best = float("inf")
    for _ in range(200):
        start = time.perf_counter()
        for key in range(50):
            plan = router.plan(sql, (key,), shard_map)
        best = min(best, (time.perf_counter() - start) / 50)
    assert isinstance(plan, OneShard)
    assert best < 20e-6
