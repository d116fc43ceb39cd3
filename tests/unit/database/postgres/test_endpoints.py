"""The servers that a connection string names."""

import pytest

from headrace.database import ShardConfig
from headrace.database.postgres.endpoints import address_of, application_name, hosts_of
from headrace.database.postgres.pipeline import read_dsn


@pytest.mark.parametrize(
    ("dsn", "expected"),
    [
        ("host=a dbname=d", {"a:5432/d": ("a", None)}),
        ("host=a,b dbname=d", {"a:5432": ("a", None), "b:5432": ("b", None)}),
        ("postgresql://u@a:1,b:2/d", {"a:1": ("a", "1"), "b:2": ("b", "2")}),
        ("host=a,b port=7 dbname=d", {"a:7": ("a", "7"), "b:7": ("b", "7")}),
        ("host=/run/a,/run/b dbname=d", {"/run/a:5432": ("/run/a", None), "/run/b:5432": ("/run/b", None)}),
        ("hostaddr=10.0.0.1,10.0.0.2 dbname=d", {"10.0.0.1:5432": (None, None), "10.0.0.2:5432": (None, None)}),
    ],
)
def test_each_server_has_a_connection_string_of_its_own(dsn, expected):
    """Everything but host and port is the same for all."""
    hosts = hosts_of(ShardConfig(name="s", dsn=dsn))
    read = {address: read_dsn(own) for address, own in hosts.items()}
    assert {address: (own.get("host"), own.get("port")) for address, own in read.items()} == expected
    assert {own["dbname"] for own in read.values()} == {"d"}


@pytest.mark.parametrize("host", ["a", "a,b"])
def test_a_peer_that_is_gone_is_noticed(host):
    """A connection whose other end was unplugged ends within half a minute, unless the string says otherwise."""
    for own in hosts_of(ShardConfig(name="s", dsn=f"host={host} keepalives_idle=99 password='a b'")).values():
        read = read_dsn(own)
        assert (read["keepalives_idle"], read["tcp_user_timeout"], read["password"]) == ("99", "30000", "a b")


def test_an_address_holds_no_secret():
    """An operator sees where it leads and not how to get in."""
    assert address_of(ShardConfig(name="s", dsn="postgresql://u:hunter2@h/d")) == "h:5432/d"


def test_pools_are_told_apart():
    """Two pools of one process count as two."""
    shard = ShardConfig(name="s" * 100, dsn="")
    assert application_name(shard) != application_name(shard)
    assert len(application_name(shard)) == 63
