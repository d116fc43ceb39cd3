"""The shard map: every key has one home, and a new shard takes only what it must."""

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.database.shard_map import ShardMap

weights = st.dictionaries(st.text(min_size=1, max_size=8), st.floats(0.1, 10, allow_nan=False), min_size=1, max_size=5)


@settings(max_examples=25, deadline=None)
@given(weights, st.one_of(st.integers(-(2**63), 2**63 - 1), st.text(), st.binary()))
def test_every_key_has_exactly_one_shard(shards, key):
    """A key's slot lies in the map and names a shard that exists."""
    planned = ShardMap.plan(256, shards)
    placement = planned.locate(key)
    assert 0 <= placement.slot < 256
    assert placement.shard == planned.shards[placement.slot]
    assert placement.shard in shards


@settings(max_examples=25, deadline=None)
@given(weights, st.floats(0.1, 10))
def test_a_new_shard_takes_slots_and_nobody_else_does(shards, weight):
    """Whatever moves when a shard is added moves to that shard."""
    before = ShardMap.plan(256, shards)
    after = ShardMap.plan(256, {**shards, "the new shard": weight})
    moved = {after.shards[slot] for slot in range(256) if before.shards[slot] != after.shards[slot]}
    assert moved <= {"the new shard"}


@settings(max_examples=10, deadline=None)
@given(weights)
def test_weights_are_shares(shards):
    """A shard's part of 4096 slots is its part of the weights, give or take six standard deviations."""
    planned = ShardMap.plan(4096, shards)
    total = sum(shards.values())
    for name, weight in shards.items():
        share = weight / total
        deviation = (share * (1 - share) / 4096) ** 0.5
        assert abs(planned.shards.count(name) / 4096 - share) <= 6 * deviation + 1e-9
