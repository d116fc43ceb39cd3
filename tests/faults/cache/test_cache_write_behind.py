"""Writes that return before Redis has them: order, coalescing, bounds, and what a kill -9 leaves behind."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy
from headrace.cache.codec import FOREVER_MS, Codec, Envelope, Sealed
from headrace.cache.shared import SharedTier
from headrace.cache.spool import Record, Spool
from headrace.cache.write_behind import RETRY_S
from headrace.errors import CacheUnavailable
from headrace.events import TierRecovered, TierUnavailable, WriteDropped
from tests.redis_servers import CLOCK, IMPATIENT_S, PATIENT, at_once, deaf, set_patience, until, until_found

BEHIND = [CachePolicy(match="b:*", strategy=Strategy.WRITE_BEHIND, jitter=0), CachePolicy(match="*", jitter=0)]


async def delivered(cache: Cache) -> None:
    """Flush until it succeeds."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await cache.flush()
            except CacheUnavailable:
                await asyncio.sleep(0.02)


async def test_a_write_returns_before_it_is_delivered(open_cache, server):
    """set does not wait for a server that does not answer, this process reads its own write, and flush delivers it."""
    cache = await open_cache(policies=BEHIND, memory=None)
    other = await open_cache(memory=None)
    async with deaf(server, cache):
        at_once(cache.set("b:1", "new"))
        assert await cache.get("b:1") == "new"
        assert await cache.get_many(["b:1", "b:2"]) == {"b:1": "new"}
        assert await cache.get_or_load("b:1", lambda: "loaded") == "new"
    await delivered(cache)
    assert await other.get("b:1") == "new"


async def test_writes_to_one_key_coalesce_in_order(open_cache, server):
    """A hundred writes to a key come down to its last value."""
    cache = await open_cache(policies=BEHIND)
    other = await open_cache(memory=None)
    for number in range(100):
        await cache.set("b:1", number)
    await delivered(cache)
    assert await other.get("b:1") == 99
    with server.client() as client:
        assert client.info("commandstats")["cmdstat_set"]["calls"] < 50


async def test_flush_says_when_it_cannot_deliver(open_cache, server):
    """flush raises while the server is away and succeeds afterwards; nothing is lost in between."""
    cache = await open_cache(policies=BEHIND)
    server.stop()
    await cache.set("b:1", 1)
    with pytest.raises(CacheUnavailable, match="stay queued"):
        await cache.flush()
    await asyncio.to_thread(server.start)
    await delivered(cache)
    assert await (await open_cache(memory=None)).get("b:1") == 1


@pytest.mark.parametrize("how", ["delete", "tag", "pattern", "clear", "through"])
async def test_what_comes_after_a_queued_write_wins(open_cache, server, how):
    """A delete, a tag, a pattern, a clear or a plain write takes back what was queued before it."""
    cache = await open_cache(policies=BEHIND)
    other = await open_cache(memory=None)
    await cache.set("b:0", "acquainted", tags=("t",))
    await cache.flush()
    if how == "tag":  # which the server is asked for, so it may be delivered at once too
        await cache.set("b:1", "queued", tags=("t",))
    server.signal(signal.SIGSTOP)
    if how != "tag":
        await cache.set("b:1", "queued")
    match how:
        case "delete":
            after = cache.delete("b:1")
        case "tag":
            after = cache.invalidate_tag("t")
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

    async def found() -> object:
        assert await cache.get("b:1") in {None, "later"}
        return await other.get("b:1")

    await until_found(found, "later" if how == "through" else None)


async def test_a_full_queue_writes_through(open_cache, server):
    """Beyond write_behind_max a write waits for the server itself, so memory stays bounded and nothing is lost."""
    cache = await open_cache(policies=BEHIND, remote={"write_behind_max": 10})
    other = await open_cache(memory=None)
    await asyncio.gather(*(cache.set(f"b:{number}", number) for number in range(500)))
    assert len(cache._behind) <= 10 + 256
    await delivered(cache)
    assert len(await other.get_many([f"b:{number}" for number in range(500)])) == 500


