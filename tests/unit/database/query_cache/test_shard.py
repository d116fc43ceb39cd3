"""How old a result is, and whether it may answer: by the server's clock, own writes and the stream."""

import pytest
from msgspec import UNSET

from headrace.database import QueryPolicy
from headrace.database.query_cache.key import Context
from headrace.database.query_cache.shard import CLOCK_MAX_S, WRITTEN_MAX, ShardView
from headrace.database.query_cache.stored import State, Stored
from headrace.errors import ConfigError

CONTEXT = Context("d", "r", ())
POLICY = QueryPolicy(staleness_max=1.0, ttl=60.0)


class Stream:
    """Stands for one whose last heartbeat was sent then."""

    def __init__(self, fresh_at):
        self.fresh_at = fresh_at


def state(read_at, lineage="1/1"):
    return State("100:100:", read_at, lineage, has_temporary=False, context=CONTEXT)


def stored(read_at, **fields):
    given = {
        "shard": "s", "lineage": "1/1", "snapshot": "100:100:", "read_at": read_at, "cost_s": 0.1, "life_s": 30.0,
        "tables": (7,), "names": ("items",), "columns": ("a",), "types": (25,), "cells": [[b"x"]],
        "size": 1,
    } | fields  # fmt: skip
    return Stored(**given)


@pytest.fixture
def view():
    """A shard whose clock showed 1000 when ours showed 0."""
    view = ShardView("s")
    view.learn(state(1000.0), 0.0)
    return view


def test_a_young_result_answers_and_an_old_one_does_not(view):
    """Within the bound nothing else has to be known; beyond it, without a stream, nothing helps."""
    assert view.is_usable(stored(1000.0), POLICY, 0.9)
    assert not view.is_usable(stored(1000.0), POLICY, 1.1)


def test_the_age_counts_from_the_beginning_of_the_read_by_the_servers_clock(view):
    """A result of another machine is judged by the same clock."""
    assert view.is_usable(stored(1005.0), POLICY, 5.5)
    assert not view.is_usable(stored(1003.0), POLICY, 5.5)


def test_an_old_result_needs_a_fresh_stream_that_vouches_for_it(view):
    """Both: a heartbeat within the bound, and no change that it lacks."""
    view.ledger.begin(lineage="1/1", base=50, since=0.0, published=None)
    view.stream = Stream(fresh_at=9.5)
    assert view.is_usable(stored(1000.0), POLICY, 10.0)
    assert not view.is_usable(stored(1000.0), POLICY, 10.6)
    view.stream = Stream(fresh_at=10.5)
    assert view.is_usable(stored(1000.0), POLICY, 10.6)
    view.ledger.note(101, [7])
    assert not view.is_usable(stored(1000.0), POLICY, 10.6)
    assert not view.is_usable(stored(1010.0), POLICY, 10.6)
    assert view.is_usable(stored(1010.0, tables=(8,)), POLICY, 10.6)


def test_ttl_ends_what_the_stream_would_vouch_for(view):
    """Given: as given. Not given: what its cost makes worthwhile."""
    view.ledger.begin(lineage="1/1", base=50, since=0.0, published=None)
    view.stream = Stream(fresh_at=40.0)

    assert view.is_usable(stored(1000.0), QueryPolicy(staleness_max=1.0, ttl=50.0), 40.0)
    assert not view.is_usable(stored(1000.0), QueryPolicy(staleness_max=1.0, ttl=39.0), 40.0)
    assert not view.is_usable(stored(1000.0), QueryPolicy(staleness_max=1.0, ttl=UNSET), 40.0)
    assert view.is_usable(stored(1000.0, life_s=41.0), QueryPolicy(staleness_max=1.0, ttl=UNSET), 40.0)


def test_own_writes_end_what_was_read_before_them(view):
    """By table; what was begun after the commit has seen it."""
    view.wrote({"items"}, 0.5)

    assert not view.is_usable(stored(1000.4), POLICY, 0.6)
    assert view.is_usable(stored(1000.4, names=("others",)), POLICY, 0.6)
    assert view.is_usable(stored(1000.51), POLICY, 0.6)
    view.wrote(None, 0.7)
    assert not view.is_usable(stored(1000.6, names=("others",)), POLICY, 0.8)


def test_own_writes_before_the_servers_clock_is_known_are_not_forgotten():
    """They are dated as soon as it is: what was read before that moment is not used."""
    view = ShardView("s")
    view.wrote({"items"}, 0.0)
    view.learn(state(1000.0), 0.1)

    assert not view.is_usable(stored(999.9), POLICY, 0.1)
    assert view.is_usable(stored(999.9, names=("others",)), POLICY, 0.1)
    assert view.is_usable(stored(1000.1), POLICY, 0.2)


