"""The kept shard map is compared before anything is served under another one."""

import pytest

from headrace.database import ShardMap
from headrace.database.kept_map import KeptMap, check_map
from headrace.errors import ConfigError

TWO = ShardMap.plan(64, {"a": 1.0, "b": 1.0})


def test_the_same_placement_is_no_difference():
    """Weights are compared by what they lead to: doubling all of them moves nothing."""
    check_map(KeptMap("a", TWO), KeptMap("a", ShardMap.plan(64, {"a": 2.0, "b": 2.0}, epoch=2)))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (ShardMap.plan(64, {"a": 1.0}), r"64 slots \(a: \d+, b: \d+\);.*64 slots \(a: 64\), under.* \d+ slots would"),
        (ShardMap.plan(64, {"a": 1.0, "c": 1.0}), r"b: \d+\);.*c: \d+\)"),
        (ShardMap.plan(64, {"a": 1.0, "b": 1.0, "c": 1.0}), r"b: \d+\);.*c: \d+\)"),
        (ShardMap.plan(64, {"a": 9.0, "b": 1.0}), r"the keys of \d+ slots"),
        (ShardMap.plan(128, {"a": 1.0, "b": 1.0}), r"of 64 slots.*of 128 slots.*most keys"),
    ],
)
def test_another_placement_is_refused(given, said):
    """With both maps, how much would be looked for elsewhere, and what to configure."""
    with pytest.raises(ConfigError, match=said) as caught:
        check_map(KeptMap("a", TWO), KeptMap("a", given))
    assert "names, weights and number of slots" in caught.value.fix


def test_a_dsn_that_leads_to_another_shard_is_refused():
    """Two exchanged connection strings would exchange the data of two shards."""
    with pytest.raises(ConfigError, match="dsn of 'a' leads to the Postgres that holds shard 'b'"):
        check_map(KeptMap("b", TWO), KeptMap("a", TWO))
