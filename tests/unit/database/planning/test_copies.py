"""What may not be written to a reference table, because its copies would differ from then on."""

import pytest

from headrace.database.planning.route import ReferenceWrite, Refused, Router
from headrace.database.planning.scope import TableFacts

CATALOG = {"c": TableFacts(None, "", ("id", "label", "made"), frozenset({"id", "made"}))}


def plan(sql):
    return Router(("s0", "s1"), CATALOG, statements_max=10).plan(sql, (), None)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("UPDATE c SET made = DEFAULT", "default of 'made'"),
        ("UPDATE c SET (label, made) = ('x', DEFAULT)", "default of 'made'"),
        ("INSERT INTO c VALUES (1, 'x', NULL) ON CONFLICT (id) DO UPDATE SET made = DEFAULT", "default of 'made'"),
        ("UPDATE c SET made = 'now'::timestamptz", "'now'"),
        ("UPDATE c SET made = timestamptz 'Today '", "'Today '"),
        ("UPDATE c SET label = xmin::text", "xmin"),
        ("DELETE FROM c WHERE ctid = '(0,1)'", "ctid"),
        ("UPDATE c SET label = current_catalog", "current_catalog"),
        ("UPDATE c SET label = session_user", "session_user"),
        ("DELETE FROM c WHERE id IN (SELECT id FROM c LIMIT 1)", "LIMIT"),
        ("DELETE FROM c WHERE id IN (SELECT id FROM c OFFSET 1)", "LIMIT"),
        ("INSERT INTO c SELECT row_number() OVER (), label, made FROM c", "window"),
    ],
)
def test_what_each_shard_would_answer_for_itself_is_refused(sql, said):
    """Defaults, clocks in text, a row's place on disk, the order in which rows happen to lie."""
    found = plan(sql)
    assert isinstance(found, Refused)
    assert said in found.reason


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE c SET label = DEFAULT",
        "INSERT INTO c VALUES (1, 'now', NULL) ON CONFLICT (id) DO UPDATE SET label = excluded.label",
        "DELETE FROM c WHERE id IN (SELECT id FROM c ORDER BY id LIMIT 1)",
        "INSERT INTO c SELECT row_number() OVER (ORDER BY id), label, made FROM c",
    ],
)
def test_what_follows_from_the_rows_alone_is_written(sql):
    """A default that is a constant, a text that only looks like a clock, rows in an order that was asked for."""
    assert isinstance(plan(sql), ReferenceWrite)
