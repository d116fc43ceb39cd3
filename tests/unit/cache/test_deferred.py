"""What is owed to the shared tier: what a delivery pays, and what it may not."""

import pytest

from headrace.cache.deferred import Deferred


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
