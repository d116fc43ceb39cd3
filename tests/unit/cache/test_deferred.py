"""What is owed to the shared tier: what a delivery pays, and what it may not."""

import asyncio
from contextlib import nullcontext

import pytest

from headrace.cache.deferred import ALL, ARRIVAL_WAIT_MAX_S, Deferred, OnWay
from headrace.errors import CacheUnavailable


def owing(kind: str) -> Deferred:
    deferred = Deferred(10)
    deferred.add((kind, "*" if kind == "all" else "k"))
    return deferred


def pay(deferred: Deferred, kind: str, as_of: int) -> None:
    match kind:
        case "key":
            deferred.pay_keys(["k"], as_of=as_of)
        case "tag":
            deferred.pay_tags(["k"], as_of=as_of)
        case "pattern":
            deferred.pay_pattern("k", as_of=as_of)
        case _:
            deferred.pay_everything(as_of=as_of)


KINDS = ["key", "tag", "pattern", "all"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_delivery_pays_what_was_owed_when_it_began(kind):
    """What was invalidated again while a delivery was on its way is still owed after it."""
    deferred = owing(kind)
    began = deferred.latest
    deferred.add((kind, "*" if kind == "all" else "k"))
    pay(deferred, kind, began)
    assert deferred.is_owed
    pay(deferred, kind, deferred.latest)
    assert not deferred.is_owed


@pytest.mark.parametrize("kind", KINDS)
def test_a_delivered_clear_pays_what_was_owed_before_it_alone(kind):
    """A key, tag, pattern or clear that came while a clear was on its way is owed after it."""
    deferred = owing("all")
    began = deferred.latest
    deferred.add((kind, "*" if kind == "all" else "k"))
    deferred.pay_everything(as_of=began)
    assert deferred.debts() == {(kind, "*" if kind == "all" else "k")}


@pytest.mark.parametrize("kind", ["key", "tag", "pattern"])
def test_too_many_become_a_clear(kind):
    """What is kept is bounded; beyond the bound one clear stands for all of it."""
    deferred = Deferred(10)
    for number in range(65):
        deferred.add((kind, f"k{number}"))
    assert deferred.everything
    assert deferred.covers("anything")
    assert len(deferred.debts()) <= 65


def test_changes_are_told_once():
    """Each call tells what came to be owed or was paid since the one before."""
    deferred = owing("key")
    assert deferred.changes() == {("key", "k"): True}
    assert deferred.changes() == {}
    deferred.add(("tag", "t"))
    deferred.add(("key", "passing"))
    deferred.pay_keys(["passing", "k"], as_of=deferred.latest)
    assert deferred.changes() == {("tag", "t"): True, ("key", "passing"): False, ("key", "k"): False}
    deferred.add_everything()
    assert deferred.changes() == {("tag", "t"): False, ("all", "*"): True}
    deferred.note([("key", "k")])
    assert deferred.changes() == {("key", "k"): False}


def test_what_keeps_a_key_from_being_believed_is_named():
    """Of what is owed only the patterns that match a key, and a clear, have to arrive before it is believed."""
    deferred = Deferred(10)
    for kind, name in (("key", "k1"), ("tag", "k1"), ("pattern", "k*"), ("pattern", "?1"), ("pattern", "other*")):
        deferred.add((kind, name))
    assert deferred.covering("k1") == ["k*", "?1"]
    assert deferred.covering("free") == []
    deferred.add_everything()
    deferred.add_pattern("f*")
    assert deferred.covering("k1") == [ALL]
    assert deferred.covering("free") == ["f*", ALL]


async def test_only_what_is_named_is_waited_for():
    """Who needs one pattern to have arrived is not held up by the long walk of another."""
    on_way = OnWay(lambda: None)
    with on_way.delivery("slow*"):
        await on_way.landed(["k*", ALL])
        assert on_way.brings("slow*")
    assert not on_way.brings("slow*")


@pytest.mark.parametrize("end", [nullcontext(), pytest.raises(CacheUnavailable)], ids=["arrives", "fails"])
async def test_a_wait_ends_when_the_delivery_does(end):
    """All that are named are waited for, and none beyond its end, whether it arrived or failed."""
    on_way = OnWay(lambda: None)
    with on_way.delivery(ALL):
        with end, on_way.delivery("k*"):
            waiting = asyncio.ensure_future(on_way.landed(["k*", ALL]))
            await asyncio.sleep(0)
            if not isinstance(end, nullcontext):
                raise CacheUnavailable("the delivery failed")
        await asyncio.sleep(0)
        assert not waiting.done()
    await waiting


async def test_the_wait_is_bounded_for_all_who_wait_together(monkeypatch: pytest.MonkeyPatch):
    """It counts from when the delivery began: of those who ask one after the other only the first may wait long."""
    loop = asyncio.get_running_loop()
    on_way = OnWay(lambda: None)
    with on_way.delivery("k*"), monkeypatch.context() as patch:
        late = loop.time() + ARRIVAL_WAIT_MAX_S
        patch.setattr(loop, "time", lambda: late)  # a clock that stands still: no wait of any length ends
        waiting = asyncio.ensure_future(on_way.landed(["k*"]))
        for _ in range(10):
            await asyncio.sleep(0)
        assert waiting.done()
        with pytest.raises(CacheUnavailable, match="'k\\*' is on its way for longer than 30 s"):
            await waiting


@pytest.mark.parametrize(("error", "told"), [(asyncio.CancelledError, 1), (CacheUnavailable, 0)])
async def test_a_delivery_that_its_caller_gives_up_is_told_of(error, told):
    """One that was cancelled can be made again at once; one that failed would only fail again."""
    given_up: list[str] = []
    on_way = OnWay(lambda: given_up.append("k*"))
    with pytest.raises(error), on_way.delivery("k*"):
        raise error("ended")
    assert given_up == ["k*"] * told
    assert not on_way.brings("k*")
