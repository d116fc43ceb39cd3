"""How a configuration says where keys live; what cannot work is refused before anything is opened."""

import datetime
import uuid

import pytest

from headrace.config import build, leaves, load_config
from headrace.database import DatabaseConfig, KeyRange, ListedKey, Reference, ShardConfig, Sharded, ShardMap
from headrace.errors import ConfigError

TOML = """
[database]
shards = [{name = "a", dsn = "host=/x password=hunter2"}, {name = "b", dsn = "host=/y"}]
"""
ONE, TWO = (ShardConfig(name=name, dsn="") for name in "ab")


def loaded(tmp_path, text):
    """The database's part of a TOML file."""
    file = tmp_path / "headrace.toml"
    file.write_text(TOML + text)
    return load_config(file).database


def test_hash_is_the_strategy_of_a_configuration_that_names_none(tmp_path):
    """Every shard gets its share of 4096 slots."""
    shard_map = ShardMap.of(loaded(tmp_path, ""))
    assert [shard_map.shards.count(name) for name in "ab"] == [2048, 2048]
    assert (shard_map.epoch, shard_map.home) == (1, "a")


def test_ranges_are_read_from_toml(tmp_path):
    """Numbers, dates and texts as TOML has them; the last range has no end."""
    text = '[[database.ranges]]\nuntil = {}\nshard = "b"\n[[database.ranges]]\nshard = "a"\n'
    for bound, below, above in (
        ("100", 99, 100),
        ('"m"', "lz", "m"),
        ("2026-01-01", datetime.date(2025, 12, 31), datetime.date(2026, 1, 1)),
    ):
        shard_map = ShardMap.of(loaded(tmp_path, 'strategy = "range"\n' + text.format(bound)))
        assert (shard_map.locate(below).shard, shard_map.locate(above).shard) == ("b", "a")


def test_a_directory_is_read_from_toml(tmp_path):
    """A key whose type TOML lacks is written as text; `key_type` says what it is."""
    text = 'strategy = "directory"\nkey_type = "uuid"\n[[database.directory]]\nkey = "{}"\nshard = "b"\n'
    tenant = uuid.UUID(int=7)
    placement = ShardMap.of(loaded(tmp_path, text.format(tenant))).locate(tenant)
    assert placement == ("b", 4096, 1)


def test_tables_are_read_from_toml(tmp_path):
    """Sharded by a column, or whole on every shard; and the settings in force show them, without secrets."""
    config = loaded(tmp_path, '[database.tables]\norders = { key = "tenant_id" }\ncountries = { reference = true }\n')
    assert config.tables == {"orders": Sharded(key="tenant_id"), "countries": Reference()}
    assert "hunter2" not in str(list(leaves(config)))


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "'tables.t.key' is missing"),
        ({"kee": "x"}, "Did you mean 'key'"),
        ({"key": "x", "size": 1}, "'tables.t.size' does not exist"),
        ("reference", r"tables\.t is a string; it must be a table"),
        ({"reference": False}, "reference = false"),
        ({"key": ""}, "empty key"),
    ],
)
def test_a_table_that_is_neither_sharded_nor_reference_is_named(table, said):
    """An empty one, too: a forgotten key must not put every row on every shard."""
    with pytest.raises(ConfigError, match=said):
        build(DatabaseConfig, {"tables": {"t": table}})


def ranges(*pairs):
    """Ranges by end and shard."""
    return {"strategy": "range", "ranges": tuple(KeyRange(until=until, shard=shard) for until, shard in pairs)}


def listed(*pairs, **options):
    """A directory of keys and shards."""
    keys = tuple(ListedKey(key=key, shard=shard) for key, shard in pairs)
    return {"strategy": "directory", "directory": keys, **options}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"strategy": "ring"}, "strategy is 'ring'; it is one of hash, range, directory"),
        ({"key_type": "colour"}, "key_type is 'colour'"),
        ({"map_look_s": 0}, "map_look_s is 0"),
        ({"fence_wait_s": -1}, "fence_wait_s is -1"),
        ({**ranges((None, "a")), "strategy": "hash"}, "ranges is given, and database.strategy is 'hash'"),
        ({**listed((1, "a")), "strategy": "hash"}, "directory is given, and database.strategy is 'hash'"),
        (ranges(), "ranges is empty"),
        (ranges((5, "a"), (9, "b")), "range 2 of 2 has until = 9"),
        (ranges((None, "a"), (None, "b")), "range 1 of 2 has until = None"),
        (ranges((9, "a"), (5, "b"), (None, "b")), "the bound 5 comes after 9"),
        (ranges((5, "a"), (5, "b"), (None, "b")), "the bound 5 comes after 5"),
        (ranges((5, "a"), ("x", "b"), (None, "b")), "'x' is text, the others are integer"),
        (ranges((5.5, "a"), (None, "b")), "5.5 is a float"),
        (ranges((False, "a"), (None, "b")), "booleans and NaN"),
        (ranges((5, "a"), (None, "c")), "names the shard 'c', which does not exist"),
        (ranges((5, "a"), (None, "a")), "gives nothing to b"),
        (listed((1, "c")), "names the shard 'c', which does not exist"),
        (listed((1, "a"), (1, "b")), "lists the key 1 twice"),
        (listed((1.5, "a")), "1.5 is a float"),
        (listed(("x", "a"), key_type="uuid"), "'x' is no uuid key"),
        (listed(("2026-01-01T00:00", "a"), key_type="timestamptz"), "needs an offset from UTC"),
        (listed(("2026-01-01T00:00Z", "a"), key_type="timestamp"), "takes no offset from UTC"),
        (listed(directory_others="random"), "directory_others is 'random'"),
    ],
)
def test_an_impossible_strategy_is_refused(options, said):
    """With the value and the rule that it breaks; no two ranges can overlap, no key can lack a home."""
    with pytest.raises(ConfigError) as caught:
        DatabaseConfig(shards=(ONE, TWO), **options)
    assert said in caught.value.message


def test_a_shard_that_holds_nothing_cannot_be_a_home():
    """Neither of a range nor of a key."""
    idle = ShardConfig(name="b", dsn="", active=False)
    with pytest.raises(ConfigError, match="'b', which is not active"):
        DatabaseConfig(shards=(ONE, idle), **listed((1, "b")))


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_a_weight_is_a_number_above_zero(weight):
    """Shares are computed exactly, of numbers that there are."""
    with pytest.raises(ConfigError, match="above 0 and finite"):
        ShardConfig(name="a", dsn="", weight=weight)


def test_a_shard_whose_weight_gives_it_nothing_is_named():
    """It would be asked for nothing, ever."""
    shards = (ONE, ShardConfig(name="b", dsn="", weight=1e-9))
    with pytest.raises(ConfigError, match="b gets none of the 16 slots"):
        ShardMap.of(DatabaseConfig(shards=shards, slots=16))


def test_the_shards_of_an_embedded_service_are_checked_when_they_are_there():
    """They are filled in after the file was read."""
    assert DatabaseConfig(**ranges((5, "shard-0"), (None, "shard-1"))).shards == ()
