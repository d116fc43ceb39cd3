"""One loader a cold key over all processes, and no value written that was loaded before an invalidation."""

import asyncio
import random
import subprocess
import sys
from collections import Counter

import pytest

from headrace.cache import CachePolicy, RemoteConfig, Strategy
from headrace.cache.lease import Claim, Lease, Leases
from headrace.cache.remote import Remote, RemoteWatcher
from headrace.errors import UnencodableValue
from tests.redis_servers import PATIENT, RedisServer, settled, until, wait_until

CHILD = """
import asyncio, sys
import redis.asyncio
from headrace.cache import Cache, RemoteConfig

async def main(url, tasks, lease_s, first_s):
    client = redis.asyncio.Redis.from_url(url)
    async def load():
        number = await client.rpush("runs", str(__import__("os").getpid()))
        await asyncio.sleep(float(first_s) if number == 1 else 0.3)
        return {"value": 42}
    remote = RemoteConfig(url=url, lease=float(lease_s), lease_wait_max=100, timeout=20, connect_timeout=20)
    async with Cache(remote=remote) as cache:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        values = await asyncio.gather(*(cache.get_or_load("cold", load) for _ in range(int(tasks))))
        assert values == [{"value": 42}] * int(tasks), values
        print("done", flush=True)
    await client.aclose()

asyncio.run(main(*sys.argv[1:]))
"""


