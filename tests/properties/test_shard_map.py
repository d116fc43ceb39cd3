"""The shard map: every key has one home at any epoch, and a change moves only what it must."""

from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.database import DatabaseConfig, KeyRange, ListedKey, ShardConfig, ShardMap
from headrace.database.placement.keys import in_utc, kind_of, read, written
from headrace.database.placement.quotas import quotas, replace_slots
from headrace.database.shard_map import rule_from_json, rule_to_json
from headrace.errors import CallerError

names = st.text(min_size=1, max_size=8)
weights = st.dictionaries(names, st.floats(0.1, 10, allow_nan=False), min_size=1, max_size=6)
integers = st.integers(-(2**63), 2**63 - 1)
keys = st.one_of(
    integers,
    st.booleans(),
    st.text(st.characters(codec="utf-8")),
    st.binary(),
    st.uuids(),
    st.dates(),
    st.datetimes(),
    st.datetimes(timezones=st.timezones()),
    st.decimals(allow_nan=False, allow_infinity=False),
)


def bounds_of(shares):
    """Of each shard, its exact share rounded down and up."""
    return {name: (int(share), -int(-share // 1)) for name, share in shares.items()}


def shares_of(slots, shards):
    """Of each shard, its exact share of the slots."""
    total = sum(map(Fraction, shards.values()))
    return {name: slots * Fraction(weight) / total for name, weight in shards.items()}


def least_moves(current, shards):
    """The fewest moves to any placement whose counts are the exact shares, rounded down or up."""
    bounds = bounds_of(shares_of(len(current), shards))
    held = {name: current.count(name) for name in {*shards, *current}}
    missing = sum(max(0, bounds[name][0] - held[name]) for name in shards)
    surplus = sum(max(0, held[name] - bounds.get(name, (0, 0))[1]) for name in held)
    return max(missing, surplus)


def configured(strategy, shards, **options):
    """A configuration of these shards."""
    made = tuple(ShardConfig(name=name, dsn="", weight=weight) for name, weight in shards.items())
    return DatabaseConfig(strategy=strategy, shards=made, slots=256, **options)


@st.composite
def maps(draw):
    """A first map of any strategy, and keys that it must place."""
    shards, strategy = draw(weights), draw(st.sampled_from(["hash", "range", "directory"]))
    listed = draw(st.lists(keys, max_size=5, unique_by=lambda key: (kind_of(key), key)))
    home = st.sampled_from(sorted(shards))
    if strategy == "directory":
        directory = tuple(ListedKey(key=key, shard=draw(home)) for key in listed)
        return ShardMap.of(configured(strategy, shards, directory=directory)), [*listed, *draw(st.lists(keys))]
    if strategy == "range":
        limits = sorted(draw(st.sets(integers, min_size=len(shards) - 1, max_size=9)))
        owners = [*sorted(shards), *(draw(home) for _ in range(len(limits) + 1 - len(shards)))]
        ranges = [KeyRange(until=until, shard=owner) for until, owner in zip([*limits, None], owners, strict=True)]
        near = [key + step for key in limits for step in (-1, 0, 1) if -(2**63) <= key + step < 2**63]
        return ShardMap.of(configured(strategy, shards, ranges=tuple(ranges), key_type="integer")), near
    return ShardMap.of(configured(strategy, shards)), draw(st.lists(keys))


@settings(max_examples=150)
@given(maps(), st.lists(weights, max_size=4))
def test_every_key_has_exactly_one_shard_at_any_epoch(made, changes):
    """Whatever is rebalanced: its slot stays, lies in the map, and names one shard that is there."""
    shard_map, some_keys = made
    slots = {index: shard_map.slot(key) for index, key in enumerate(some_keys)}
    history = [shard_map]
    for shards in changes if shard_map.hashed else []:
        history.append(history[-1].rebalanced(shards))
    for epoch, current in enumerate(history, 1):
        for index, key in enumerate(some_keys):
            placement = current.locate(key)
            assert placement.slot == slots[index]
            assert placement.shard == current.shards[placement.slot]
            assert placement.epoch == current.epoch == epoch


@settings(max_examples=150)
@given(st.lists(integers, min_size=1, max_size=9, unique=True), st.lists(integers))
def test_ranges_have_neither_gap_nor_overlap(limits, some_keys):
    """Of the ranges as they are written, exactly one holds a key, and that is the one of its slot."""
    limits.sort()
    ranges = tuple(KeyRange(until=until, shard=f"s{index}") for index, until in enumerate([*limits, None]))
    shard_map = ShardMap.of(configured("range", {each.shard: 1.0 for each in ranges}, ranges=ranges))
    for key in [*limits, *some_keys]:
        holding = [
            each.shard
            for each, start in zip(ranges, [None, *limits], strict=True)
            if (start is None or start <= key) and (each.until is None or key < each.until)
        ]
        assert holding == [shard_map.locate(key).shard]


@settings(max_examples=300)
@given(weights, weights)
def test_a_change_moves_exactly_the_theoretical_minimum(before, after):
    """From any weights to any others, shards added and drained among them: not one slot more than must."""
    current = ShardMap.plan(256, {name: max(weight, 1.0) for name, weight in before.items()})
    following = current.rebalanced(after)
    assert len(current.moves_to(following)) == least_moves(current.shards, after)


@settings(max_examples=200)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=64), weights)
def test_the_minimum_is_reached_from_any_placement(current, shards):
    """Also from one that no weights have made."""
    following = replace_slots(current, shards)
    moved = sum(one != other for one, other in zip(current, following, strict=True))
    assert moved == least_moves(current, shards)


@settings(max_examples=200)
@given(weights, st.integers(0, 4096), st.data())
def test_weights_are_shares(shards, slots, data):
    """Every count is the exact share, rounded down or up, whatever is held before, and together they are all."""
    held = data.draw(st.fixed_dictionaries({name: st.integers(0, 4096) for name in shards}))
    counts, bounds = quotas(slots, shards, held=held), bounds_of(shares_of(slots, shards))
    assert sum(counts.values()) == slots
    assert all(bounds[name][0] <= counts[name] <= bounds[name][1] for name in shards)


@settings(max_examples=100)
@example(1, 0.3333333333333333)  # its share is a little less than 1024, and 1023 slots are no further than one from it
@given(st.integers(1, 6), st.floats(0.25, 4))
def test_a_new_shard_takes_slots_and_nobody_else_does(count, weight):
    """Whatever moves when a shard is added moves to that shard: its share of 4096, rounded."""
    shards = {f"s{number}": 1.0 for number in range(count)}
    before = ShardMap.plan(4096, shards)
    grown = {**shards, "new": weight}
    after = before.rebalanced(grown)
    moved = before.moves_to(after)
    assert {move.target for move in moved} == {"new"}
    assert abs(len(moved) - shares_of(4096, grown)["new"]) < 1


@settings(max_examples=50)
@given(st.dictionaries(names, st.sampled_from([1.0, 2.0, 0.5]), min_size=1, max_size=6))
def test_everybody_plans_the_same(shards):
    """The order in which shards are configured means nothing."""
    backwards = dict(reversed(shards.items()))
    assert ShardMap.plan(256, shards) == ShardMap.plan(256, backwards)
    grown = {**shards, "the new shard": 1.0}
    planned = ShardMap.plan(256, shards)
    assert planned.rebalanced(grown) == planned.rebalanced(dict(reversed(grown.items())))


@settings(max_examples=150)
@given(maps())
def test_a_rule_survives_being_kept(made):
    """What is written into the shards and read again gives every key the same slot."""
    shard_map, some_keys = made
    again = rule_from_json(rule_to_json(shard_map.rule))
    assert again == shard_map.rule
    assert [again.slot(key) for key in some_keys] == [shard_map.slot(key) for key in some_keys]


@settings(max_examples=150)
@given(keys)
def test_a_key_survives_being_written(key):
    """Its kind and its value."""
    assert read(*written(key)) == in_utc(key)
    assert kind_of(read(*written(key))) == kind_of(key)


@settings(max_examples=50)
@given(weights, st.lists(keys, min_size=1, unique_by=lambda key: (kind_of(key), key)))
def test_a_key_that_gets_a_shard_of_its_own_moves_nobody(shards, listed):
    """In a directory that refuses others, each assignment is one more slot, and every earlier key stays."""
    shard_map = ShardMap.of(configured("directory", shards, directory_others="refuse"))
    homes = {}
    for number, key in enumerate(listed):
        with pytest.raises(CallerError, match="does not list"):
            shard_map.locate(key)
        homes[number] = sorted(shards)[number % len(shards)]
        shard_map = shard_map.with_key(key, homes[number])
        assert [shard_map.locate(each).shard for each in listed[: number + 1]] == list(homes.values())
