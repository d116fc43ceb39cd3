"""Writes that return before Redis has them: order, coalescing, bounds, and what a kill -9 leaves behind."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy
from headrace.cache.spool import Record, Spool, read
from headrace.errors import CacheUnavailable, DirectoryUnusable
from headrace.events import WriteDropped
from tests.redis_servers import CLOCK, until

BEHIND = [CachePolicy(match="b:*", strategy=Strategy.WRITE_BEHIND, jitter=0), CachePolicy(match="*", jitter=0)]
PATIENT = {"timeout": 0.3, "connect_timeout": 0.3, "reconnect_wait_max": 0.1}


async def delivered(cache: Cache) -> None:
    """Flush until it succeeds."""
    for _ in range(200):
        try:
            await cache.flush()
            return
        except CacheUnavailable:
            await asyncio.sleep(0.02)
    raise AssertionError("never delivered")


async def test_a_write_returns_before_it_is_delivered(open_cache, server):
    """set does not wait for a server that does not answer, this process reads its own write, and flush delivers it."""
    cache = await open_cache(policies=BEHIND, remote=PATIENT, memory=None)
    other = await open_cache(memory=None)
    server.signal(signal.SIGSTOP)
    started = CLOCK.monotonic()
    await cache.set("b:1", "new")
    assert CLOCK.monotonic() - started < 0.1
    assert await cache.get("b:1") == "new"
    assert await cache.get_many(["b:1", "b:2"]) == {"b:1": "new"}
    assert await cache.get_or_load("b:1", lambda: "loaded") == "new"
    server.signal(signal.SIGCONT)
    await delivered(cache)
    assert await other.get("b:1") == "new"


async def test_writes_to_one_key_coalesce_in_order(open_cache, server):
    """A hundred writes to a key come down to its last value."""
    cache = await open_cache(policies=BEHIND, remote=PATIENT)
    other = await open_cache(memory=None)
    for number in range(100):
        await cache.set("b:1", number)
    await delivered(cache)
    assert await other.get("b:1") == 99
    with server.client() as client:
        assert client.info("commandstats")["cmdstat_set"]["calls"] < 50


async def test_flush_says_when_it_cannot_deliver(open_cache, server):
    """flush raises while the server is away and succeeds afterwards; nothing is lost in between."""
    cache = await open_cache(policies=BEHIND, remote=PATIENT)
    server.stop()
    await cache.set("b:1", 1)
    with pytest.raises(CacheUnavailable, match="stay queued"):
        await cache.flush()
    await asyncio.to_thread(server.start)
    await delivered(cache)
    assert await (await open_cache(memory=None)).get("b:1") == 1


@pytest.mark.parametrize("how", ["delete", "pattern", "clear", "through"])
async def test_what_comes_after_a_queued_write_wins(open_cache, server, how):
    """A delete, a pattern, a clear or a plain write takes back what was queued before it."""
    cache = await open_cache(policies=BEHIND, remote=PATIENT)
    other = await open_cache(memory=None)
    server.signal(signal.SIGSTOP)
    await cache.set("b:1", "queued")
    match how:
        case "delete":
            after = cache.delete("b:1")
        case "pattern":
            after = cache.invalidate_pattern("b:*")
        case "clear":
            after = cache.clear()
        case _:
            after = cache.set("b:1", "later")
    task = asyncio.get_running_loop().create_task(after)
    await asyncio.sleep(0)
    server.signal(signal.SIGCONT)
    await task
    await delivered(cache)
    for _ in range(100):
        assert await cache.get("b:1") in {None, "later"}
        if await other.get("b:1") == ("later" if how == "through" else None):
            break
        await asyncio.sleep(0.02)
    assert await other.get("b:1") == ("later" if how == "through" else None)


async def test_a_full_queue_writes_through(open_cache, server):
    """Beyond write_behind_max a write waits for the server itself, so memory stays bounded and nothing is lost."""
    cache = await open_cache(policies=BEHIND, remote={**PATIENT, "write_behind_max": 10})
    other = await open_cache(memory=None)
    await asyncio.gather(*(cache.set(f"b:{number}", number) for number in range(500)))
    assert len(cache._behind) <= 10 + 256
    await delivered(cache)
    assert len(await other.get_many([f"b:{number}" for number in range(500)])) == 500


async def test_without_a_spool_a_closed_cache_tells_what_it_drops(open_cache, server, witness):
    """What cannot be delivered at close is lost with the process, and the observer is told each key."""
    cache = await open_cache(policies=BEHIND, remote=PATIENT)
    server.stop()
    await cache.set("b:1", 1)
    await cache.close()
    assert "b:1" in {event.key for event in witness.seen(WriteDropped)}


CHILD = """
import asyncio, sys
from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy

