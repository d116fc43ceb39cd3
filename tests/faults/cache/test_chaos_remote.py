"""ChaosRemote does to a real server what its names say, and everything else passes as if it were not there."""

import asyncio
from urllib.parse import urlsplit

import hiredis
import pytest

from headrace.cache import Cache, RemoteConfig, SyncCache
from headrace.errors import CacheUnavailable, CallerError, ConfigError
from headrace.events import TierRecovered, TierUnavailable
from headrace.testing import ChaosRemote
from tests.redis_servers import CLOCK, NEWEST, PATIENT, WHEEL, free_port, is_idle, until

SERVERS = [NEWEST, *([str(WHEEL / "bin" / "redis-server")] if WHEEL else [])]


@pytest.fixture
async def chaos(server):
    async with ChaosRemote(server.url) as chaos:
        yield chaos


@pytest.fixture
async def open_far(chaos, witness):
    """Opens caches whose shared tier is behind the front."""
    caches = []

    async def open_one(**options) -> Cache:
        cache = Cache(remote=RemoteConfig(url=chaos.url, **PATIENT), observer=witness, **options)
        caches.append(cache)
        await cache.open()
        return cache

    yield open_one
    for cache in caches:
        await cache.close()


async def talk(chaos: ChaosRemote, *commands: str) -> list[str]:
    """The first line of each reply to commands that are sent in one write, as the server words it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(chaos.url).port)
    try:
        async with asyncio.timeout(60):
            writer.write(b"".join(hiredis.pack_command(tuple(command.split())) for command in commands))
            replies = []
            for _ in commands:
                replies.append((await reader.readline()).decode().strip())
                if replies[-1].startswith("$") and replies[-1] != "$-1":
                    await reader.readline()
            return replies
    finally:
        writer.close()


async def usable(cache: Cache) -> None:
    """Wait until the shared tier takes and gives values."""
    async with asyncio.timeout(60):
        while True:
            await cache.set("probe", 1)
            if await cache.get("probe") == 1:
                return
            await asyncio.sleep(0.01)


async def test_what_is_not_spoiled_passes(open_far, chaos):
    """Values of every size and content go both ways, and the commands that came are counted by name."""
    cache = await open_far(memory=None)
    values = {"small": 1, "large": "x" * 3_000_000, "bytes": b"\r\n*3\r\n$3\r\nSET\r\n" * 1000}
    await cache.set_many(values)

    assert [await cache.get(key) for key in values] == list(values.values())
    assert chaos.commands["SET"] >= 3
    assert chaos.refused == 0


@pytest.mark.parametrize("binary", SERVERS)
@pytest.mark.parametrize(
    ("error", "refused", "answered"),
    [
        ("OOM", "SET k 2", "DEL other"),
        ("READONLY", "DEL k", "GET k"),
        ("LOADING", "GET k", "CLIENT ID"),
        ("NOPERM", "PING", "CLIENT ID"),
    ],
)
async def test_a_code_refuses_what_the_server_would(start_redis, binary, error, refused, answered):
    """An error by its code meets the commands that a server refuses with it, is worded by it, and ends with heal."""
    async with ChaosRemote(start_redis(binary=binary).url) as chaos:
        chaos.refuse(error=error)
        before = await talk(chaos, refused, answered)
        chaos.heal()
        after = await talk(chaos, refused)

        assert before[0].startswith(f"-{error} ")
        assert not before[1].startswith("-")
        assert not after[0].startswith("-")
        assert chaos.refused == 1


async def test_errors_stand_in_their_place_in_a_pipeline(chaos):
    """Of many commands in one write, those that are refused get the error, and the others their own replies."""
    chaos.refuse("get", "CLIENT TRACKING", error="ERR on purpose")

    assert await talk(chaos, "SET k 1", "GET k", "APPEND k 2", "GET k", "CLIENT TRACKING ON", "STRLEN k") == [
        "+OK",
        "-ERR on purpose",
        ":2",
        "-ERR on purpose",
        "-ERR on purpose",
        ":2",
    ]


async def test_a_refusal_can_be_limited(chaos):
    """With `times`, so many commands are refused and the next one is carried out."""
    chaos.refuse("INCR", error="ERR once", times=2)

    assert await talk(chaos, "INCR n", "INCR n", "INCR n") == ["-ERR once", "-ERR once", ":1"]


async def test_a_full_server_costs_the_write_only(open_far, chaos):
    """While the server answers OOM, values that it has are read, loads answer, and afterwards writes are taken."""
    cache = await open_far(memory=None)
    await cache.set("had", 1)
    chaos.refuse(error="OOM")

    assert await cache.get("had") == 1
    assert await cache.get_or_load("new", lambda: 2) == 2
    assert cache.statistics().remote_available
    chaos.heal()
    await cache.set("new", 3)
    assert await cache.get("new") == 3


async def test_gone_and_back(open_far, chaos):
    """A server that is gone costs no caller an error, and it is used again after it came back."""
    cache = await open_far(memory=None)
    await cache.set("k", 1)
    chaos.gone()

    assert await cache.get("k", "away") == "away"
    assert await cache.get_or_load("k", lambda: "loaded") == "loaded"
    await until(lambda: not cache.statistics().remote_available, "it is noticed")
    chaos.heal()
    await usable(cache)


async def test_silence_is_held_up_not_lost(chaos):
    """What is sent into the silence arrives after heal."""
    chaos.silent()
    asking = asyncio.get_running_loop().create_task(talk(chaos, "PING"))
    done, _ = await asyncio.wait([asking], timeout=0.1)
    chaos.heal()

    assert not done
    assert await asking == ["+PONG"]


async def test_slow_takes_its_time_each_way(chaos):
    """A round trip takes at least twice what was said."""
    chaos.slow(0.05)
    started = CLOCK.monotonic()

    assert await talk(chaos, "PING") == ["+PONG"]
    assert CLOCK.monotonic() - started >= 0.1


@pytest.mark.parametrize("after_bytes", [1, 20, 60])
async def test_a_torn_reply_is_no_value(open_far, chaos, after_bytes):
    """A connection that ends in the middle of a reply gives nothing, and the next one the value."""
    cache = await open_far(memory=None)
    await cache.set("k", "x" * 500)
    await until(lambda: is_idle(cache), "the next bytes are the reply")
    chaos.tear(after_bytes=after_bytes)

    assert await cache.get("k", "torn") == "torn"
    await usable(cache)
    assert await cache.get("k") == "x" * 500


async def test_a_cut_that_has_not_come_is_called_off_by_heal(chaos):
    """After heal no connection is torn, however much it carries."""
    reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(chaos.url).port)
    for text in ("x" * 10, "x" * 1000):
        writer.write(hiredis.pack_command(("ECHO", text)))
        assert await asyncio.wait_for(reader.readline(), 60) == b"$%d\r\n" % len(text)
        assert await asyncio.wait_for(reader.readline(), 60) == text.encode() + b"\r\n"
        chaos.tear(after_bytes=100)
        chaos.heal()
    writer.close()


async def test_connections_can_be_cut(open_far, chaos):
    """After a cut the cache connects again at once."""
    cache = await open_far(memory=None)
    await cache.set("k", 1)
    greeted = chaos.commands["HELLO"]
    chaos.cut()

    await usable(cache)
    assert chaos.commands["HELLO"] > greeted


async def test_lost_tracking_leaves_the_rest(open_far, chaos, witness):
    """Without its channel the cache says so, still reads and writes, and says when the channel is back."""
    cache = await open_far()
    chaos.lose_tracking()
    await until(lambda: witness.seen(TierUnavailable), "the loss is told")

    await cache.set("k", 1)
    assert await cache.get("k") == 1
    assert cache.statistics().remote_available
    assert {event.tier for event in witness.seen(TierUnavailable)} == {"invalidation"}
    chaos.heal()
    await until(lambda: witness.seen(TierRecovered), "the channel is back")


async def test_nothing_overtakes_a_flush(open_far, chaos):
    """What is asked after `flush` finds an empty server, however soon."""
    cache = await open_far(memory=None)
    for number in range(30):
        await cache.set("k", number)
        assert await cache.get("k") == number
        chaos.flush()
        assert await cache.get("k", "empty") == "empty"


async def test_a_flush_does_not_heal(chaos):
    """A server that is silent stays so when it is flushed meanwhile."""
    chaos.silent()
    chaos.flush()
    asking = asyncio.get_running_loop().create_task(talk(chaos, "PING"))
    done, _ = await asyncio.wait([asking], timeout=0.1)
    chaos.heal()

    assert not done
    assert await asking == ["+PONG"]


async def test_a_flush_that_fails_is_told_at_the_end(server):
    """A server that does not take the flush makes `async with` raise."""
    with pytest.raises(CacheUnavailable, match=r"could not be flushed: .*AUTH"):
        async with ChaosRemote(f"unix://:wrong@{server.socket}") as chaos:
            chaos.flush()


def test_a_flush_that_fails_is_told_at_once(server):
    """Without a loop the call itself waits and raises."""
    with (
        ChaosRemote(f"unix://:wrong@{server.socket}") as chaos,
        pytest.raises(CacheUnavailable, match=r"could not be flushed: .*AUTH"),
    ):
        chaos.flush()


def test_a_plain_test_has_it_too(server):
    """Entered by `with`, it serves a SyncCache, and every fault can be told from the test's own thread."""
    with (
        ChaosRemote(server.url) as chaos,
        SyncCache(remote=RemoteConfig(url=chaos.url, **PATIENT), memory=None) as cache,
    ):
        cache.set("k", 1)
        chaos.refuse("GET", error="LOADING")
        assert cache.get("k", "away") == "away"
        chaos.heal()
        assert cache.get("k") == 1
        chaos.flush()
        assert cache.get("k", "empty") == "empty"
        chaos.gone()
        assert cache.get_or_load("k", lambda: "loaded") == "loaded"


