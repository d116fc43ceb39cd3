"""When a failed execution is tried again. Pure: randomness comes in by the door.

Sources: M. Brooker, Exponential backoff and jitter, AWS Architecture Blog, 2015; Finagle's RetryBudget.
"""

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
