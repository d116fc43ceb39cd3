"""What holds for the cache with and without `await`, on a real Redis: one suite, two doors."""

import asyncio
import functools
import threading
from collections.abc import AsyncIterator, Callable

import pytest
from msgspec import UNSET

from headrace.cache import Cache, CachePolicy, RemoteConfig, SyncCache
from headrace.errors import CacheUnavailable, InvalidKey, NotOpen, RecursiveLoad, UnencodableValue
from tests.redis_servers import CLOCK, PATIENT, until_found

CALLS = (
    *("open", "close", "get", "get_or_load", "get_many", "set", "set_many", "update", "delete"),
    *("invalidate_tag", "invalidate_pattern", "clear", "flush"),
)


class AwaitedSyncCache:
    """The sync door seen from a test that awaits: each call in a thread of its own."""

    def __init__(self, **options: object) -> None:
        self.inner = SyncCache(**options)  # type: ignore[arg-type]
        for name in CALLS:
            setattr(self, name, functools.partial(asyncio.to_thread, getattr(self.inner, name)))

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def cached(self, *args: object, **options: object) -> Callable[..., object]:
        def decorator(function: Callable[..., object]) -> Callable[..., object]:
            return functools.partial(asyncio.to_thread, self.inner.cached(*args, **options)(function))

        return decorator


class AsyncCache(Cache):
    """The async door, whose plain decorated functions are called from threads, where they may wait."""

    def cached(self, *args: object, **options: object) -> Callable[..., object]:
        def decorator(function: Callable[..., object]) -> Callable[..., object]:
            return functools.partial(asyncio.to_thread, super(AsyncCache, self).cached(*args, **options)(function))

        return decorator


@pytest.fixture(params=[AsyncCache, AwaitedSyncCache], ids=["async", "sync"])
async def open_door(request, server) -> AsyncIterator[Callable[..., object]]:
    opened = []

    async def open_one(**options: object) -> object:
        remote = RemoteConfig(url=server.url, **PATIENT)
        door = request.param(**{"remote": remote, **options})
        await door.open()
        opened.append(door)
        return door

    yield open_one
    for door in opened:
        await door.close()


@pytest.fixture
async def door(open_door):
    return await open_door()


async def test_what_is_set_is_got(open_door):
    """A value, None among them, comes back in the process that set it and in another."""
    one, two = await open_door(), await open_door()
    await one.set("k", {"a": [1, None]})
    await one.set("none", None)
    for door in (one, two):
        assert await door.get("k") == {"a": [1, None]}
        assert await door.get("none", "default") is None
        assert await door.get("missing", "default") == "default"


async def test_many_are_set_and_got_in_order(door):
    """`get_many` leaves out what is missing and keeps the order of the keys."""
    await door.set_many({"a": 1, "b": 2, "c": 3})
    assert list((await door.get_many(["c", "x", "a", "c"])).items()) == [("c", 3), ("a", 1)]


async def test_a_ttl_of_zero_removes_and_none_keeps(door):
    """`ttl=0` is not stored, `ttl=None` has no end."""
    await door.set("k", 1)
    await door.set("k", 2, ttl=0)
    await door.set("kept", 3, ttl=None)
    assert await door.get("k") is None
    assert await door.get("kept") == 3


async def test_invalidations_reach_both_tiers(open_door):
    """Keys, tags, patterns and clear are gone for this process and for others."""
    one, two = await open_door(), await open_door(memory=None)
    await one.set_many({"k": 1, "p:1": 1, "p:2": 2, "rest": 4})
    await one.set("t", 3, tags=["tag"])
    assert await one.delete("k", "missing") == 1
    assert await one.invalidate_pattern("p:*") == 2
    await one.invalidate_tag("tag")
    for door in (one, two):
        assert await door.get_many(["k", "p:1", "p:2", "t", "rest"]) == {"rest": 4}
    await one.clear()
    assert await one.get("rest") is None
    while await two.get("rest") is not None:  # without a channel of its own it looks once a second
        await asyncio.sleep(0.05)


async def test_a_cold_key_is_loaded_once(open_door, server):
    """Twenty callers in two processes' caches run one loader, and all get its value."""
    remote = RemoteConfig(url=server.url, **PATIENT, lease=60.0)
    doors = [await open_door(remote=remote), await open_door(remote=remote)]
    loads = []

    def load() -> int:
        loads.append(threading.get_ident())
        threading.Event().wait(0.05)
        return 42

    async def load_anywhere(door) -> int:
        if isinstance(door, Cache):
            return await door.get_or_load("cold", functools.partial(asyncio.to_thread, load))
        return await door.get_or_load("cold", load)

    values = await asyncio.gather(*(load_anywhere(door) for door in doors for _ in range(4)))
    assert values == [42] * 8
    assert len(loads) == 1


async def test_what_a_loader_raises_reaches_everyone_and_is_not_cached(door):
    """The error is the loader's own, and the next call loads again."""

    def fail() -> None:
        raise LookupError("no such row")

    with pytest.raises(LookupError, match="no such row"):
        await door.get_or_load("k", fail)
    assert await door.get_or_load("k", lambda: 1) == 1


async def test_a_stale_value_stands_in_for_a_failing_load(open_door):
    """Past its TTL and within `stale_max`, the old value answers when the loader fails."""
    door = await open_door(policies=[CachePolicy(ttl=0.05, jitter=0, stale_max=60)])
    await door.get_or_load("k", lambda: "old")
    while await door.get("k") is not None:
        await asyncio.sleep(0.01)

    def fail() -> None:
        raise LookupError

    assert await door.get_or_load("k", fail) == "old"


