"""All nodes look for a row in the same place: the shard map in Postgres, changed once and taken over by everybody."""

import asyncio
import uuid
from dataclasses import replace

import psycopg
import pytest

from headrace.database import Database, KeyRange, ListedKey, Sharded, map_keeper
from headrace.database.kept_map import read_map
from headrace.errors import CallerError, ConfigError, DatabaseUnavailable, ShardMapOutdated, StatementFailed
from headrace.events import ShardMapChanged

TENANT = uuid.UUID(int=7)


class Notes:
    """Keeps every event."""

    def __init__(self):
        self.events = []

    def on(self, event):
        self.events.append(event)


async def until(condition):
    """Wait for a condition, within half a minute."""
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def empty(urls):
    """Take everything out of the shards."""
    for url in urls:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")


@pytest.fixture
def quick(database_config, postgres_urls, monkeypatch):
    """Two new shards, and processes that look for a newer map often, and wait for a slow shard's answer."""
    monkeypatch.setattr(map_keeper, "_LOOK_MAX_S", 60.0)
    empty(postgres_urls)
    yield replace(database_config, map_look_s=0.05, fence_wait_s=60.0)
    empty(postgres_urls)


def swapped(shard_map):
    """The next map, in which one slot has moved."""
    other = {"shard-0": "shard-1", "shard-1": "shard-0"}
    return replace(shard_map, epoch=shard_map.epoch + 1, shards=(other[shard_map.shards[0]], *shard_map.shards[1:]))


async def epochs(database):
    """What each shard keeps."""
    return {name: (await read_map(node)).shard_map.epoch for name, node in database.nodes.items()}


async def test_a_newer_map_is_taken_over_by_those_who_run(quick):
    """By the next look, with an event that says how much moved; no process is restarted for it."""
    notes = Notes()
    async with Database(quick) as publisher, Database(quick, observer=notes) as other:
        following = swapped(publisher.shard_map)
        await publisher._keeper.publish(following)
        assert publisher.shard_map == following
        assert await epochs(publisher) == {"shard-0": 2, "shard-1": 2}
        await until(lambda: other.shard_map == following)
    assert [event for event in notes.events if isinstance(event, ShardMapChanged)] == [ShardMapChanged(1, 2, 1)]


async def test_a_newer_map_wins_over_the_configuration(quick):
    """Whoever opens later serves under it, also with other weights: they were the plan of the first map only."""
    async with Database(quick) as publisher:
        following = swapped(publisher.shard_map)
        await publisher._keeper.publish(following)
    first, second = quick.shards
    async with Database(replace(quick, shards=(first, replace(second, weight=3.0)))) as later:
        assert later.shard_map == following


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a, b: {"shards": (a,)}, "does not have shard-1"),
        (lambda a, b: {"slots": 8}, r"makes one of 8 slots"),
        (lambda a, b: {"strategy": "directory", "directory_others": "refuse"}, "0 listed keys"),
    ],
)
async def test_a_configuration_of_another_cluster_is_refused_under_any_epoch(quick, change, said):
    """Shards that hold slots must be there, and the strategy is that of the data."""
    async with Database(quick) as publisher:
        await publisher._keeper.publish(swapped(publisher.shard_map))
    with pytest.raises(ConfigError, match=said):
        await Database(replace(quick, **change(*quick.shards))).__aenter__()


async def test_of_two_changes_at_once_one_is_in_force(quick):
    """The home shard decides; the loser is told so, and both serve under the winner's map."""
    async with Database(quick) as one, Database(quick) as other:
        mine, theirs = swapped(one.shard_map), replace(other.shard_map, epoch=2, shards=("shard-0",) * 4096)
        outcomes = await asyncio.gather(
            one._keeper.publish(mine), other._keeper.publish(theirs), return_exceptions=True
        )
        refused = [outcome for outcome in outcomes if outcome is not None]
        assert [type(error) for error in refused] == [ShardMapOutdated]
        assert one.shard_map == other.shard_map == (theirs if outcomes[0] else mine)
        assert await epochs(one) == {"shard-0": 2, "shard-1": 2}


