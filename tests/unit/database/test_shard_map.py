"""The shard map: rules for slots, one table of shards, changes that hide no row."""

import datetime
import uuid
from zoneinfo import ZoneInfo

import pytest

from headrace.database import DatabaseConfig, KeyRange, ListedKey, ShardConfig, ShardMap
from headrace.database.shard_map import rule_from_json, rule_to_json
from headrace.errors import CallerError, ConfigError

SHARDS = tuple(ShardConfig(name=name, dsn="") for name in "abc")


def directory(others="hash", **keys):
    """A map whose directory lists these text keys."""
    listed = tuple(ListedKey(key=key, shard=shard) for key, shard in keys.items())
    return ShardMap.of(
        DatabaseConfig(shards=SHARDS, strategy="directory", slots=16, directory=listed, directory_others=others)
    )


def test_the_first_placement_is_part_of_the_data():
    """It is computed again at every open: another result in a later release would hide rows."""
    shard_map = ShardMap.plan(16, {"b": 1.0, "a": 2.0, "c": 0.3})
    assert "".join(shard_map.shards) == "aaaaaaaaaabbbbbc"
    assert [shard_map.slot(key) for key in (1, "acme", uuid.UUID(int=1), b"x")] == [6, 14, 9, 9]


def test_a_listed_key_has_a_slot_that_nobody_shares():
    """So a tenant can be moved alone; all others are hashed."""
    shard_map = directory(acme="c", umbrella="c")
    assert shard_map.locate("acme") == ("c", 16, 1)
    assert shard_map.locate("umbrella") == ("c", 17, 1)
    assert all(shard_map.locate(str(number)).slot < 16 for number in range(200))


def test_keys_of_different_types_are_different_keys():
    """Although 1 == True in Python, and a text may look like a number."""
    listed = (ListedKey(key=1, shard="c"),)
    shard_map = ShardMap.of(DatabaseConfig(shards=SHARDS, strategy="directory", slots=16, directory=listed))
    assert shard_map.slot(1) == 16
    assert shard_map.slot(True) < 16
    assert shard_map.slot("1") < 16


def test_a_listed_instant_is_found_in_every_time_zone():
    """In the hour that comes twice, too: in none does Python call an instant of it equal to one of another zone."""
    berlin = ZoneInfo("Europe/Berlin")
    for fold in (0, 1):
        twice = datetime.datetime(2025, 10, 26, 2, 30, tzinfo=berlin, fold=fold)
        listed = (ListedKey(key=twice, shard="c"),)
        rule = ShardMap.of(DatabaseConfig(shards=SHARDS, strategy="directory", slots=16, directory=listed)).rule
        for kept in (rule, rule_from_json(rule_to_json(rule))):
            assert [kept.slot(key) for key in (twice, twice.astimezone(datetime.UTC))] == [16, 16]
            assert kept.slot(twice.replace(fold=1 - fold)) < 16


def test_an_instant_that_utc_has_no_year_for_is_a_key():
    """The first hours of the year 1 are in the year 0 elsewhere."""
    first = datetime.datetime(1, 1, 1, tzinfo=datetime.timezone(datetime.timedelta(hours=9)))
    listed = (ListedKey(key=first, shard="c"),)
    rule = ShardMap.of(DatabaseConfig(shards=SHARDS, strategy="directory", slots=16, directory=listed)).rule
    assert rule_from_json(rule_to_json(rule)).slot(first) == 16


def test_a_directory_may_refuse_whom_it_does_not_list():
    """With the way to list him."""
    shard_map = directory("refuse", acme="b")
    assert shard_map.locate("acme").shard == "b"
    with pytest.raises(CallerError, match="does not list the key 'other'") as caught:
        shard_map.locate("other")
    assert "assign" in caught.value.fix


def test_listing_a_key_never_moves_it():
    """One that is hashed may be listed where it lives, to be moved alone later; and nobody is listed twice."""
    shard_map = directory()
    home = shard_map.locate("acme").shard
    following = shard_map.with_key("acme", home)
    assert (following.locate("acme"), following.epoch) == ((home, 16, 2), 2)
    other = next(name for name in "abc" if name != home)
    with pytest.raises(CallerError, match=f"lives on {home}, and its rows do not move"):
        shard_map.with_key("acme", other)
    with pytest.raises(CallerError, match="lives on"):
        following.with_key("acme", home)


@pytest.mark.parametrize("config", [{}, {"strategy": "range", "ranges": (KeyRange(shard="a"),)}])
def test_only_a_directory_lists_keys(config):
    """Other strategies say what theirs is."""
    shards = SHARDS[:1] if config else SHARDS
    with pytest.raises(CallerError, match="it lists no keys"):
        ShardMap.of(DatabaseConfig(shards=shards, **config)).with_key("x", "a")


def test_a_range_takes_keys_of_its_kind_only():
    """A text is neither above nor below a number."""
    ranges = (KeyRange(until=10, shard="a"), KeyRange(until=20, shard="b"), KeyRange(shard="c"))
    shard_map = ShardMap.of(DatabaseConfig(shards=SHARDS, strategy="range", ranges=ranges))
    assert [shard_map.locate(key).shard for key in (-(2**63), 9, 10, 19, 20, 2**63 - 1)] == list("aabbcc")
    for key in ("15", True, uuid.UUID(int=1)):
        with pytest.raises(CallerError, match="the ranges of the shard map are of integer keys"):
            shard_map.locate(key)


def test_ranges_and_listed_keys_are_not_shared_out_by_weight():
    """Where they live was decided by somebody; only hashed slots are rebalanced."""
    ranges = (KeyRange(until=10, shard="a"), KeyRange(until=20, shard="b"), KeyRange(shard="c"))
    with pytest.raises(CallerError, match="weights say nothing"):
        ShardMap.of(DatabaseConfig(shards=SHARDS, strategy="range", ranges=ranges)).rebalanced({"a": 1.0})
    following = directory(acme="c").rebalanced({"a": 1.0, "b": 1.0})
    assert following.locate("acme").shard == "c"
    assert set(following.shards[:16]) == {"a", "b"}


def test_maps_of_different_rules_have_no_moves_between_them():
    """Their slot 3 is not the same slot."""
    with pytest.raises(CallerError, match="different rules"):
        ShardMap.plan(16, {"a": 1.0}).moves_to(ShardMap.plan(32, {"a": 1.0}))


def test_a_map_of_a_later_release_is_refused():
    """Its strategy is not guessed."""
    with pytest.raises(ConfigError, match="'quantum', which this headrace does not know"):
        rule_from_json({"strategy": "quantum"})
