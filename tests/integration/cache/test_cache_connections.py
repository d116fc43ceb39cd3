"""How the shared tier is reached: TLS, ACL users, databases, Sentinel, uvloop."""

import asyncio
import re
import subprocess
from pathlib import Path

import pytest
import uvloop
from msgspec import UNSET

from headrace.cache import Cache, RemoteConfig
from headrace.events import TierUnavailable
from tests.redis_servers import PATIENT, RedisServer, Witness, free_port, until, wait_until


async def works(cache: Cache) -> bool:
    await cache.set("k", 1)
    return await cache.get("k") == 1 and cache.statistics().remote_errors == 0


def remote(url: str, **options) -> RemoteConfig:
    return RemoteConfig(url=url, **{**PATIENT, **options})


async def test_acl_user_and_password(start_redis):
    """A user of an ACL logs in with the URL's or the configuration's credentials; a wrong one only degrades."""
    server = start_redis("--user", "ada", "on", ">s3cret", "~*", "+@all", "--requirepass", "other", port=free_port())
    address = f"127.0.0.1:{server.port}/0"
    async with Cache(remote=remote(f"redis://ada:s3cret@{address}"), memory=None) as cache:
        assert await works(cache)
    async with Cache(remote=remote(f"redis://{address}", username="ada", password="s3cret"), memory=None) as cache:
        assert await works(cache)
    witness = Witness()
    async with Cache(remote=remote(f"redis://ada:wrong@{address}"), memory=None, observer=witness) as cache:
        assert await cache.get_or_load("k", lambda: 2) == 2
        assert "wrong" not in repr(witness.seen(TierUnavailable))
        assert witness.seen(TierUnavailable)


async def test_the_rights_that_the_guide_names_suffice(start_redis):
    """With the ACL of the guide, and no right beyond it, everything works: copies, leases, tags, patterns, clear."""
    guide = (Path(__file__).parents[3] / "docs/guides/redis.md").read_text()
    rights = re.search(r"ACL SETUSER (headrace on >secret [^`]+)```", guide)[1].split()
    server = start_redis("--user", *rights, port=free_port())
    url, witness = f"redis://headrace:secret@127.0.0.1:{server.port}/0", Witness()
    async with Cache(remote=remote(url), observer=witness) as here, Cache(remote=remote(url), memory=None) as there:
        assert await here.get_or_load("k", lambda: 1, tags=["t"]) == 1
        assert await there.update("n", lambda number: 1 if number is UNSET else number + 1) == 1
        assert await there.get_many(["k", "n"]) == {"k": 1, "n": 1}
        await there.delete("k")
        await until(lambda: "k" not in here.memory, "the change is heard of")
        await here.set_many({"a:1": 1, "a:2": 2, "b": 3})
        assert await there.invalidate_pattern("a:*") == 2
        await here.invalidate_tag("t")
        await here.clear()
        assert await here.get("b") is None
        assert [cache.statistics().remote_errors for cache in (here, there)] == [0, 0]
    assert witness.events == []


async def test_a_database_of_the_url(start_redis):
    """The database number of the URL is selected."""
    server = start_redis(port=free_port())
    async with Cache(remote=remote(f"redis://127.0.0.1:{server.port}/3"), memory=None) as cache:
        assert await works(cache)
    with server.client() as client:
        assert "db3" in client.info("keyspace")


def certificate(directory: Path) -> tuple[str, str]:
    key, cert = str(directory / "key.pem"), str(directory / "cert.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", cert, "-days", "2"]
        + ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"],
        check=True,
        capture_output=True,
    )
    return key, cert


async def test_tls(short_path):
    """rediss:// speaks TLS and verifies the server; an unknown authority is not trusted."""
    key, cert = await asyncio.to_thread(certificate, short_path)
    port = free_port()
    files = ["--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", cert, "--tls-auth-clients", "no"]
    server = RedisServer(short_path / "tls", "--tls-port", str(port), *files)
    try:
        await asyncio.to_thread(server.start)
    except AssertionError:
        server.stop()
        pytest.skip("this redis-server was built without TLS")
    try:
        async with Cache(remote=remote(f"rediss://localhost:{port}/0?ssl_ca_certs={cert}"), memory=None) as cache:
            assert await works(cache)
        async with Cache(remote=remote(f"rediss://localhost:{port}/0"), memory=None) as cache:
            assert await cache.get_or_load("k", lambda: 2) == 2
            assert cache.statistics().remote_available is False
    finally:
        server.stop()


async def test_sentinel_leads_to_the_primary_and_follows_it(short_path):
    """The primary is found through a Sentinel, and after a failover the new one is used."""
    ports = [free_port(), free_port(), free_port()]
    primary = RedisServer(short_path / "primary", port=ports[0])
    replica = RedisServer(short_path / "replica", "--replicaof", "127.0.0.1", str(ports[0]), port=ports[1])
    directory = short_path / "sentinel"
    directory.mkdir()
    (directory / "sentinel.conf").write_text(
        f"sentinel monitor main 127.0.0.1 {ports[0]} 1\nsentinel down-after-milliseconds main 60000\n"
        "sentinel failover-timeout main 2000\n"
    )
    sentinel = RedisServer(directory, port=ports[2])
    try:
        await asyncio.to_thread(primary.start)
        await asyncio.to_thread(replica.start)
        with replica.client() as client:
            await asyncio.to_thread(
                wait_until, lambda: client.info("replication")["master_link_status"] == "up", "the replica follows"
            )
        sentinel.process = subprocess.Popen(
            [sentinel.binary, str(directory / "sentinel.conf"), "--sentinel", "--port", str(ports[2])]
            + ["--bind", "127.0.0.1"],
            stdout=subprocess.DEVNULL,
        )
        await asyncio.to_thread(wait_until, sentinel.answers, "the Sentinel answers")
        with sentinel.client() as client:
            await asyncio.to_thread(
                wait_until, lambda: len(client.sentinel_slaves("main")) == 1, "the Sentinel knows the replica"
            )
        async with Cache(remote=remote(f"redis+sentinel://127.0.0.1:{ports[2]}/main/0"), memory=None) as cache:
            assert await works(cache)
            # Not sooner: a living primary may be silent for a while on a busy machine.
            sentinel.call("SENTINEL", "SET", "main", "down-after-milliseconds", 500)
            primary.stop()
            async with asyncio.timeout(60):
                while await cache.get("k") != 2:
                    await asyncio.sleep(0.05)
                    await cache.set("k", 2)
    finally:
        for server in (sentinel, replica, primary):
            server.stop()


def test_uvloop(server):
    """Everything works on uvloop as well, whose transports are its own."""

    async def run() -> bool:
        async with Cache(remote=remote(server.url), memory=None) as cache:
            await cache.set_many({f"k{number}": "x" * 5000 for number in range(200)})
            values = await asyncio.gather(*(cache.get(f"k{number}") for number in range(200)))
            return values == ["x" * 5000] * 200

    assert uvloop.run(run())


async def test_connections_are_closed_with_the_cache(server):
    """After close the server has no connection of ours left."""
    async with Cache(remote=remote(server.url)) as cache:
        assert await works(cache)

    def left() -> list[str]:
        with server.client() as client:
            return [line["name"] for line in client.client_list() if line["name"] == "headrace"]

    await until(lambda: not left(), "the server noticed")