async def test_who_was_too_late_serves_under_the_map_that_was_first(quick, monkeypatch):
    """Also when a look at its home, the answer of which is from before, is still under way."""
    read, decide, looked, told = map_keeper.read_epoch, map_keeper.decide_map, asyncio.Event(), asyncio.Event()

    async def read_slowly(node):
        found = await read(node)
        if not told.is_set():
            if node is loser.nodes[loser.shard_map.home]:
                looked.set()
            await told.wait()
        return found

    async def decide_and_tell(home, following):
        try:
            await decide(home, following)
        finally:
            told.set()

    config = replace(quick, map_look_s=3600.0)
    async with Database(config) as winner, Database(config) as loser:
        following = swapped(winner.shard_map)
        monkeypatch.setattr(map_keeper, "read_epoch", read_slowly)
        looking = asyncio.ensure_future(loser._keeper.refresh())
        await looked.wait()
        monkeypatch.setattr(map_keeper, "read_epoch", read)
        await winner._keeper.publish(following)
        monkeypatch.setattr(map_keeper, "decide_map", decide_and_tell)
        with pytest.raises(ShardMapOutdated):
            await loser._keeper.publish(swapped(loser.shard_map))
        assert loser.shard_map == following
        await looking


async def test_who_looks_does_not_wait_for_the_looks_of_those_who_come_later(quick, monkeypatch):
    """Also when somebody asks for another one during each of them."""
    read, looks, later = map_keeper.read_epoch, [], []

    async def read_and_ask(node):
        looks.append(node.name)
        later.append(asyncio.ensure_future(opened._keeper.refresh()))
        return await read(node)

    async with Database(replace(quick, map_look_s=3600.0)) as opened:
        monkeypatch.setattr(map_keeper, "read_epoch", read_and_ask)
        async with asyncio.timeout(30):
            await opened._keeper.refresh()
        await until(lambda: len(looks) > 20)  # there is no end of them
        monkeypatch.setattr(map_keeper, "read_epoch", read)
        await asyncio.gather(*later)


async def test_shards_that_keep_different_maps_of_one_epoch_are_refused(quick):
    """Nobody can say which of them is right; a backup that was put back does this."""
    async with Database(replace(quick, map_look_s=3600.0)) as opened:  # it would hand on the first that is changed
        await opened.nodes["shard-1"].execute("UPDATE headrace_shard_map SET epoch = 2, slots[1] = 1 - slots[1]")
        await opened.nodes["shard-0"].execute("UPDATE headrace_shard_map SET epoch = 2")
    with pytest.raises(ConfigError, match="'shard-0' and 'shard-1' keep different maps of epoch 2"):
        await Database(quick).__aenter__()


async def test_a_shard_that_was_not_told_is_told_by_whoever_comes(quick):
    """A map that one shard keeps is in force, and those that lag behind are brought to it."""
    async with Database(replace(quick, map_look_s=3600.0)) as first:
        await first.nodes["shard-0"].execute("UPDATE headrace_shard_map SET epoch = 5")
        async with Database(quick) as second:
            assert second.shard_map.epoch == 5
            assert await epochs(second) == {"shard-0": 5, "shard-1": 5}
        assert first.shard_map.epoch == 1
        assert await first._keeper.overtaken(1, timeout_s=30.0)
        assert first.shard_map.epoch == 5
        assert not await first._keeper.overtaken(5, timeout_s=0.05)


async def test_processes_that_open_at_once_with_different_plans_do_not_mix_them(quick, postgres_urls):
    """Whatever is kept afterwards is one plan on every shard, and only those who had it serve."""
    first, second = quick.shards
    plans = [replace(quick, shards=(first, replace(second, weight=weight))) for weight in (1.0, 2.0, 3.0)]
    plans += [replace(each, shards=tuple(reversed(each.shards))) for each in plans]

    async def opened(config):
        try:
            async with Database(config) as process:
                return process.shard_map
        except ConfigError:
            return None

    maps = [each for each in await asyncio.gather(*map(opened, plans)) if each is not None]
    kept = set()
    for url in postgres_urls:
        with psycopg.connect(url) as connection:
            kept.add(str(connection.execute("SELECT names, slots FROM headrace_shard_map").fetchone()))
    assert maps
    assert len({each.shards for each in maps}) == 1
    assert len(kept) == 1