async def test_a_decorated_function_is_called_once_a_key(open_door):
    """The key is made of the arguments, and the annotated type is checked."""
    calls = []
    doors = [await open_door(), await open_door(memory=None)]

    def load(user_id: int) -> dict[str, int]:
        calls.append(user_id)
        return {"id": user_id}

    for door in doors:
        cached = door.cached("user:{user_id}")(load)
        assert await cached(1) == {"id": 1}
        assert await cached(2) == {"id": 2}
        with pytest.raises(InvalidKey):
            await cached("1")
    assert calls == [1, 2]
    await doors[0].delete("user:1")
    await cached(1)
    assert calls == [1, 2, 1]


async def test_a_load_that_would_wait_for_itself_is_refused(open_door):
    """A loader that asks for its own key gets RecursiveLoad."""
    door = await open_door()
    inner = getattr(door, "inner", None)
    if inner is None:

        async def load() -> object:
            return await door.get_or_load("k", load)
    else:

        def load() -> object:
            return inner.get_or_load("k", load)

    with pytest.raises(RecursiveLoad):
        await door.get_or_load("k", load)


async def test_wrong_calls_say_what_is_wrong(door):
    """Keys that cannot be one, values that cannot be shared, and a closed cache are told."""
    with pytest.raises(InvalidKey):
        await door.set("", 1)
    with pytest.raises(UnencodableValue):
        await door.set("k", {1, 2})
    await door.close()
    with pytest.raises(NotOpen):
        await door.get("k")
    await door.open()
    await door.set("k", 1)
    assert await door.get("k") == 1


async def test_a_dead_server_never_breaks_a_caller(open_door, server):
    """With Redis gone reads load, writes stay in memory, and an update says that it cannot be made."""
    door = await open_door(remote=RemoteConfig(url=server.url, **PATIENT, degraded_ttl=60.0))
    await door.set("before", 1)
    server.stop()
    assert await door.get_or_load("k", lambda: "loaded") == "loaded"
    await door.set("w", 2)
    assert await door.get("w") == 2
    assert await door.delete("w") == 1
    assert await door.get("w", "gone") == "gone"
    with pytest.raises(CacheUnavailable):
        await door.update("k", lambda old: 1)


def count_up(old: object) -> object:
    return 1 if old is UNSET else old + 1


async def test_updates_are_atomic_over_processes(open_door):
    """Three processes count to sixty on one key, and none of the counts is lost."""
    doors = [await open_door(), await open_door(), await open_door(memory=None)]

    async def count(door) -> None:
        for _ in range(20):
            await door.update("n", count_up)

    await asyncio.gather(*map(count, doors))
    for door in doors:  # a copy goes as soon as the door hears of the next count
        await until_found(functools.partial(door.get, "n"), 60)


async def test_adding_succeeds_for_one(open_door):
    """Of all who add a key at once, one finds it absent."""
    doors = [await open_door(), await open_door()]
    added = []

    def add(name: str) -> Callable[[object], object]:
        return lambda old: name if old is UNSET else UNSET

    async def try_to(door, name: str) -> None:
        if await door.update("lock", add(name), ttl=30) == name:
            added.append(name)

    await asyncio.gather(*(try_to(door, f"{place}/{turn}") for place, door in enumerate(doors) for turn in range(5)))
    assert len(added) == 1
    assert await doors[0].get("lock") == added[0]


async def test_an_update_keeps_the_expiry_unless_told(door, server):
    """The TTL that a value had goes on, `ttl=` begins a new one, and `ttl=0` removes."""
    written = CLOCK.monotonic()
    await door.set("n", 1, ttl=100)
    for _ in range(50):
        await door.update("n", count_up)
    (name,) = [name for name in server.call("KEYS", "*n}") if b"lease" not in name]
    left_ms = server.call("PTTL", name)
    assert 99_000 - (CLOCK.monotonic() - written) * 1000 < left_ms <= 100_100
    await door.update("n", lambda old: old, ttl=None)
    assert server.call("PTTL", name) == -1
    await door.update("n", lambda old: old, ttl=0)
    assert await door.get("n") is None


async def test_an_update_that_changes_nothing_writes_nothing(door):
    """UNSET from `change` leaves the key as it is, and what is there comes back."""
    assert await door.update("k", lambda old: UNSET) is UNSET
    await door.set("k", 1)
    assert await door.update("k", lambda old: UNSET) == 1


async def test_what_a_change_raises_reaches_the_caller(door):
    """An error of the caller's own function changes nothing."""
    await door.set("k", None)
    with pytest.raises(TypeError):
        await door.update("k", count_up)
    assert await door.get("k", "x") is None


async def test_an_update_wins_over_a_load_that_began_before_it(open_door):
    """A value that was loaded before an update is not put back after it."""
    one, two = await open_door(), await open_door(memory=None)
    is_loading, may_end = threading.Event(), threading.Event()

    def load() -> int:
        is_loading.set()
        may_end.wait(60)
        return 1

    loader = functools.partial(asyncio.to_thread, load) if isinstance(one, Cache) else load
    loading = asyncio.get_running_loop().create_task(one.get_or_load("k", loader))
    assert await asyncio.to_thread(is_loading.wait, 60)
    await two.update("k", lambda old: 2)
    may_end.set()
    assert await loading == 1
    assert await one.get("k") == 2
    assert await two.get("k") == 2
