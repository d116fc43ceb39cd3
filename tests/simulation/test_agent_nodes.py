"""Several nodes on one queue, through outages in every order that a seed can think of.

python -m benchmarks.scenario.agent_nodes --count 10000   the long form
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from unittest.mock import patch

import psycopg
import pytest

from headrace.agents.acceptance import Acceptance
from headrace.agents.nodes import Membership
from headrace.agents.running.runs import Runs
from headrace.embedded import EmbeddedPostgres, started
from headrace.errors import BackendError
from tests.simulation.fronted_nodes import PROMISED_MIN, FrontedLife
from tests.simulation.node_failures import Life, Outcome, report
from tests.simulation.simulated_postgres import SimulatedPostgres
from tests.simulation.timed_postgres import TimedPostgres

COUNT = 80
COUNT_ON_POSTGRES = 5
COUNT_IN_REAL_TIME = 1
BROKEN_FOUND_WITHIN = 60


@pytest.fixture(scope="module")
def postgres(tmp_path_factory) -> Iterator[str]:
    """A Postgres for all tests here."""
    with started(EmbeddedPostgres(tmp_path_factory.mktemp("postgres"), name="shard-0")) as server:
        yield server.url


def test_whatever_fails_every_execution_keeps_its_promises():
    """Through lost and late statements, cuts, freezes, deaths and outages: see `history` for what is promised."""
    ends, faults = Counter[str](), Counter[str]()
    for seed in range(COUNT):
        outcome = Life(seed).run()
        assert not outcome.violations, report(seed, outcome)
        ends += outcome.ends
        faults += outcome.faults
    assert min(ends[status] for status in ("completed", "cancelled", "failed", "timeout", "interrupted")) > 0
    assert min(faults[fault] for fault in ("held", "lost", "late", "cut", "freeze", "kill", "close", "go_down")) > 0


def test_without_failures_everything_ends_by_itself():
    """Nobody is interrupted, and nothing is tried again but what raised or ran too long."""
    for seed in range(COUNT // 16):
        outcome = Life(seed, faults=False).run()
        assert not outcome.violations, report(seed, outcome)
        assert outcome.ends["completed"] > 0
        assert outcome.ends["interrupted"] == 0


def test_the_statements_do_what_their_model_does(postgres):
    """On a real Postgres in simulated time: the promises hold, and each statement answers what the model does."""
    with psycopg.connect(postgres, autocommit=True) as connection:
        for seed in range(COUNT_ON_POSTGRES):
            life = Life(seed, shard_of=partial(TimedPostgres, connection))
            outcome = life.run()
            assert not outcome.violations, report(seed, outcome)
            assert life.shard.compare_rows() == []


@pytest.mark.parametrize("seed", range(COUNT_IN_REAL_TIME))
async def test_real_nodes_keep_their_promises_on_a_failing_postgres(postgres, seed):
    """With calls that fail before and after their effect, nodes that are cut off, and connections that are ended."""
    rows, violations = await FrontedLife(seed, postgres).run()
    assert not violations, (seed, violations)
    assert len(rows) > PROMISED_MIN


# -- what would be wrong ----------------------------------------------------------------------------------------------


def begin_by_owner_and_attempt(shard, row, asked):
    if row.status == "queued":
        return row.attempt == asked["attempt"] - 1 and shard.is_leased(row.owner)
    return row.attempt == asked["attempt"]


def begin_without_lease(shard, row, asked):
    if row.status == "queued":
        return row.attempt == asked["attempt"] - 1
    return row.attempt == asked["attempt"] and row.started_at == asked["started_at"]


def finish_whoever_asks(shard, records, writer, finish=SimulatedPostgres._finish):
    asked = json.loads(records)
    for each in asked:
        row = shard.executions.get((each["tenant"], each["execution_id"]))
        if row is not None:
            each["owner"], each["attempt"] = row.owner, row.attempt
    return finish(shard, json.dumps(asked), writer)


def retry_what_is_cancelled(shard, tenant, execution_id, *rest, retry=SimulatedPostgres._retry):
    shard.executions[tenant, execution_id].cancel_at = None
    return retry(shard, tenant, execution_id, *rest)


async def give_back_once(acceptance, submission, *, delay_s):
    with suppress(BackendError):
        await acceptance._store.give_back(submission, delay_s=delay_s)


async def disown_nothing(*_):
    return


def known_while_it_is_waited_for(runs):
    return list(runs._runs)


BROKEN = {
    "begins-by-owner-and-attempt": ([(SimulatedPostgres, "_may_begin", begin_by_owner_and_attempt)], 31),
    "takes-without-a-lease": (
        [(SimulatedPostgres, "_may_take", lambda *_: True), (SimulatedPostgres, "_may_begin", begin_without_lease)],
        17,
    ),
    "retries-what-is-cancelled": ([(SimulatedPostgres, "_retry", retry_what_is_cancelled)], 18),
    "finishes-for-whoever-asks": ([(SimulatedPostgres, "_finish", finish_whoever_asks)], 63),
    "gives-back-once": ([(Acceptance, "_give_back", give_back_once)], 77),
    "doubts-nothing": ([(Membership, "doubt", lambda *_: None)], 9),
    "disowns-nothing": ([(Membership, "_disown_unknown", disown_nothing)], 9),
    "forgets-what-it-left-behind": ([(Runs, "known", known_while_it_is_waited_for)], 213),
}
"""Each with the first seed that finds it."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_defence_is_found(name):
    """The simulation is able to fail: each defence is needed in one of a few lives."""
    defences, first = BROKEN[name]
    with ExitStack() as stack:
        for owner, method, broken in defences:
            stack.enter_context(patch.object(owner, method, broken))
        assert any(Life(seed).run().violations for seed in range(first, first + BROKEN_FOUND_WITHIN))


def test_a_seed_is_a_whole_life():
    """The same seed gives the same events in the same order, so that a failure can be looked at again."""
    seed = random.Random(3).randrange(1000)
    lives: list[Outcome] = [Life(seed).run() for _ in range(2)]
    assert lives[0] == lives[1]