async def test_a_map_of_a_node_that_lacks_a_shard_fails_for_its_keys_alone(quick):
    """A process that was not told of a new shard cannot reach what moved there; all else goes on."""
    async with Database(quick) as old:
        moved = replace(old.shard_map, epoch=2, shards=("new", *old.shard_map.shards[1:]))
        await old._keeper.publish(moved)
        lost = next(key for key in range(10**6) if old.locate(key).slot == 0)
        with pytest.raises(ConfigError, match="slots on new, which"):
            await old.fetch("SELECT 1", key=lost)
        assert await old.fetch_value("SELECT 1", key=next(key for key in range(9) if old.locate(key).slot)) == 1
        for over_all in (old.fetch_everywhere("SELECT 1"), old.fetch("SELECT 1"), old.explain("SELECT 1")):
            with pytest.raises(ConfigError, match="slots on new, which"):
                await over_all


async def test_a_shard_that_is_to_hold_nothing_is_asked_as_long_as_it_holds_something(quick):
    """Not active in the configuration, but not drained either: its rows are part of every answer."""
    async with Database(quick) as first:
        await first._keeper.publish(swapped(first.shard_map))
    one, two = quick.shards
    async with Database(replace(quick, shards=(one, replace(two, active=False)))) as draining:
        assert len(await draining.fetch_everywhere("SELECT 1")) == 2
        drained = replace(draining.shard_map, epoch=3, shards=("shard-0",) * 4096)
        await draining._keeper.publish(drained)
        assert len(await draining.fetch_everywhere("SELECT 1")) == 1


async def test_a_listed_key_is_found_by_every_process(quick):
    """`assign` is in force when it returns, here, and soon everywhere; it holds across restarts."""
    config = replace(quick, strategy="directory", directory_others="refuse")
    async with Database(config) as one, Database(config) as other:
        with pytest.raises(CallerError, match="does not list the key"):
            one.locate(TENANT)
        assert (await one.assign(TENANT, "shard-1")).shard == "shard-1"
        await until(lambda: other.shard_map.epoch == 2)
        assert other.locate(TENANT).shard == "shard-1"
    async with Database(config) as later:
        assert later.locate(TENANT).shard == "shard-1"
        with pytest.raises(CallerError, match="lives on shard-1, and its rows do not move"):
            await later.assign(TENANT, "shard-0")
        with pytest.raises(CallerError, match="no shard 'nowhere'"):
            await later.assign("x", "nowhere")


@pytest.mark.parametrize("strategy", ["range", "directory"])
async def test_ranges_and_directories_are_kept_too(quick, strategy):
    """A restart finds itself in agreement, and another range or home is refused as another weight is."""
    options = {
        "range": ("ranges", (KeyRange(until=100, shard="shard-1"), KeyRange(shard="shard-0"))),
        "directory": ("directory", (ListedKey(key="acme", shard="shard-1"),)),
    }
    changed = {"range": (KeyRange(until=99, shard="shard-1"), KeyRange(shard="shard-0")), "directory": ()}
    name, value = options[strategy]
    config = replace(quick, strategy=strategy, **{name: value})
    for _ in range(2):
        async with Database(config) as opened:
            assert opened.locate(99 if strategy == "range" else "acme").shard == "shard-1"
    with pytest.raises(ConfigError, match=r"keeps a map of .* the configuration makes one of"):
        await Database(replace(config, **{name: changed[strategy]})).__aenter__()


async def test_a_change_without_its_home_is_not_made(quick):
    """What no shard has decided is in force nowhere."""
    async with Database(quick) as process:
        home = process.nodes[process.shard_map.home]
        await home.execute("ALTER TABLE headrace_shard_map RENAME TO elsewhere")
        with pytest.raises((ShardMapOutdated, StatementFailed, DatabaseUnavailable)):
            await process._keeper.publish(swapped(process.shard_map))
        assert process.shard_map.epoch == 1
        other = next(node for name, node in process.nodes.items() if name != process.shard_map.home)
        assert (await read_map(other)).shard_map.epoch == 1


async def fenced(process, *, slot_of):
    """A table on every shard, whose fence on shard-0 refuses every write, as that of a slot that moved away does."""
    for node in process.nodes.values():
        await node.execute("CREATE TABLE t (k int)")
    for sql in (
        "CREATE FUNCTION fence() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RAISE EXCEPTION 'slot moved' USING ERRCODE = 'SH001'; END $$",
        "CREATE TRIGGER fence BEFORE INSERT ON t FOR EACH ROW EXECUTE FUNCTION fence()",
    ):
        await process.nodes["shard-0"].execute(sql)
    shards = list(process.shard_map.shards)
    shards[slot_of] = "shard-1"
    return replace(process.shard_map, epoch=2, shards=tuple(shards))