class Children:
    """Processes that ask for the same cold key at the same moment."""

    def __init__(self, server: RedisServer, number: int, *, tasks: int, lease_s: float, first_s: float) -> None:
        command = [sys.executable, "-c", CHILD, server.url, str(tasks), str(lease_s), str(first_s)]
        self.processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
        ]

    def go(self) -> None:
        for process in self.processes:
            assert process.stdout.readline() == "ready\n"
        for process in self.processes:
            process.stdin.write("\n")
            process.stdin.flush()

    def outcomes(self) -> Counter:
        return Counter(process.communicate(timeout=60)[0].strip() for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def children():
    started = []

    def start(*arguments, **options) -> Children:
        started.append(Children(*arguments, **options))
        return started[-1]

    yield start
    for each in started:
        each.stop()


def test_four_processes_load_a_cold_key_once(server, children):
    """400 callers in 4 processes cost one load, and all get its value."""
    group = children(server, 4, tasks=100, lease_s=30, first_s=0.3)
    group.go()
    assert group.outcomes() == {"done": 4}
    with server.client() as client:
        assert client.llen("runs") == 1


def test_a_killed_loader_costs_one_more_load_and_a_bounded_wait(server, children):
    """When the loading process is killed, another takes over after the lease ran out: two loads, not more."""
    group = children(server, 4, tasks=50, lease_s=60, first_s=100)
    group.go()
    with server.client() as client:
        wait_until(lambda: client.llen("runs") == 1, "one loads")
        loader = next(each for each in group.processes if each.pid == int(client.lrange("runs", 0, -1)[0]))
        loader.kill()
        loader.wait()
        (lease,) = client.keys("*@lease*")
        assert 0 < client.pttl(lease) <= 60_000  # and nobody is left to renew it
        assert client.llen("runs") == 1
        client.pexpire(lease, 1)  # a minute later
        assert group.outcomes() == {"done": 3, "": 1}  # sooner than `lease_wait_max`
        assert client.llen("runs") == 2


async def test_a_waiter_gets_what_the_other_process_loaded(open_cache):
    """While another process loads, a caller waits for its value instead of loading."""
    a, b = await open_cache(remote={"lease": 60}), await open_cache()
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "value"

    first = asyncio.get_running_loop().create_task(a.get_or_load("k", load))
    await until(lambda: a.statistics().loads == 1)
    second = asyncio.get_running_loop().create_task(b.get_or_load("k", lambda: pytest.fail("loaded twice")))
    await until(lambda: b.statistics().lease_waits == 1)
    gate.set()
    assert [await first, await second] == ["value", "value"]


@pytest.mark.parametrize("how", ["delete", "set", "pattern", "tag", "clear"])
async def test_a_change_by_another_process_wins_over_a_load(open_cache, how):
    """What one process is loading is not kept in any tier when another changes the key meanwhile."""
    a, b = await open_cache(), await open_cache()
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "old"

    loading = asyncio.get_running_loop().create_task(a.get_or_load("k", load, tags=["t"]))
    await until(lambda: a.statistics().loads == 1)
    match how:
        case "delete":
            await b.delete("k")
        case "set":
            await b.set("k", "new")
        case "pattern":
            await b.invalidate_pattern("k*")
        case "tag":
            await b.invalidate_tag("t")
        case _:
            await b.clear()
    gate.set()
    assert await loading == "old"
    assert await b.get("k") == ("new" if how == "set" else None)
    if how in {"delete", "set", "pattern"}:
        assert await a.get("k") == ("new" if how == "set" else None)
        assert a.statistics().installs_refused >= 1


async def test_a_failed_load_lets_the_next_process_try_at_once(open_cache):
    """A loader that raises, is cancelled or returns what cannot be shared gives its lease back."""
    a, b = await open_cache(remote={"lease": 60}), await open_cache(remote={"lease": 60})

    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await a.get_or_load("failed", fail)
    task = asyncio.get_running_loop().create_task(a.get_or_load("cancelled", lambda: asyncio.Event().wait()))
    await until(lambda: a.statistics().loads == 2)
    task.cancel()
    await asyncio.wait([task])
    with pytest.raises(UnencodableValue):
        await a.get_or_load("odd", lambda: (1, 2))
    async with asyncio.timeout(30):
        for key in ("failed", "cancelled", "odd"):
            assert await b.get_or_load(key, lambda: 1) == 1


@pytest.fixture
async def open_leases(server):
    """Leases on the server, as if each were those of a process of its own."""
    opened = []

    async def open_one(*, lease_s: float) -> Leases:
        remote = Remote(RemoteConfig(url=server.url, **PATIENT), RemoteWatcher(), rng=random.random)
        await remote.open()
        leases = Leases(remote, lease_s=lease_s, token=lambda: random.randbytes(8), rng=random.random)
        opened.append((leases, remote))
        return leases

    yield open_one
    for leases, remote in opened:
        await leases.close()
        await remote.close()


async def claim(leases: Leases, opened=None, *, patience_s: float = 20) -> Claim:
    async def nothing(data: object) -> None:
        return None

    return await leases.claim((b"{k}", b"{k}:lease"), opened or nothing, is_enough=bool, patience_s=patience_s)


@pytest.mark.parametrize("moment", ["taking", "looking"])
async def test_a_cancelled_claim_leaves_no_lease(open_leases, moment):
    """Whoever gives up while the lease is being taken, or while the entry is being looked at, gives it back."""
    leases = await open_leases(lease_s=60)
    looks = asyncio.Event()

    async def look(data: object) -> None:
        looks.set()
        await asyncio.Event().wait()

    claiming = asyncio.get_running_loop().create_task(claim(leases, look))
    if moment == "looking":
        await looks.wait()
    else:
        await asyncio.sleep(0)
    claiming.cancel()
    await asyncio.wait([claiming])

    assert claiming.cancelled()
    assert isinstance((await claim(leases)).right, Lease)


async def test_a_look_that_fails_leaves_no_lease(open_leases):
    """If what is under the key cannot be looked at, the next one may try."""
    leases = await open_leases(lease_s=60)

    async def fail(data: object) -> None:
        raise ValueError("unreadable")

    with pytest.raises(ValueError, match="unreadable"):
        await claim(leases, fail)
    assert isinstance((await claim(leases)).right, Lease)


async def test_a_lost_lease_is_not_renewed(open_leases):
    """A lease that nobody holds any more, though it was never given back, runs out in its time."""
    one, other = await open_leases(lease_s=1), await open_leases(lease_s=1)
    assert isinstance((await claim(one)).right, Lease)  # and is gone with this line

    assert isinstance((await claim(other)).right, Lease)


async def test_a_long_load_keeps_its_lease(open_cache, server):
    """The lease is renewed while its holder lives, so a load may take longer than the lease lasts."""
    a, b = await open_cache(remote={"lease": 6}), await open_cache()
    gate = asyncio.Event()

    async def load() -> int:
        await gate.wait()
        return 1

    first = asyncio.get_running_loop().create_task(a.get_or_load("k", load))
    await until(lambda: a.statistics().loads == 1)
    second = asyncio.get_running_loop().create_task(b.get_or_load("k", lambda: pytest.fail("loaded twice")))
    with server.client() as client:
        renewed = 0
        while renewed < 4:  # one every two seconds
            before = client.info("commandstats").get("cmdstat_pexpire", {"calls": 0})["calls"]
            await until(
                lambda n=before: client.info("commandstats").get("cmdstat_pexpire", {"calls": 0})["calls"] > n,
                "renewed",
            )
            renewed += 1
    gate.set()
    assert [await first, await second] == [1, 1]


async def test_patience_ends(open_cache):
    """A caller that waited lease_wait_max for a living loader loads for itself, and that value is kept nowhere."""
    a, b = await open_cache(remote={"lease": 60}), await open_cache(remote={"lease_wait_max": 0.1})
    gate = asyncio.Event()

    async def load() -> str:
        await gate.wait()
        return "slow"

    first = asyncio.get_running_loop().create_task(a.get_or_load("k", load))
    await until(lambda: a.statistics().loads == 1)
    assert await b.get_or_load("k", lambda: "mine") == "mine"
    assert "k" not in b.memory
    gate.set()
    assert await first == "slow"
    assert await b.get("k") == "slow"


async def test_a_refresh_runs_in_one_process(open_cache):
    """Of two processes whose copies want renewal at once, one reloads and the other goes on with what it has."""
    policy = CachePolicy(strategy=Strategy.REFRESH_AHEAD, ttl=300, refresh_at=0.0001, retry_after=300, jitter=0)
    a, b = [await open_cache(policies=[policy], remote={"lease": 60}) for _ in range(2)]
    gate = asyncio.Event()
    runs = 0

    async def load() -> int:
        nonlocal runs
        runs += 1
        if runs > 1:
            await gate.wait()
        return runs

    await a.get_or_load("k", load)
    await settled(b)  # what b reads before it has heard of this write is not kept
    await b.get("k")
    await until(
        lambda: all(cache.entry_lookup("k").attention_at < cache.now() for cache in (a, b)), "both want renewal"
    )
    assert await a.get_or_load("k", load) == 1
    await until(lambda: runs == 2)
    assert await b.get_or_load("k", load) == 1
    await until(lambda: b.entry_lookup("k").attention_at > b.now(), "it was told that another reloads")
    gate.set()
    await until(lambda: a.entry_lookup("k").value == 2, "renewed")
    assert runs == 2


async def test_random_interleavings_never_keep_an_old_value(open_cache):
    """Loads and deletes of three processes at random: what any tier holds afterwards is the source's last value."""
    caches = [await open_cache() for _ in range(3)]
    rng = random.Random(7)
    for round_number in range(60):
        key, source = f"k{round_number}", {"value": 0}

        async def load(source=source) -> int:
            value = source["value"]
            for _ in range(rng.randrange(4)):
                await asyncio.sleep(0)
            await asyncio.sleep(rng.random() * 0.003)
            return value

        async def act(number: int, key=key, source=source, load=load) -> None:
            await asyncio.sleep(rng.random() * 0.004)
            cache = rng.choice(caches)
            if number % 3:
                await cache.get_or_load(key, load)
            else:
                source["value"] += 1
                await cache.delete(key)
                # The other processes' own copies are the invalidation channel's business, not the lease's.
                for other in caches:
                    other._near.forget([key])

        await asyncio.gather(*(act(number) for number in range(12)))
        for cache in caches:
            found = await cache.get(key)
            assert found in {None, source["value"]}, f"round {round_number}"