async def test_without_a_spool_a_closed_cache_tells_what_it_drops(open_cache, server, witness):
    """What cannot be delivered at close is lost with the process, and the observer is told each key."""
    cache = await open_cache(policies=BEHIND)
    server.stop()
    await cache.set("b:1", 1)
    await cache.close()
    assert "b:1" in {event.key for event in witness.seen(WriteDropped)}


async def test_writes_into_an_outage_do_not_each_try_the_server(open_cache, server, monkeypatch):
    """While nothing can be delivered, what is queued meanwhile waits for the next attempt and does not make one."""
    cache = await open_cache(policies=BEHIND)
    server.stop()
    attempts, deliver = 0, cache._shared.deliver

    async def count(entries: Sequence[Sealed]) -> list[bool]:
        nonlocal attempts
        attempts += 1
        return await deliver(entries)

    monkeypatch.setattr(cache._shared, "deliver", count)
    started = CLOCK.monotonic()
    for number in range(200):
        await cache.set(f"b:{number}", number)
        for _ in range(20):  # as many turns of the loop as an attempt takes
            await asyncio.sleep(0)
    assert 0 < attempts <= 2 + (CLOCK.monotonic() - started) / RETRY_S
    await asyncio.to_thread(server.start)
    await delivered(cache)
    assert len(await (await open_cache(memory=None)).get_many([f"b:{number}" for number in range(200)])) == 200


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
            if number == 0:
                await asyncio.to_thread(sys.stdin.readline)
        await cache.delete("b:700")
        print("deleted", flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("at", [300, "deleted"])
async def test_an_acknowledged_write_survives_kill_9(open_cache, server, tmp_path: Path, at):
    """Every set that returned is delivered by the next process, although Redis was away and the writer was killed."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, server.url, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    acknowledged = set()
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        acknowledged.add(int(await asyncio.to_thread(child.stdout.readline)))
        server.signal(signal.SIGSTOP)
        child.stdin.write("go on, everything stays owed from here\n")
        child.stdin.flush()
        while (line := (await asyncio.to_thread(child.stdout.readline)).strip()) != str(at):
            acknowledged.add(int(line))
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
        server.signal(signal.SIGCONT)
    remote = {"spool_directory": str(tmp_path)}
    heir = await open_cache(policies=[CachePolicy(strategy=Strategy.WRITE_BEHIND)], remote=remote)
    await delivered(heir)
    other = await open_cache(memory=None)
    found = await other.get_many([f"b:{number}" for number in acknowledged])
    assert set(found.values()) >= acknowledged - {700}
    if at == "deleted":
        assert 700 not in found.values()
    await heir.close()
    assert list(tmp_path.iterdir()) == []


def leave_behind(directory: Path, keys: list[str], *, owed: Sequence[str] = ()) -> None:
    """What a process that was killed had queued, and the deletes that it owed."""
    created_ms = int(CLOCK.wall() * 1000)
    left = Envelope("left", created_ms=created_ms, fresh_ms=FOREVER_MS, stale_ms=0)
    spool = Spool(directory, sync=False)
    spool.open()
    spool.append(Record(key, Codec().seal(key, left), None, b"") for key in keys)
    spool.append(Record(key, b"", None, b"", "key") for key in owed)
    spool.close(done=False)


async def test_a_delete_while_what_a_dead_process_left_is_looked_up_wins(open_cache, tmp_path: Path, monkeypatch):
    """A queued write that is taken back while others of its batch are compared with Redis is not delivered."""
    await asyncio.to_thread(leave_behind, tmp_path, [f"b:{number}" for number in range(50)])
    other = await open_cache(memory=None)
    is_looking, may_look, is_newer = asyncio.Event(), asyncio.Event(), SharedTier.is_newer

    async def is_newer_late(shared: SharedTier, entry: Sealed) -> bool | str:
        found = await is_newer(shared, entry)
        if entry.key == "b:49":
            is_looking.set()
            await may_look.wait()
        return found

    monkeypatch.setattr(SharedTier, "is_newer", is_newer_late)
    cache = await open_cache(policies=BEHIND, remote={"spool_directory": str(tmp_path)})
    await is_looking.wait()
    assert await other.get("b:49") is None
    await cache.delete("b:49")
    may_look.set()
    await delivered(cache)
    assert await other.get_many(["b:0", "b:49"]) == {"b:0": "left"}


async def test_an_opening_that_was_given_up_keeps_nothing_from_the_next(open_cache, server, tmp_path: Path):
    """What dead processes left is let go of when `open` is cancelled, and delivered by whoever opens after that."""
    await asyncio.to_thread(leave_behind, tmp_path, [], owed=["k"])
    other = await open_cache(memory=None)
    await other.set("k", "old")
    remote = {"url": server.url, "spool_directory": str(tmp_path), **PATIENT}
    first = Cache(remote=RemoteConfig(**remote))
    opening = asyncio.get_running_loop().create_task(first.open())
    while first._shared is None or not first._shared.owed.is_owed:
        await asyncio.sleep(0)
    server.signal(signal.SIGSTOP)
    opening.cancel()
    await asyncio.wait([opening])
    server.signal(signal.SIGCONT)
    assert opening.cancelled()
    await other.set("k", "old")
    heir = await open_cache(remote=remote)
    await heir.close()
    assert await other.get("k") is None
    assert list(tmp_path.iterdir()) == []


async def test_a_spool_does_not_grow_without_end(open_cache, tmp_path: Path):
    """What was delivered leaves the file."""
    cache = await open_cache(
        policies=[CachePolicy(strategy=Strategy.WRITE_BEHIND)],
        remote={"spool_directory": str(tmp_path), "compress_min": None},
    )
    for number in range(30):
        await cache.set(f"b:{number % 3}", "x" * 100_000)
    await delivered(cache)
    await until(lambda: cache._behind._spool.size == 0, "the file is empty again")
    assert RemoteConfig().spool_directory is None


async def test_a_write_through_is_not_overtaken_by_an_older_queued_write(open_cache, server):
    """When the queue is full, a direct write to a key takes the place of the one that is still under way."""
    cache = await open_cache(policies=BEHIND, remote={"write_behind_max": 1})
    other = await open_cache(memory=None)
    async with deaf(server, cache):
        await cache.set("b:1", "older")
        await until(lambda: "b:1" in cache._behind._sending, "under way")
        await cache.set("b:2", "fills the queue")
        await cache.set("b:1", "later")
    await delivered(cache)
    await until(lambda: not cache._shared._deferred.is_owed, "everything was delivered")
    assert await other.get("b:1") in {None, "later"}


async def test_flush_does_not_wait_for_what_comes_after_it(open_cache):
    """Under a stream of queued writes a flush returns when those before it were delivered."""
    cache = await open_cache(policies=BEHIND)
    is_over = False

    async def write(task: int) -> None:
        number = 0
        while not is_over:
            number += 1
            await cache.set(f"b:{task}:{number % 100}", number)
            await asyncio.sleep(0)

    writing = [asyncio.get_running_loop().create_task(write(task)) for task in range(4)]

    try:
        async with asyncio.timeout(60):
            for _ in range(5):
                await cache.set("b:mine", 1)
                await cache.flush()
    finally:
        is_over = True
        await asyncio.gather(*writing)


async def test_a_write_after_an_owed_clear_is_delivered(open_cache, server):
    """What is queued after a clear that could not be delivered yet does not go with it."""
    cache = await open_cache(policies=BEHIND)
    await cache.set("b:0", "before")
    await delivered(cache)
    async with deaf(server, cache):
        await cache.clear()
        await cache.set("b:1", "after")
    await until(lambda: not cache._shared.owed.is_owed, "the clear was delivered")
    await delivered(cache)
    other = await open_cache(memory=None)
    assert await other.get_many(["b:0", "b:1"]) == {"b:1": "after"}


async def test_a_write_waits_for_the_clear_before_it(open_cache, server, monkeypatch):
    """While a clear is on its way, what was queued after it is not sent ahead of it to be cleared with it."""
    cache = await open_cache(policies=BEHIND)
    deliver, may_clear, is_clearing = cache._shared._deliver_everything, asyncio.Event(), asyncio.Event()

    async def deliver_late() -> None:
        is_clearing.set()
        await may_clear.wait()
        await deliver()

    monkeypatch.setattr(cache._shared, "_deliver_everything", deliver_late)
    clearing = asyncio.get_running_loop().create_task(cache.clear())
    await is_clearing.wait()
    await cache.set("b:1", "after")
    flushing = asyncio.get_running_loop().create_task(cache.flush())
    with server.client() as client:
        for _ in range(20):  # rounds in which a write that does not wait is there
            await asyncio.to_thread(client.ping)
        assert not [name for name in client.scan_iter() if b"b:1" in name]
    may_clear.set()
    await asyncio.gather(clearing, flushing)
    assert await (await open_cache(memory=None)).get("b:1") == "after"


async def test_a_write_from_before_the_first_connection_is_delivered(open_cache, server):
    """A process that starts while Redis is away does not lose what it queues, although the namespace was cleared
    once."""
    other = await open_cache(memory=None)
    await other.clear()
    server.signal(signal.SIGSTOP)
    cache = await open_cache(policies=BEHIND, remote={"timeout": IMPATIENT_S, "connect_timeout": IMPATIENT_S})
    await cache.set("b:1", 1)
    server.signal(signal.SIGCONT)
    set_patience(cache, 20)
    await delivered(cache)
    assert await other.get("b:1") == 1


KEYS = {"2026-10": "an old secret of enough bytes", "2026-11": "a new secret of enough bytes"}


async def test_a_spooled_write_with_a_removed_key_is_kept_aside_and_told(open_cache, server, witness, tmp_path: Path):
    """What cannot be opened any more is not dropped: the observer is told where it is, and with the key back in the
    keyring and the file renamed it is delivered."""
    spooled = {"spool_directory": str(tmp_path)}
    old, new = ({**spooled, "signing_keys": {name: KEYS[name] for name in names}} for names in (KEYS, ["2026-11"]))
    writer = await open_cache(policies=BEHIND, remote=old)
    await writer.flush()
    async with deaf(server, writer):
        await writer.set("b:1", 1)
        await writer.close()
    heir = await open_cache(policies=BEHIND, remote=new)
    await delivered(heir)
    (event,) = witness.seen(WriteDropped)
    (aside,) = tmp_path.glob("*.aside")
    assert event.key == "b:1"
    assert "2026-10" in event.reason
    assert str(aside) in event.reason
    await heir.close()
    await (await open_cache(policies=BEHIND, remote=new)).close()
    assert len(witness.seen(WriteDropped)) == 1, "it is told once"
    aside.rename(aside.with_suffix(".spool"))
    rotated_back = await open_cache(policies=BEHIND, remote=old)
    await delivered(rotated_back)
    assert await rotated_back.get("b:1") == 1


async def test_a_damaged_spool_is_kept_and_told(open_cache, server, witness, tmp_path: Path):
    """What stands before the damage is delivered; the file stays for somebody to look at."""
    spooled = {"spool_directory": str(tmp_path)}
    writer = await open_cache(policies=BEHIND, remote=spooled)
    server.stop()
    await writer.set("b:1", 1)
    await writer.set("b:2", 2)
    await writer.close()
    await asyncio.to_thread(server.start)
    (left,) = tmp_path.glob("*.spool")
    data = bytearray(left.read_bytes())
    data[-1] ^= 1
    left.write_bytes(data)
    heir = await open_cache(policies=BEHIND, remote=spooled)
    await delivered(heir)
    (event,) = witness.seen(WriteDropped)
    (kept,) = tmp_path.glob("*.damaged")
    assert str(kept) in event.reason
    assert kept.read_bytes() == data
    assert await heir.get_many(["b:1", "b:2"]) == {"b:1": 1}


GONE = """
import asyncio, sys
from headrace.cache import Cache, RemoteConfig

async def main(url, directory, how):
    user = {"username": "guest", "password": "guest-password"}
    async with Cache(remote=RemoteConfig(url=url, spool_directory=directory, timeout=0.2, **user)) as cache:
        print("open", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        match how:
            case "delete": await cache.delete("k")
            case "tag": await cache.invalidate_tag("t")
            case "pattern": await cache.invalidate_pattern("k*")
            case "clear": await cache.clear()
            case _: await cache.set("k", "new")
        print("returned", flush=True)
        await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


@pytest.mark.parametrize("how", ["delete", "tag", "pattern", "clear", "set"])
async def test_an_invalidation_into_an_outage_survives_kill_9(open_cache, server, tmp_path: Path, how):
    """With a spool, what a process invalidated (or overwrote) while Redis was away is gone once another process opens
    the spool."""
    other = await open_cache(memory=None)
    await other.set("k", "old", tags=["t"])
    server.call("ACL", "SETUSER", "guest", "on", ">guest-password", "~*", "&*", "+@all")
    child = subprocess.Popen(
        [sys.executable, "-c", GONE, server.url, str(tmp_path), how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert await asyncio.to_thread(child.stdout.readline) == "open\n"
        # For this process alone the server is gone.
        server.call("ACL", "SETUSER", "guest", "off")
        server.call("CLIENT", "KILL", "USER", "guest")
        child.stdin.write("go\n")
        child.stdin.flush()
        assert await asyncio.to_thread(child.stdout.readline) == "returned\n"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.communicate()
    assert await other.get("k") == "old"
    heir = await open_cache(remote={"spool_directory": str(tmp_path)})
    assert await heir.get("k") is None
    await other._shared.learn_generation()
    assert await other.get("k") is None
    await heir.close()
    assert list(tmp_path.iterdir()) == []


async def test_what_was_delivered_after_all_is_not_left_in_the_spool(open_cache, server, tmp_path: Path):
    """An invalidation that the process itself delivers later is crossed out."""
    cache = await open_cache(remote={"spool_directory": str(tmp_path)})
    await cache.set("k", "old")
    async with deaf(server, cache):
        await cache.delete("k")
        assert cache._behind._debts == {("key", "k")}
    await until(lambda: not cache._shared.owed.is_owed, "delivered")
    await until(lambda: not cache._behind._debts, "crossed out")


class FullDisk:
    """`os.write` on a disk with so many bytes left."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, left: int) -> None:
        self.left = left
        self._write = os.write
        monkeypatch.setattr("headrace.cache.spool.os.write", self)

    def __call__(self, file: int, data: bytes) -> int:
        if self.left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        size = min(self.left, len(data))
        self.left -= size
        return self._write(file, data[:size])


async def test_a_full_disk_costs_the_queue_not_the_writes(open_cache, server, witness, tmp_path: Path, monkeypatch):
    """While the spool's disk takes no more, writes go through to Redis, deliveries go on, and the observer is told."""
    cache = await open_cache(policies=BEHIND, remote={"spool_directory": str(tmp_path)})
    other = await open_cache(memory=None)
    disk = FullDisk(monkeypatch, left=10)
    for number in range(5):
        await cache.set(f"b:{number}", number)
    assert await other.get_many([f"b:{number}" for number in range(5)]) == {f"b:{n}": n for n in range(5)}
    async with asyncio.timeout(30):
        await cache.flush()
        await cache.delete("b:0")
    assert [event.tier for event in witness.seen(TierUnavailable)] == ["spool"]
    disk.left = 1 << 30
    await cache.set("b:9", 9)
    await delivered(cache)
    assert "spool" in [event.tier for event in witness.seen(TierRecovered)]
    assert await other.get("b:9") == 9


async def test_a_disk_that_fills_while_writes_are_delivered_does_not_stop_the_delivery(
    open_cache, server, tmp_path: Path, monkeypatch
):
    """The courier outlives a failure to cross out what it delivered."""
    cache = await open_cache(policies=BEHIND, remote={"spool_directory": str(tmp_path)})
    other = await open_cache(memory=None)
    server.signal(signal.SIGSTOP)
    for number in range(5):
        await cache.set(f"b:{number}", number)
    FullDisk(monkeypatch, left=0)
    server.signal(signal.SIGCONT)
    async with asyncio.timeout(60):
        await delivered(cache)
    assert len(await other.get_many([f"b:{number}" for number in range(5)])) == 5
    async with asyncio.timeout(30):
        await cache.set("b:5", 5)
    assert await other.get("b:5") == 5