@pytest.mark.parametrize("how", ["execute", "fetch"])
async def test_a_write_that_meets_a_fence_waits_for_the_new_home(quick, how):
    """The map that says where comes a moment later; the write is done once, there, and its caller sees no error."""
    config = replace(quick, map_look_s=3600.0)
    async with Database(config) as mover, Database(config) as stale:
        key = next(key for key in range(99) if stale.locate(key).shard == "shard-0")
        moved = await fenced(mover, slot_of=stale.locate(key).slot)
        writing = asyncio.gather(getattr(stale, how)("INSERT INTO t VALUES ($1)", key, key=key))
        await until(lambda: stale._keeper._looks)
        await mover._keeper.publish(moved)
        await writing
        assert stale.locate(key) == ("shard-1", stale.locate(key).slot, 2)
        counts = [(await node.fetch("SELECT count(*) FROM t"))[0][0] for node in stale.nodes.values()]
        assert counts == [0, 1]


@pytest.mark.parametrize("how", ["execute", "fetch", "execute_many"])
async def test_a_write_on_several_shards_that_meets_a_fence_is_planned_anew(quick, how):
    """Undone on all of them, and then each row is written once, where the newer map has it."""
    config = replace(quick, map_look_s=3600.0, tables={"t": Sharded(key="k")})
    async with Database(config) as mover, Database(config) as stale:
        moving = next(key for key in range(99) if stale.locate(key).shard == "shard-0")
        staying = next(key for key in range(99) if stale.locate(key).shard == "shard-1")
        moved = await fenced(mover, slot_of=stale.locate(moving).slot)
        rows = {"execute_many": ("INSERT INTO t VALUES ($1)", [(moving,), (staying,)])}
        both = rows.get(how, ("INSERT INTO t VALUES ($1), ($2)", moving, staying))
        writing = asyncio.gather(getattr(stale, how)(*both, everywhere=True))
        await until(lambda: stale._keeper._looks or writing.done())
        await mover._keeper.publish(moved)
        await writing
        kept = [await node.fetch("SELECT k FROM t ORDER BY k") for node in stale.nodes.values()]
        assert kept == [[], sorted([(moving,), (staying,)])]


async def test_a_map_that_changes_while_a_statement_is_read_is_not_taken_for_its_own(quick):
    """A write that was planned by the older map and meets a fence does not wait for a third one."""
    config = replace(quick, map_look_s=3600.0, tables={"t": Sharded(key="k")}, fence_wait_s=1.0)
    async with Database(config) as mover, Database(config) as stale:
        key = next(key for key in range(99) if stale.locate(key).shard == "shard-0")
        await mover._keeper.publish(await fenced(mover, slot_of=stale.locate(key).slot))
        learn = stale._spread._learn

        async def learn_slowly(sql):
            await learn(sql)
            await stale._keeper.refresh()

        stale._spread._learn = learn_slowly
        assert await stale.execute("INSERT INTO t VALUES ($1)", key) == 1
        assert await stale.fetch("SELECT k FROM t") == [(key,)]


async def test_a_transaction_that_meets_a_fence_succeeds_when_it_is_repeated(quick):
    """It fails whole, with the fence's SQLSTATE, and the next attempt goes to the new home."""
    config = replace(quick, map_look_s=3600.0)
    async with Database(config) as mover, Database(config) as stale:
        key = next(key for key in range(99) if stale.locate(key).shard == "shard-0")
        await mover._keeper.publish(await fenced(mover, slot_of=stale.locate(key).slot))

        async def attempt():
            async with stale.transaction(key=key) as transaction:
                await transaction.execute("INSERT INTO t VALUES ($1)", key)

        with pytest.raises(StatementFailed) as caught:
            await attempt()
        assert caught.value.sqlstate == "SH001"
        await attempt()
        assert await stale.fetch_value("SELECT count(*) FROM t", key=key) == 1


async def test_a_fence_without_a_newer_map_fails_the_write(quick):
    """In bounded time, with what the shard said: the move was given up, or does not come to its end."""
    async with Database(replace(quick, fence_wait_s=0.1)) as process:
        key = next(key for key in range(99) if process.locate(key).shard == "shard-0")
        await fenced(process, slot_of=0)
        with pytest.raises(StatementFailed, match="slot moved"):
            await process.execute("INSERT INTO t VALUES ($1)", key, key=key)
