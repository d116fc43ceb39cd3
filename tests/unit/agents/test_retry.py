"""Waits between attempts, and how many attempts there may be at all."""

import random

from headrace.agents.retry import RetryBudget, RetryBudgets, backoff_s


def test_the_wait_is_anywhere_below_a_limit_that_doubles():
    """Full jitter: nothing is added to it, so retries do not come in waves."""
    assert [backoff_s(n, first_s=1, limit_s=5, rng=lambda: 1.0) for n in (1, 2, 3, 4, 1000)] == [1, 2, 4, 5, 5]
    rng = random.Random(1)
    waits = [backoff_s(3, first_s=1, limit_s=60, rng=rng.random) for _ in range(1000)]
    assert 0 <= min(waits) < 0.1
    assert 3.9 < max(waits) < 4
    assert 1.8 < sum(waits) / 1000 < 2.2


def test_a_general_failure_is_not_multiplied():
    """When everything fails, one in five first attempts is tried again, after what was saved up."""
    budget = RetryBudget(share=0.2, balance_max=10)
    retries = 0
    for _ in range(1000):
        budget.pay_in()
        retries += budget.take()
    assert 200 <= retries <= 210


def test_what_is_saved_is_bounded():
    """A quiet year does not pay for a storm."""
    budget = RetryBudget(share=1.0, balance_max=3)
    for _ in range(100):
        budget.pay_in()
    assert [budget.take() for _ in range(5)] == [True, True, True, False, False]


def test_each_tenant_has_a_budget_of_its_own():
    """What one has used up is not missing to another; of the tenants only the last seen are remembered."""
    budgets = RetryBudgets(balance_max=2, tenants_max=2)
    assert [budgets.take("t") for _ in range(3)] == [True, True, False]
    assert budgets.take("u")
    budgets.pay_in("t")
    assert not budgets.take("t")
    for tenant in ("v", "w"):
        budgets.pay_in(tenant)
    assert len(budgets) == 2
