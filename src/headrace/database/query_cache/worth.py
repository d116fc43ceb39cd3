"""Which results are worth their memory: Greedy-Dual-Size-Frequency. Pure.

Intuition: keep what saves the most time a byte. A result that took 200 ms and is asked for often is worth more than a
large one that took one. Each has a priority, `clock + uses x cost / size`; the lowest goes, and the clock moves up to
its priority, so that what was dear but is not asked for any more goes in its turn.

Source: L. Cherkasova, Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy, HPL-98-69.
The heap is lazy: a use only counts, and what comes up with an outdated priority goes back in with its new one.
"""

import heapq
from typing import Final

ENTRY_BYTES: Final = 1024
"""What a result takes beside its cells, so that the smallest are not for nothing."""


class _Held:
    __slots__ = ("bytes", "clock", "uses", "value")

    def __init__(self, size: int, value: float, clock: float) -> None:
        self.bytes = size
        self.value = value
        self.uses = 1
        self.clock = clock

    def priority(self) -> float:
        return self.clock + self.uses * self.value


class Worth:
    """Names of results within a budget of bytes."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.bytes = 0
        self._clock = 0.0
        self._held: dict[str, _Held] = {}
        self._heap: list[tuple[float, str]] = []

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def use(self, name: str) -> None:
        """A result was asked for, and was there."""
        held = self._held.get(name)
        if held is not None:
            held.uses += 1
            held.clock = self._clock

    def add(self, name: str, *, cost_s: float, size: int) -> list[str]:
        """A result of this cost is there; the names of those that have to go for it, itself perhaps."""
        before = self.remove(name)
        size += ENTRY_BYTES
        held = _Held(size, cost_s / size, self._clock)
        held.uses += before
        self._held[name] = held
        self.bytes += size
        heapq.heappush(self._heap, (held.priority(), name))
        gone = self._make_room()
        if len(self._heap) > 2 * len(self._held) + 64:
            self._heap = [(held.priority(), name) for name, held in self._held.items()]
            heapq.heapify(self._heap)
        return gone

    def remove(self, name: str) -> int:
        """Forget a result; how often it was asked for."""
        held = self._held.pop(name, None)
        if held is None:
            return 0
        self.bytes -= held.bytes
        return held.uses

    def _make_room(self) -> list[str]:
        gone = []
        while self.bytes > self.bytes_max and self._heap:
            priority, name = heapq.heappop(self._heap)
            held = self._held.get(name)
            if held is None:
                continue
            if (now := held.priority()) > priority:
                heapq.heappush(self._heap, (now, name))
                continue
            self._clock = max(self._clock, priority)
            self.remove(name)
            gone.append(name)
        return gone


SHARE: Final = 1e-5
"""Of one connection's time that reloading one result may cost, where nobody says how long it lives: a thousand results
that are all asked for all the time cost a hundredth of a connection."""


def lifetime_s(cost_s: float, complexity: int, *, longest_s: float) -> float:
    """How long a result lives that took `cost_s`: as long as reloads shall be rare, within the longest allowed.

    A result that is reloaded every T seconds costs cost / T of a connection; T is such that this is SHARE. The time of
    one run says too little of a query that joins and sorts what happened to be in memory, so T grows with its parts.
    """
    return min(longest_s, max(1.0, cost_s * complexity / SHARE))
