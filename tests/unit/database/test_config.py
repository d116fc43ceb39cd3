"""Database settings are checked before anything is opened, and hide their passwords."""

import pytest

from headrace.database import Database, DatabaseConfig, ShardConfig
from headrace.database.config import without_password
from headrace.errors import CallerError, ConfigError


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"slots": 1000}, "slots is 1000"),
        ({"connections_max": 0}, "connections_max is 0"),
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


def test_a_dsn_that_libpq_cannot_read_is_refused():
    """The error comes when the Database is made, with the shard's name."""
    with pytest.raises(CallerError, match="dsn of 'a'"):
        Database(DatabaseConfig(shards=(ShardConfig(name="a", dsn="postgresql://[bad"),)))


@pytest.mark.parametrize(
    ("dsn", "shown"),
    [
        ("postgresql://me:secret@host/db", "postgresql://me:***@host/db"),
        ("host=x password=secret user=me", "host=x password=*** user=me"),
        ("postgresql:///db?host=/tmp", "postgresql:///db?host=/tmp"),
    ],
)
def test_passwords_are_never_shown(dsn, shown):
    """Both forms of connection strings lose their password, and the config's repr has no dsn at all."""
    assert without_password(dsn) == shown
    assert "secret" not in repr(ShardConfig(name="a", dsn=dsn))
