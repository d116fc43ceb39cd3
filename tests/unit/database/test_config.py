"""Database settings are checked before anything is opened, and hide their passwords."""

import traceback

import pytest

from headrace.database import Database, DatabaseConfig, ReplicaConfig, ShardConfig
from headrace.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"slots": 1000}, "slots is 1000"),
        ({"connections_max": 0}, "connections_max is 0"),
        ({"resolve_wait_s": 0}, "resolve_wait_s is 0"),
        ({"shards": (ShardConfig(name="r", dsn="", replica_of="a"),)}, "'r' is a replica of 'a', which is no shard"),
        ({"shards": (ShardConfig(name="a", dsn=""), ShardConfig(name="a", dsn=""))}, "'a' twice"),
    ],
)
def test_bad_settings_are_named(settings, named):
    """The error names the setting and its value."""
    with pytest.raises(ConfigError, match=named):
        DatabaseConfig(**settings)


def test_a_weight_must_be_positive():
    """A shard that shall hold nothing is inactive, not weightless."""
    with pytest.raises(ConfigError, match="active = false"):
        ShardConfig(name="a", dsn="", weight=0)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://me:hunter2@[bad",
        "host=x password = hunter2 hunter2",
        "postgresql://me@host/db?passw%6Frd=hunter2&hunter2=1",
        "postgresql://me:hunter2%zz@host/db",
    ],
)
def test_a_dsn_that_libpq_cannot_read_is_refused(dsn):
    """The error comes when the Database is made, with the shard's name and nothing of the dsn."""
    with pytest.raises(ConfigError, match="dsn of 'a'") as caught:
        Database(DatabaseConfig(shards=(ShardConfig(name="a", dsn=dsn),)))
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://me:hunter2@host/db", "host:5432/db"),
        ("host=x password = hunter2 user=me", "x:5432/"),
        ("host=x PASSWORD='hunter2 b' port=5433", None),
        ("host=x password='hunter2 b' port=5433 dbname=d", "x:5433/d"),
        ("postgresql://host/db?passw%6Frd=hunter2", "host:5432/db"),
        ("postgresql:///db?host=/tmp", "/tmp:5432/db"),
    ],
)
def test_passwords_are_never_shown(dsn, shown):
    """An operator sees where a dsn leads and nothing else of it, however the password is written."""
    config = ShardConfig(name="a", dsn=dsn)
    assert "hunter2" not in repr(config)
    if shown is None:
        with pytest.raises(ConfigError):  # libpq knows its keys in lower case only
            Database(DatabaseConfig(shards=(config,)))
    else:
        assert Database(DatabaseConfig(shards=(config,))).nodes["a"].address == shown


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"lag_max_s": 0}, "lag_max_s is 0"), ({"wait_s": -1}, "wait_s is -1"), ({"otherwise": "hope"}, "otherwise is")],
)
def test_bad_limits_of_replicas_are_named(settings, named):
    """As every other setting."""
    with pytest.raises(ConfigError, match=named):
        ReplicaConfig(**settings)
