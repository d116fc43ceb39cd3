"""The messages of pgoutput become facts about transactions and tables."""

import struct

import pytest

from headrace.database.query_cache.pgoutput import Changed, Decoder, Told


def begin(xid):
    return b"B" + struct.pack(">qqI", 1, 2, xid)


COMMIT = b"C" + struct.pack(">Bqqq", 0, 1, 2, 3)
RELATION = b"R" + struct.pack(">I", 9) + b"public\0t\0d\0\0"


def row(kind, oid):
    return kind + struct.pack(">I", oid) + b"N\0\0"


def told(decoder, *messages):
    return [fact for message in messages if (fact := decoder.read(message)) is not None]


def test_a_commit_tells_of_all_tables_of_its_transaction():
    """Once, with the id of the transaction, whatever was done to the rows."""
    facts = told(Decoder(), begin(7), RELATION, row(b"I", 9), row(b"U", 8), row(b"D", 9), COMMIT)

    assert facts == [Changed(7, frozenset({8, 9}))]


def test_transactions_do_not_leak_into_each_other():
    """What was begun and never committed here is not told with the next."""
    facts = told(Decoder(), begin(7), row(b"I", 9), begin(8), row(b"I", 5), COMMIT, begin(9), COMMIT)

    assert facts == [Changed(8, frozenset({5}))]


def test_truncate_names_several_tables():
    """All of them are changed."""
    truncate = b"T" + struct.pack(">IBII", 2, 1, 4, 5)

    assert told(Decoder(), begin(7), truncate, COMMIT) == [Changed(7, frozenset({4, 5}))]


def test_messages_are_handed_on():
    """With prefix and content, inside a transaction or outside."""
    message = b"M" + struct.pack(">Bq", 0, 77) + b"headrace\0" + struct.pack(">I", 5) + b"abc:1"

    assert told(Decoder(), message) == [Told("headrace", b"abc:1")]


@pytest.mark.parametrize("kind", [b"Y", b"O"])
def test_what_is_of_no_interest_is_passed_over(kind):
    """Types and origins say nothing of tables."""
    assert told(Decoder(), begin(7), kind + b"\0" * 16, row(b"I", 3), COMMIT) == [Changed(7, frozenset({3}))]
