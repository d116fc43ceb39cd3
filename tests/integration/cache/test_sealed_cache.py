"""Signed and encrypted entries over a real Redis: what others can do to them comes to a miss and an event."""

import re
from itertools import pairwise

import pytest

from headrace.events import EntryRejected

KEYS = {"2026-11": "the secret of november", "2026-10": "the secret of october"}
kinds = pytest.mark.parametrize("field", ["signing_keys", "encryption_keys"])


def name_of(cache, key: str) -> bytes:
    return cache._shared.keyspace.entry(key)


@kinds
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "cut, or longer than it was written"),
        (lambda data: data[:46], "cut"),
        (lambda data: data + b"x", "cut, or longer than it was written"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "signature does not match|cannot be decrypted: altered"),
        (lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:], "signature does not match|cannot be decrypted"),
        (lambda data: data.replace(b"2026-11", b"2026-12"), "key has the id '2026-12'"),
        (lambda data: data[:3] + b"\0" + data[4:], "plain, where only (signed|encrypted) entries are accepted"),
    ],
    ids=["shorter", "header alone", "longer", "tag", "times", "key id", "flags"],
)
async def test_damage_is_a_miss_with_its_reason(open_cache, server, witness, field, damage, reason):
    """The caller gets a miss, the observer one event that tells what is wrong."""
    cache = await open_cache(memory=None, remote={field: KEYS})
    await cache.set("k", {"a": 1})
    with server.client() as client:
        client.set(name_of(cache, "k"), damage(client.get(name_of(cache, "k"))))
    assert await cache.get("k", "miss") == "miss"
    (event,) = witness.seen(EntryRejected)
    assert event.key == "k"
    assert re.search(f"({reason})", event.reason)


@kinds
async def test_an_entry_that_was_moved_is_a_miss(open_cache, server, witness, field):
    """Copied to another key, or to another namespace with the same secrets, it does not answer."""
    mine = await open_cache(memory=None, remote={field: KEYS}, namespace="mine")
    theirs = await open_cache(memory=None, remote={field: KEYS}, namespace="theirs")
    await mine.set("a", 1)
    with server.client() as client:
        data = client.get(name_of(mine, "a"))
        client.set(name_of(mine, "b"), data)
        client.set(name_of(theirs, "a"), data)
    assert [await mine.get("a"), await mine.get("b"), await theirs.get("a")] == [1, None, None]
    assert {event.reason for event in witness.seen(EntryRejected)} == {"written for another key or namespace"}


@kinds
async def test_keys_rotate_without_a_miss(open_cache, witness, field):
    """First everyone learns to read the new key, then to write it, then to forget the old one."""
    new, old = KEYS.items()
    rings = [dict([old]), dict([old, new]), dict([new, old]), dict([new])]
    caches = [await open_cache(memory=None, remote={field: ring}) for ring in rings]
    # While a step is rolled out, processes of it and of the step before run side by side.
    for before, after in pairwise(caches):
        await after.set("k", "after")
        assert await before.get("k") == "after"
        if after is not caches[-1]:
            await before.set("k", "before")
            assert await after.get("k") == "before"
    assert witness.seen(EntryRejected) == []
    await caches[0].set("k", "written long ago")
    assert await caches[-1].get("k", "miss") == "miss"
    assert [event.reason[-9:] for event in witness.seen(EntryRejected)] == ["'2026-10'"]


async def test_only_encrypted_entries_count_once_encryption_is_on(open_cache, witness):
    """What was written plain or only signed is a miss, and the next write replaces it."""
    plain = await open_cache(memory=None)
    signed = await open_cache(memory=None, remote={"signing_keys": KEYS})
    encrypted = await open_cache(memory=None, remote={"encryption_keys": KEYS})
    await plain.set("plain", 1)
    await signed.set("signed", 1)
    assert await encrypted.get_many(["plain", "signed"]) == {}
    assert {event.reason for event in witness.seen(EntryRejected)} == {
        "plain, where only encrypted entries are accepted",
        "signed, where only encrypted entries are accepted",
    }
    await encrypted.set("plain", 2)
    assert [await encrypted.get("plain"), await plain.get("plain")] == [2, None]


async def test_redis_holds_nothing_legible_of_an_encrypted_value(open_cache, server):
    """Neither the value nor the tags of an entry can be read from its bytes."""
    cache = await open_cache(memory=None, remote={"encryption_keys": KEYS, "compress_min": None})
    await cache.set("k", "a value to keep quiet about", tags=["a tag to keep quiet about"])
    with server.client() as client:
        assert b"quiet" not in client.get(name_of(cache, "k"))
    assert await cache.get("k") == "a value to keep quiet about"