async def main(url, directory):
    remote = RemoteConfig(url=url, spool_directory=directory, timeout=0.2, connect_timeout=0.2)
    policies = [CachePolicy(strategy=Strategy.WRITE_BEHIND, jitter=0)]
    async with Cache(remote=remote, policies=policies) as cache:
        for number in range(1000):
            await cache.set(f"b:{number}", number)
            print(number, flush=True)
        await cache.delete("b:700")
        print("deleted", flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("at", [300, "deleted"])
async def test_an_acknowledged_write_survives_kill_9(open_cache, server, tmp_path: Path, at):
    """Every set that returned is delivered by the next process, although Redis was away and the writer was killed."""
    await (await open_cache()).set("warm", 1)
    server.signal(signal.SIGSTOP)
    # The child opens while the server is deaf, so everything that it writes stays owed.
    server.signal(signal.SIGCONT)
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    acknowledged = set()
    try:
        assert child.stdout is not None
        first = await asyncio.to_thread(child.stdout.readline)
        server.signal(signal.SIGSTOP)
        acknowledged.add(int(first))
        while (line := (await asyncio.to_thread(child.stdout.readline)).strip()) != str(at):
            acknowledged.add(int(line))
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()
        server.signal(signal.SIGCONT)
    remote = {**PATIENT, "spool_directory": str(tmp_path)}
    heir = await open_cache(policies=[CachePolicy(strategy=Strategy.WRITE_BEHIND)], remote=remote)
    await delivered(heir)
    other = await open_cache(memory=None)
    found = await other.get_many([f"b:{number}" for number in acknowledged])
    assert set(found.values()) >= acknowledged - {700}
    if at == "deleted":
        assert 700 not in found.values()
    await heir.close()
    assert list(tmp_path.iterdir()) == []


def test_a_cut_spool_is_good_up_to_the_cut(tmp_path: Path):
    """Whatever byte a spool file ends at, the complete records before it are read, in order."""
    spool = Spool(tmp_path, sync=False)
    spool.open()
    records = [Record(f"k{number}", b"data", None, b"g") for number in range(5)]
    spool.append(records)
    data = next(tmp_path.glob("*.spool")).read_bytes()
    spool.close(done=True)
    size = len(data) // 5
    for end in range(len(data)):
        assert list(read(data[:end])) == records[: end // size]
    damaged = bytearray(data)
    damaged[2 * size + 10] ^= 1
    assert list(read(bytes(damaged))) == records[:2]


def test_a_living_process_keeps_its_spool(tmp_path: Path):
    """Only files that nobody holds are adopted."""
    one, two = Spool(tmp_path, sync=True), Spool(tmp_path, sync=False)
    assert one.open() == []
    one.append([Record("k", b"1", None, b"g"), Record("l", b"2", None, b"g"), Record("l", None, None, b"g")])
    assert two.open() == []
    one.close(done=False)
    three = Spool(tmp_path, sync=False)
    assert three.open() == [Record("k", b"1", None, b"g")]
    for spool in (two, three):
        spool.close(done=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_spool_directory_is_an_error_with_a_fix(tmp_path: Path):
    """A file where the directory should be is told at open."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryUnusable, match="spool"):
        Spool(tmp_path / "file", sync=False).open()


async def test_a_spool_does_not_grow_without_end(open_cache, tmp_path: Path):
    """What was delivered leaves the file."""
    cache = await open_cache(
        policies=[CachePolicy(strategy=Strategy.WRITE_BEHIND)],
        remote={**PATIENT, "spool_directory": str(tmp_path), "compress_min": None},
    )
    for number in range(30):
        await cache.set(f"b:{number % 3}", "x" * 100_000)
    await delivered(cache)
    await until(lambda: cache._behind._spool.size == 0, "the file is empty again")
    assert RemoteConfig().spool_directory is None


async def test_a_write_through_is_not_overtaken_by_an_older_queued_write(open_cache, server):
    """When the queue is full, a direct write to a key takes the place of the one that is still under way."""
    cache = await open_cache(policies=BEHIND, remote={**PATIENT, "write_behind_max": 1})
    other = await open_cache(memory=None)
    server.signal(signal.SIGSTOP)
    await cache.set("b:1", "older")
    await until(lambda: "b:1" in cache._behind._sending, "under way")
    await cache.set("b:2", "fills the queue")
    later = asyncio.get_running_loop().create_task(cache.set("b:1", "later"))
    await later
    server.signal(signal.SIGCONT)
    await delivered(cache)
    await until(lambda: not cache._shared._deferred.is_owed, "everything was delivered")
    assert await other.get("b:1") in {None, "later"}
