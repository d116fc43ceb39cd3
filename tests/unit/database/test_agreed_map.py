"""A map that is agreed on with each shard by whoever asks it: what is taken over, and what is refused."""

import json
from dataclasses import replace

import pytest

from headrace.database import AgreedMap, DatabaseConfig, ListedKey, ShardConfig, ShardMap
from headrace.errors import CallerError, ConfigError, ShardMapOutdated

CONFIG = DatabaseConfig(shards=(ShardConfig(name="a", dsn="a"), ShardConfig(name="b", dsn="b")), slots=64)
PLAN = ShardMap.of(CONFIG)
KEY = next(key for key in range(99) if PLAN.locate(key).shard == "a")


def moved(shard_map: ShardMap, key: int, to: str) -> ShardMap:
    """The next map, in which the key's slot is elsewhere."""
    shards = list(shard_map.shards)
    shards[shard_map.slot(key)] = to
    return replace(shard_map, epoch=shard_map.epoch + 1, shards=tuple(shards))


def answer(shard: str, shard_map: ShardMap) -> str:
    """What a shard of that name answers that keeps the map."""
    names = list(shard_map.names)
    slots = [names.index(name) for name in shard_map.shards]
    return json.dumps({"shard": shard, "epoch": shard_map.epoch, "names": names, "slots": slots, "home": "a"})


def test_a_shard_is_asked_for_everything_once_and_then_for_news():
    """The question of a transaction on a shard that agreed is answered without a row."""
    shards = AgreedMap(CONFIG)
    assert "WHERE" not in shards.question("a")

    shards.confirm(KEY, "a", answer("a", PLAN))
    assert shards.question("a").endswith("WHERE epoch <> 1")
    assert "WHERE" not in shards.question("b")

    shards.confirm(KEY, "a", None)
    assert shards.shard_map == PLAN


def test_a_newer_map_is_taken_over_and_refuses_whoever_came_by_the_older_one():
    """The key that moved is refused where it was, and found where it is; others go on."""
    shards, newer = AgreedMap(CONFIG), moved(PLAN, KEY, "b")
    stays = next(key for key in range(99) if newer.locate(key).shard == "a")

    with pytest.raises(ShardMapOutdated, match=f"key {KEY} lives on b since the shard map of epoch 2, not on a"):
        shards.confirm(KEY, "a", answer("a", newer))
    shards.confirm(stays, "a", None)
    assert shards.locate(KEY) == ("b", PLAN.slot(KEY), 2)
    assert shards.question("a").endswith("WHERE epoch <> 2")


def test_one_who_asked_before_another_thread_took_over_is_refused_too():
    """No news from a shard that was not told yet does not outweigh what another shard told meanwhile."""
    shards = AgreedMap(CONFIG)
    shards.hear("a", answer("a", PLAN))
    shards.hear("b", answer("b", moved(PLAN, KEY, "b")))

    with pytest.raises(ShardMapOutdated, match="lives on b"):
        shards.confirm(KEY, "a", None)


def test_a_shard_that_was_not_told_yet_takes_nothing_back():
    """Epochs only rise; what the shard keeps from before is no contradiction."""
    shards = AgreedMap(CONFIG)
    shards.hear("b", answer("b", moved(PLAN, KEY, "b")))
    shards.hear("a", answer("a", PLAN))

    assert shards.locate(KEY).shard == "b"


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (None, "'a' keeps no shard map"),
        (answer("b", PLAN), "dsn of 'a' leads to the Postgres that holds shard 'b'"),
        (answer("b", moved(PLAN, KEY, "b")), "dsn of 'a' leads to the Postgres that holds shard 'b'"),
        (answer("a", replace(moved(PLAN, KEY, "b"), epoch=1)), "keys of 1 slots would be looked for on another shard"),
        (answer("a", moved(PLAN, KEY, "c")), "database.shards does not have c"),
        (answer("a", ShardMap.plan(128, {"a": 1.0, "b": 1.0}, epoch=2)), "the configuration makes one of 64 slots"),
    ],
)
def test_what_nobody_agreed_on_is_refused(told, said):
    """No map, another shard, another placement, a shard that is not configured, another number of slots."""
    shards = AgreedMap(CONFIG)
    with pytest.raises(ConfigError, match=said):
        shards.confirm(KEY, "a", told)
    assert shards.shard_map == PLAN
    assert "WHERE" not in shards.question("a"), "it is asked for everything again"


def test_a_key_that_was_listed_since_is_known_once_a_shard_was_heard():
    """A directory that refuses what it does not list refuses a new tenant until then."""
    config = replace(
        CONFIG,
        strategy="directory",
        directory_others="refuse",
        directory=(ListedKey(key="old", shard="a"), ListedKey(key="older", shard="b")),
    )
    shards, listed = AgreedMap(config), ShardMap.of(config).with_key("new", "b")
    with pytest.raises(CallerError, match="does not list the key 'new'"):
        shards.locate("new")

    rule = {"strategy": "directory", "hashed": 0, "keys": [["text", "old"], ["text", "older"], ["text", "new"]]}
    shards.hear("a", json.dumps({**json.loads(answer("a", listed)), "rule": rule}))
    assert shards.locate("new").shard == "b"
