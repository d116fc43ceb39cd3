"""Which standing indexes could go."""

from typing import Any

from headrace.database.indexes.index import StandingIndex
from headrace.database.indexes.redundant import UNUSED_AFTER_S, superfluous


def index(name: str, *key: str, scans: int = 1, age_s: float | None = 30 * 86_400, **facts: Any) -> StandingIndex:
    method = facts.get("method", "btree")
    definition = f"CREATE INDEX {name} ON t USING {method} ({', '.join(key)})"
    return StandingIndex(name=name, table="t", definition=definition, key=key, scans=scans, age_s=age_s, **facts)


def dropped(*indexes: StandingIndex) -> dict[str, str]:
    return {each.name: each.reason for each in superfluous({"a": indexes}) if each.drop}


def test_the_beginning_of_another_index_can_go():
    """Whatever it finds, the longer one finds."""
    assert dropped(index("long", "a", "b"), index("short", "a")) == {"short": "a beginning of long"}


def test_of_two_copies_one_stays():
    """The one named first, or the one that enforces something."""
    assert dropped(index("x", "a"), index("y", "a")) == {"y": "the same as x"}
    assert dropped(index("x", "a"), index("y", "a", unique=True, constraint="pk")) == {"x": "the same as y"}


def test_what_enforces_something_stays():
    """Unique indexes, constraints and identities, used or not."""
    kept = [
        index("x", "a", "b"),
        index("u", "a", unique=True, scans=0),
        index("c", "a", constraint="fk", scans=0),
        index("i", "a", identity=True, scans=0),
    ]

    assert dropped(*kept) == {}


def test_another_order_or_other_rows_are_another_index():
    """Direction, operator class and condition are part of it."""
    assert dropped(index("x", "a DESC", "b"), index("y", "a"), index("z", "a text_pattern_ops")) == {}
    assert dropped(index("x", "a", "b"), index("y", "a", where="c IS NULL")) == {}


def test_what_a_leaf_holds_counts():
    """A covering index is no beginning of one that does not cover as much."""
    assert dropped(index("x", "a", "b"), index("y", "a", include=("c",))) == {}
    assert dropped(index("x", "a", "b", include=("c",)), index("y", "a", include=("b",))) == {"y": "a beginning of x"}


def test_only_a_btree_has_a_beginning():
    """GIN over two columns is not searched like one over the first."""
    assert dropped(index("x", "a", "b", method="gin"), index("y", "a", method="gin")) == {}


def test_what_nobody_reads_can_go():
    """If the statistics are old enough to say so."""
    [advice] = superfluous({"a": [index("x", "a", scans=0)]})
    [young] = superfluous({"a": [index("x", "a", scans=0, age_s=UNUSED_AFTER_S - 1)]})
    [unknown] = superfluous({"a": [index("x", "a", scans=0, age_s=None)]})

    assert (advice.drop, advice.reason) == (True, "never read")
    assert advice.evidence[0] == "0 scans on a in 30.0 days of statistics"
    assert (young.drop, unknown.drop) == (False, False)
    assert "younger than 7 days" in young.reason


def test_a_reader_on_any_shard_keeps_it():
    """The shards have the same indexes, or they differ in their plans."""
    shards = {"a": [index("x", "a", scans=0)], "b": [index("x", "a", scans=3)]}

    assert superfluous(shards) == []


def test_what_stands_on_one_shard_alone_is_compared_there():
    """An index that another one covers on every shard it is on can go; its size is that of all."""
    shards = {
        "a": [index("long", "a", "b"), index("short", "a", size_bytes=10)],
        "b": [index("long", "a", "b"), index("short", "a", size_bytes=5)],
        "c": [index("long", "a", "b")],
    }

    [advice] = superfluous(shards)

    assert (advice.name, advice.drop, advice.size_bytes) == ("short", True, 15)


def test_an_invalid_index_is_told_and_not_dropped():
    """It may be one that is being built."""
    [advice] = superfluous({"a": [index("x", "a", valid=False)]})

    assert not advice.drop
    assert "invalid on a" in advice.reason


def test_an_index_behind_a_foreign_key_is_not_unused():
    """Nobody may have deleted for a week; whoever does would read the whole table. A copy of another may go."""
    [found] = superfluous({"a": [index("x", "a", scans=0, refers="of_parent")]})

    assert not found.drop
    assert "of_parent" in found.reason
    assert dropped(index("x", "a", "b"), index("y", "a", scans=0, refers="of_parent")) == {"y": "a beginning of x"}
