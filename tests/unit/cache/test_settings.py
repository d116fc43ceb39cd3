"""Configurations that cannot work are refused where they are written, and secrets stay out of sight."""

import pytest

from headrace.cache import Cache, CachePolicy, MemoryConfig, RemoteConfig
from headrace.cache.policy import PolicyTable
from headrace.errors import ConfigError, InvalidKey


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (MemoryConfig, {"entries_max": 0}, "entries_max"),
        (MemoryConfig, {"ttl": 0}, "ttl"),
        (MemoryConfig, {"weight_max": 0}, "weight_max"),
        (RemoteConfig, {"url": "http://x"}, "url"),
        (RemoteConfig, {"url": "localhost:6379"}, "url"),
        (RemoteConfig, {"url": "redis://host:port"}, "url"),
        (RemoteConfig, {"url": "redis+cluster://host:6379,host:70000"}, "url"),
        (RemoteConfig, {"url": "redis+sentinel://host:26379/name/first"}, "url"),
        (RemoteConfig, {"timeout": 0}, "timeout"),
        (RemoteConfig, {"connections_max": 0}, "connections_max"),
        (RemoteConfig, {"compress_min": -1}, "compress_min"),
        (RemoteConfig, {"signing_key": "short"}, "signing_key"),
        (CachePolicy, {"serializer": "pickle"}, "serializer"),
        (CachePolicy, {"ttl": -1}, "ttl"),
        (CachePolicy, {"stale_max": float("nan")}, "stale_max"),
        (CachePolicy, {"stale_max": None}, "stale_max"),
        (CachePolicy, {"strategy": "write-through"}, "strategy"),
        (CachePolicy, {"refresh_at": 0}, "refresh_at"),
        (CachePolicy, {"jitter": 1}, "jitter"),
        (CachePolicy, {"load_timeout": 0}, "load_timeout"),
    ],
)
def test_impossible_settings_are_refused(kind, options, named):
    """The error names the field, its value and the rule."""
    with pytest.raises(ConfigError, match=named):
        kind(**options)


def test_secrets_are_not_shown():
    """Neither repr nor the address holds a password, a user's or the signing key."""
    config = RemoteConfig(url="rediss://ada:s3cret@host:6380/0?x=s3cret", password="s3cret", signing_key="s3cret" * 4)
    assert "s3cret" not in repr(config)
    assert config.address == "rediss://host:6380/0"


def test_policies_match_whole_keys_in_order():
    """The first glob that covers the whole key decides; a set and its complement are understood."""
    policies = [CachePolicy(match=match, ttl=ttl) for match, ttl in (("a:*", 1), ("*:b", 2), ("[!x]?", 3))]
    table = PolicyTable(policies, default=CachePolicy(ttl=9))
    assert [table.match(key).ttl for key in ("a:b", "c:b", "ba:", "zz", "xz", "a:\n")] == [1, 2, 9, 3, 9, 1]


def test_many_keys_do_not_grow_the_policy_memo():
    """The memo of matches is bounded."""
    table = PolicyTable([CachePolicy(match="a*")], default=CachePolicy())
    for number in range(10_000):
        table.match(f"a{number}")
    assert len(table._memo) <= 4096


@pytest.mark.parametrize("namespace", ["", "a{b", "a*", "a@b"])
def test_a_namespace_that_would_confuse_redis_is_refused(namespace):
    """Braces and glob characters cannot be in a namespace."""
    with pytest.raises(InvalidKey):
        Cache(namespace=namespace)
