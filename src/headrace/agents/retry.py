"""When a failed execution is tried again. Pure: randomness comes in by the door.

Sources: M. Brooker, Exponential backoff and jitter, AWS Architecture Blog, 2015; Finagle's RetryBudget.
"""

from collections import OrderedDict
from collections.abc import Callable


def backoff_s(attempt: int, *, first_s: float, limit_s: float, rng: Callable[[], float]) -> float:
    """The wait after the given attempt, the first being 1: uniform between 0 and a limit that doubles ("full jitter").

    Waits that are only spread around the doubled value come back in waves; these do not.
    """
    ceiling: float = min(limit_s, first_s * 2.0 ** min(attempt - 1, 60))
    return ceiling * rng()


class RetryBudget:
    """Lets at most a share of all executions be repetitions, so that a general failure is not multiplied.

    Each first attempt pays in `share`, each retry takes 1. A few are allowed from the start, and what was saved in
    quiet times is bounded.
    """

    __slots__ = ("_balance", "_balance_max", "_share")

    def __init__(self, *, share: float = 0.2, balance_max: float = 100.0) -> None:
        self._share = share
        self._balance_max = balance_max
        self._balance = balance_max

    def pay_in(self) -> None:
        """A first attempt was made."""
        self._balance = min(self._balance_max, self._balance + self._share)

    def take(self) -> bool:
        """Whether a retry may be made; if so it is counted."""
        if self._balance < 1:
            return False
        self._balance -= 1
        return True


class RetryBudgets:
    """A budget for each tenant: nobody's failures use up what others may repeat. The last seen are remembered."""

    def __init__(self, *, share: float = 0.2, balance_max: float = 100.0, tenants_max: int = 10_000) -> None:
        self._share = share
        self._balance_max = balance_max
        self._tenants_max = tenants_max
        self._budgets: OrderedDict[str, RetryBudget] = OrderedDict()

    def __len__(self) -> int:
        """How many tenants are remembered."""
        return len(self._budgets)

    def pay_in(self, tenant: str) -> None:
        """A first attempt was made."""
        self._of(tenant).pay_in()

    def take(self, tenant: str) -> bool:
        """Whether a retry may be made; if so it is counted."""
        return self._of(tenant).take()

    def _of(self, tenant: str) -> RetryBudget:
        budget = self._budgets.get(tenant)
        if budget is None:
            budget = self._budgets[tenant] = RetryBudget(share=self._share, balance_max=self._balance_max)
            if len(self._budgets) > self._tenants_max:
                self._budgets.popitem(last=False)
        self._budgets.move_to_end(tenant)
        return budget