@pytest.mark.parametrize("user", ["", ":secret@", "ada:secret@"], ids=["nobody", "password", "user"])
@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_user_and_database_are_the_servers(start_redis, user, kind):
    """The URL of the front logs in as the server's own URL does and uses the same database."""
    access = ["--requirepass", "secret", "--user", "ada", "on", ">secret", "~*", "&*", "+@all"] if user else []
    port = free_port() if kind == "tcp" else 0
    server = start_redis(*access, port=port)
    url = f"redis://{user}127.0.0.1:{port}/3" if port else f"unix://{user}{server.socket}?db=3"
    async with ChaosRemote(url) as chaos, Cache(remote=RemoteConfig(url=chaos.url, **PATIENT), memory=None) as cache:
        await cache.set("k", 1)
        assert await cache.get("k") == 1
        assert urlsplit(chaos.url).path == "/3"
        chaos.flush()
        assert await cache.get("k", "empty") == "empty"


@pytest.mark.parametrize(
    "url", ["rediss://127.0.0.1:6379/0", "redis+cluster://127.0.0.1:7000", "redis+sentinel://h/m"]
)
def test_what_it_cannot_look_into_is_refused(url):
    """TLS, clusters and Sentinels are turned down when it is made."""
    with pytest.raises(ConfigError, match=r"redis:// or unix://"):
        ChaosRemote(url)


async def test_misuse_is_refused(chaos, server):
    """What makes no sense is told at once."""
    with pytest.raises(CallerError, match="at least 1"):
        chaos.tear(after_bytes=0)
    with pytest.raises(CallerError, match="at least 1"):
        chaos.refuse(times=0)
    for error in ("", "ERR two\nlines"):
        with pytest.raises(CallerError, match="one line"):
            chaos.refuse(error=error)
    with pytest.raises(CallerError, match="not open"):
        ChaosRemote(server.url).gone()