def test_an_answer_that_was_asked_for_before_an_own_write_does_not_date_it_too_early(view):
    """Its time is that of before the commit: what was begun between the two lacks the write, on a new server too."""
    new = ShardView("s")
    new.wrote({"items"}, 0.5)
    new.learn(state(1000.0), 0.0)
    view.wrote({"items"}, 1.5)
    view.learn(state(2000.0, "1/2"), 1.0)

    assert not new.is_usable(stored(1000.4), POLICY, 0.6)
    assert new.is_usable(stored(1000.51), POLICY, 0.6)
    assert not view.is_usable(stored(2000.4, lineage="1/2"), POLICY, 1.6)
    assert view.is_usable(stored(2000.51, lineage="1/2"), POLICY, 1.6)


def test_too_many_written_tables_count_as_all(view):
    """Memory is bounded, and the bound errs on the safe side."""
    view.wrote({f"t{number}" for number in range(WRITTEN_MAX + 1)}, 0.5)

    assert not view.is_usable(stored(1000.4, names=("others",)), POLICY, 0.6)


def test_without_a_recent_word_of_the_server_no_age_is_known(view):
    """Clocks drift: after a minute of silence nothing is used."""
    long = QueryPolicy(staleness_max=1000.0, ttl=1000.0)

    assert view.is_usable(stored(1000.0), long, CLOCK_MAX_S - 0.1)
    assert not view.is_usable(stored(1000.0), long, CLOCK_MAX_S + 0.1)


def test_another_server_or_timeline_ends_everything(view):
    """After a failover nothing from before is used, and own writes are dated anew."""
    view.learn(state(900.0, "1/2"), 1.0)

    assert not view.is_usable(stored(1000.0), POLICY, 1.0)
    assert not view.is_usable(stored(899.9, lineage="1/2"), POLICY, 1.0)
    assert view.is_usable(stored(900.1, lineage="1/2"), POLICY, 1.2)


def test_what_is_for_those_who_wait_is_for_nobody_else(view):
    """A result that must not be kept answers no second call."""
    assert not view.is_usable(stored(1000.0, kept=False), POLICY, 0.1)


@pytest.mark.parametrize(
    "options", [{"staleness_max": -1}, {"ttl": -0.1}, {"staleness_max": float("nan")}, {"ttl": float("inf")}]
)
def test_a_policy_that_means_nothing_is_refused(options):
    """When it is made, with its name and value."""
    with pytest.raises(ConfigError, match="QueryPolicy"):
        QueryPolicy(**options)


def test_a_verdict_is_that_of_one_view():
    """A result in memory is judged by every database that finds it, each with what its own stream has told."""
    told, shared = [], stored(1000.5)
    for xids in ([], [99, 101]):
        view = ShardView("s")
        view.learn(state(1000.0), 0.0)
        view.ledger.begin(lineage="1/1", base=50, since=0.0, published=None)
        view.stream = Stream(fresh_at=9.9)
        for xid in xids:
            view.ledger.note(xid, [7])
        view.ledger.version += 2 - len(xids)  # as if as much had happened to both
        told.append(view.is_usable(shared, POLICY, 10.0))

    assert told == [True, False]


def test_a_clock_that_is_set_back_makes_nothing_young(view):
    """Neither what was read before it, nor what the server itself dates later than now."""
    view.probe(1050.0, 50.0)
    view.probe(1030.0, 50.1)

    assert not view.is_usable(stored(1049.5), POLICY, 50.2)
    assert not view.is_usable(stored(1029.9), POLICY, 50.2)


def test_a_late_answer_of_the_old_server_brings_nothing_back(view):
    """It was sent before another had told of the failover."""
    view.learn(state(900.0, "1/2"), 1.0)
    view.learn(state(1000.9, "1/1"), 0.9)

    assert not view.is_usable(stored(1000.5), POLICY, 1.0)
    assert view.is_usable(stored(900.1, lineage="1/2"), POLICY, 1.2)


def test_a_stream_that_found_the_new_server_tells_of_the_failover(view):
    """Its clock is not that of the results from before, so that their ages would mean nothing."""
    view.ledger.begin(lineage="1/2", base=50, since=0.0, published=None)
    view.beat(999.5, 1.0)

    assert not view.is_usable(stored(1000.5), POLICY, 1.1)
