"""Limits by tenant: rate, quota, concurrency and queue, alone and over several nodes."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.agents import AgentsConfig, TenantConfig, TierConfig
from headrace.agents.admission import Admission, Ledger, gcra
from headrace.agents.config import TIERS
from headrace.errors import ConfigError

MIDNIGHT = 86_400.0 * 20_000


def admission(queued_max=1000, **tier):
    limits = TierConfig(name="small", **{"executions_max": 4, **tier})
    return Admission(lambda tenant: limits if tenant == "t" else None, queued_max=queued_max)


def admit(accounts, tenant="t", *, at=0.0, wall=MIDNIGHT, queued=False):
    refusal = accounts.admit(tenant, monotonic=at, wall=wall, queued=queued)
    return None if refusal is None else (refusal.reason, round(refusal.retry_after_s, 6))


def test_a_tenant_without_a_tier_has_no_limit_of_its_own():
    """Only the process limits it."""
    accounts = admission(executions_max=1)
    assert [admit(accounts, "free") for _ in range(500)] == [None] * 500
    assert [accounts.begin("free") for _ in range(500)] == [None] * 500


def test_after_a_burst_the_rate_holds_and_says_when_to_come_back():
    """Two a second after three at once."""
    accounts = admission(rate_per_s=2, burst=3)
    assert [admit(accounts) for _ in range(4)] == [None, None, None, ("rate", 0.5)]
    assert admit(accounts, at=0.4) == ("rate", 0.1)
    assert admit(accounts, at=0.5) is None
    assert admit(accounts, at=0.5) == ("rate", 0.5)


def test_a_refused_request_costs_nothing():
    """Whoever asks too often is not kept out longer for it."""
    accounts = admission(rate_per_s=1, burst=1)
    assert admit(accounts) is None
    for _ in range(50):
        assert admit(accounts, at=0.5) == ("rate", 0.5)
    assert admit(accounts, at=1.0) is None


@given(
    gaps=st.lists(st.floats(0, 3), min_size=1, max_size=200),
    rate=st.floats(0.5, 50),
    burst=st.integers(1, 20),
)
def test_no_window_holds_more_than_its_share(gaps, rate, burst):
    """In any span of time at most burst + rate x span requests are taken, and a wait that was told is enough."""
    now, full_at, taken = 0.0, 0.0, []
    for gap in gaps:
        now += gap
        following, wait = gcra(full_at, now, rate_per_s=rate, burst=burst)
        if wait > 0:
            _, later = gcra(full_at, now + wait, rate_per_s=rate, burst=burst)
            assert later == pytest.approx(0, abs=1e-6)
        else:
            taken.append(now)
            full_at = following
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + rate * (taken[last] - taken[first]) + 1e-6


def test_concurrency_is_given_back():
    """The fifth waits until one of four has ended."""
    accounts = admission()
    assert [accounts.begin("t") for _ in range(4)] == [None] * 4
    refusal = accounts.begin("t")
    assert (refusal.reason, refusal.retry_after_s) == ("concurrency", 1.0)
    accounts.end("t")
    assert accounts.begin("t") is None


def test_nodes_share_a_limit():
    """Each enforces its part, at least one; a node that dies leaves its part to the others."""
    accounts = admission(executions_max=10)
    for nodes, share in [(1, 10), (3, 3), (10, 1), (40, 1)]:
        accounts.learn(nodes, {}, asked=["t"], wall=MIDNIGHT)
        assert accounts.share("t") == share
        assert share * nodes <= max(10, nodes)


def test_places_left_are_told_for_those_with_a_limit():
    """What the queue may give a tenant."""
    accounts = admission()
    accounts.begin("t")
    accounts.begin("free")
    assert accounts.free() == {"t": 3}


def test_the_quota_counts_what_all_nodes_recorded_and_what_is_under_way():
    """Nothing is counted twice when the ledger comes back, and what was not recorded yet is not forgotten."""
    accounts = admission(executions_per_day=10)
    noon = MIDNIGHT + 43_200
    for _ in range(3):
        assert admit(accounts, wall=noon) is None
        accounts.begin("t")
    accounts.learn(1, {"t": Ledger(used_today=5)}, asked=["t"], wall=noon)
    assert [admit(accounts, wall=noon) for _ in range(3)] == [None, None, ("quota", 43_200.0)]
    for _ in range(3):
        accounts.end("t")
    accounts.learn(1, {"t": Ledger(used_today=9)}, asked=["t"], wall=noon)
    assert [admit(accounts, wall=noon) for _ in range(2)] == [None, ("quota", 43_200.0)]


def test_a_new_day_begins_at_midnight_utc():
    """Without waiting for the next ledger."""
    accounts = admission(executions_per_day=1)
    assert admit(accounts, wall=MIDNIGHT - 10) is None
    assert admit(accounts, wall=MIDNIGHT - 10) == ("quota", 10.0)
    assert admit(accounts, wall=MIDNIGHT + 1) is None


def test_a_queue_is_bounded_for_each_tenant():
    """By the smaller of the tier's bound and the process's; those who do not queue are not concerned."""
    accounts = admission(queued_max=5, executions_max=1)
    assert [admit(accounts, "free", queued=True) for _ in range(6)] == [None] * 5 + [("queue", 1.0)]
    accounts.learn(1, {"free": Ledger(queued=4)}, asked=["free"], wall=MIDNIGHT)
    assert [admit(accounts, "free", queued=True) for _ in range(2)] == [None, ("queue", 1.0)]
    assert admit(accounts, "free") is None


def test_a_tier_caps_the_priority():
    """A more urgent one counts as the most urgent that it may have."""
    accounts = admission(priority_max="normal")
    assert [accounts.capped("t", each) for each in ("low", "normal", "high")] == ["low", "normal", "normal"]
    assert accounts.capped("free", "high") == "high"


def test_tenants_that_do_nothing_are_forgotten():
    """Memory holds those that were heard of lately."""
    accounts = admission()
    for n in range(100):
        admit(accounts, f"once {n}")
    accounts.begin("busy")
    for _ in range(2):
        accounts.learn(1, {}, asked=accounts.tenants(), wall=MIDNIGHT)
    assert accounts.tenants() == ["busy"]


@pytest.mark.parametrize("seed", range(20))
def test_three_nodes_never_run_more_than_the_limit(seed):
    """Seeded: executions begin and end on three nodes in any order, ledgers come whenever they come."""
    rng = random.Random(seed)
    nodes = [admission(executions_max=9) for _ in range(3)]
    for node in nodes:
        node.learn(3, {}, asked=[], wall=MIDNIGHT)
    running, most = [0, 0, 0], 0
    for _ in range(3000):
        index = rng.randrange(3)
        if rng.random() < 0.55:
            running[index] += nodes[index].begin("t") is None
        elif running[index]:
            nodes[index].end("t")
            running[index] -= 1
        else:
            nodes[index].learn(3, {}, asked=["t"], wall=MIDNIGHT)
        most = max(most, sum(running))
    assert most == 9


def test_the_tiers_are_those_that_the_platform_promises():
    """Concurrency and daily quota by tier."""
    promised = {tier.name: (tier.executions_max, tier.executions_per_day) for tier in TIERS}
    assert promised == {
        "developer": (10, 1_000),
        "professional": (100, 10_000),
        "enterprise": (500, 50_000),
        "enterprise plus": (1_000, None),
    }


def test_a_tenant_needs_a_tier_that_exists():
    """A misspelt tier is found when the configuration is read."""
    with pytest.raises(ConfigError, match="no tier 'gold'"):
        AgentsConfig(tenants=(TenantConfig(name="t", tier="gold"),))
    with pytest.raises(ConfigError, match="executions_max"):
        TierConfig(name="none", executions_max=0)
