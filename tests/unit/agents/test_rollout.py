"""Judging a canary: a bad one is refused soon, an equal one hardly ever, and the choice of executions is stable."""

import random

import pytest

from headrace.agents.rollout import (
    RolloutPolicy,
    Tally,
    bucket_of,
    is_chosen,
    judge,
    lower_bound,
    upper_bound,
)

POLICY = RolloutPolicy()


def tally(runs, failures=0, run_ms=10.0):
    found = Tally()
    for n in range(runs):
        found.count(failed=n < failures, run_ms=run_ms)
    return found


def rollout(rng, *, runs, share, canary_fails, stable_fails, canary_ms=10.0, stable_ms=10.0):
    """Runs arrive, each version has its rates, and the canary is judged after each of its own; when it is refused."""
    canary, stable = Tally(), Tally()
    for _ in range(runs):
        if rng.random() < share:
            canary.count(failed=rng.random() < canary_fails, run_ms=rng.lognormvariate(0, 0.4) * canary_ms)
            if judge(canary, stable, POLICY).decision == "abort":
                return canary.runs
        else:
            stable.count(failed=rng.random() < stable_fails, run_ms=rng.lognormvariate(0, 0.4) * stable_ms)
    return None


def test_a_few_runs_prove_nothing():
    """However bad they look."""
    assert judge(tally(19, failures=19), tally(1000), POLICY).decision == "wait"


def test_a_canary_that_surely_fails_more_is_refused_with_its_counts():
    """The reason is for people."""
    verdict = judge(tally(20, failures=20), tally(1000, failures=10), POLICY)
    assert (verdict.decision, verdict.reason) == ("abort", "20 of its 20 runs failed, 10 of 1000 of the others.")


def test_without_runs_of_the_stable_version_only_failing_mostly_counts():
    """An agent that nobody else called has nothing to be compared with."""
    assert judge(tally(40, failures=10), Tally(), POLICY).decision == "wait"
    assert judge(tally(40, failures=39), Tally(), POLICY).decision == "abort"


def test_a_canary_that_is_surely_slower_is_refused():
    """By the share of its runs beyond one and a half times the stable version's 95th percentile."""
    verdict = judge(tally(50, run_ms=40.0), tally(500, run_ms=10.0), POLICY)
    assert verdict.decision == "abort"
    assert "took over" in verdict.reason
    assert judge(tally(50, run_ms=12.0), tally(500, run_ms=10.0), POLICY).decision == "wait"


@pytest.mark.parametrize("fails", [0.0, 0.01, 0.1, 0.4])
def test_an_equal_canary_is_hardly_ever_refused(fails):
    """Judged after each of 400 runs, at most 1 of 60 seeded rollouts of an equal version ends."""
    refused = sum(
        rollout(random.Random(seed), runs=2000, share=0.2, canary_fails=fails, stable_fails=fails) is not None
        for seed in range(60)
    )
    assert refused <= 1


@pytest.mark.parametrize(("fails", "within"), [(1.0, 20), (0.5, 60), (0.3, 120)])
def test_a_bad_canary_ends_soon(fails, within):
    """Every one of 50 seeded rollouts beside a version that fails 1 % of its runs."""
    ends = [
        rollout(random.Random(seed), runs=4000, share=0.2, canary_fails=fails, stable_fails=0.01) for seed in range(50)
    ]
    assert None not in ends
    assert sorted(ends)[45] <= within


def test_a_slow_canary_ends_soon():
    """Three times as slow, with run times that scatter."""
    ends = [
        rollout(
            random.Random(seed),
            runs=3000,
            share=0.2,
            canary_fails=0.0,
            stable_fails=0.0,
            canary_ms=60.0,
            stable_ms=20.0,
        )
        for seed in range(30)
    ]
    assert None not in ends


def test_bounds_enclose_the_rate_and_close_in():
    """Wilson's interval: never outside of 0 to 1, narrower with more runs, sensible at the ends."""
    assert lower_bound(0, 10) == 0.0
    assert upper_bound(10, 10) == 1.0
    assert (lower_bound(0, 0), upper_bound(0, 0)) == (0.0, 1.0)
    for hits, of in [(1, 10), (5, 10), (9, 10)]:
        wide = upper_bound(hits, of) - lower_bound(hits, of)
        narrow = upper_bound(hits * 100, of * 100) - lower_bound(hits * 100, of * 100)
        assert lower_bound(hits, of) < hits / of < upper_bound(hits, of)
        assert narrow < wide / 5


def test_the_share_of_the_canary_is_its_share():
    """Of 20,000 ids of any shape, and other ids for another canary."""
    ids = [f"e{n}" for n in range(20_000)]
    first = {id for id in ids if is_chosen(id, "2.0.0", 0.1)}
    second = {id for id in ids if is_chosen(id, "2.1.0", 0.1)}
    assert 0.09 < len(first) / len(ids) < 0.11
    assert len(first & second) < 0.3 * len(first)
    assert all(is_chosen(id, "2.0.0", 0.1) for id in first)


def test_a_larger_share_keeps_those_that_were_chosen():
    """Raising the share moves nobody back."""
    ids = [str(n) for n in range(2_000)]
    assert {id for id in ids if is_chosen(id, "2", 0.1)} <= {id for id in ids if is_chosen(id, "2", 0.5)}


@pytest.mark.parametrize("run_ms", [0.0, 0.0001, 0.5, 1.0, 99.0, 30_000.0, 1e9])
def test_run_times_fall_into_buckets_by_their_size(run_ms):
    """A third of an octave each; the last takes the rest."""
    bucket = bucket_of(run_ms)
    assert bucket in range(96)
    if 0.001 < run_ms < 1e6:
        assert 2 ** ((bucket - 1) / 3) / 1024 < run_ms <= 2 ** (bucket / 3) / 1024 * 1.0001


def test_tallies_add_up():
    """Counts of several processes are one."""
    both = tally(3, failures=1).plus(tally(2, run_ms=500.0))
    assert (both.runs, both.failures, sum(both.times)) == (5, 1, 5)
