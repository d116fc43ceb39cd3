"""How long a request may take, without a timer for each.

All requests of an endpoint have the same time, so their deadlines come in the order in which they came themselves: a
dict keeps them, and one timer of the loop waits for the oldest. To wait and to stop waiting is one insertion and one
deletion, where `asyncio.timeout` arms a timer and disarms it. The price: a timeout is told up to `_LATE_S` late.
"""

import asyncio

_LATE_S = 0.05


class Turn:
    """One request's time; a context manager that raises TimeoutError when it is over.

    Cancelled from outside at the same moment, it lets that cancellation through, as `asyncio.timeout` does.
    """

    __slots__ = ("_cancelling", "_is_over", "_patience", "_task", "deadline")

    def __init__(self, patience: "Patience", task: "asyncio.Task[object]", deadline: float) -> None:
        self._patience = patience
        self._task = task
        self._cancelling = task.cancelling()
        self._is_over = False
        self.deadline = deadline

    def __enter__(self) -> None:
        self._patience.waiting[self] = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if not self._is_over:
            del self._patience.waiting[self]
        elif self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError

    def end(self) -> None:
        """Its time is over."""
        self._is_over = True
        self._task.cancel()


class Patience:
    """The time that each of many requests has."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.waiting: dict[Turn, None] = {}
        """Oldest first."""
        self._timer: asyncio.TimerHandle | None = None

    def turn(self) -> Turn:
        """The time of the task that runs now, beginning now."""
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None, "a request runs in a task"
        deadline = loop.time() + self._timeout_s
        if self._timer is None:
            self._timer = loop.call_at(deadline + _LATE_S, self._ring)
        return Turn(self, task, deadline)

    def _ring(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        while self.waiting:
            oldest = next(iter(self.waiting))
            if oldest.deadline > now:
                self._timer = loop.call_at(oldest.deadline + _LATE_S, self._ring)
                return
            del self.waiting[oldest]
            oldest.end()
