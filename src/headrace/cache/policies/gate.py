"""A window of what is new, a clock of what has proved itself, and a gate between them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from headrace.cache.policies.eviction import SCAN_MAX
from headrace.cache.policies.frequencies import Frequencies
from headrace.cache.policies.node import Node, Queue

if TYPE_CHECKING:
    from mypy_extensions import i64

SHARES: Final = 1024
"""Parts of the total weight that a window's share is counted in."""
VISITS_MAX: Final = 3
"""Rounds of the clock that visits can earn."""


class Rule:
    """How large the window is and who may pass the gate.

    Rules differ in nothing else, so one can take over any time.
    """

    __slots__ = ("margin", "name", "promotes", "share")

    def __init__(self, name: str, *, share: float, margin: "i64" = 0, promotes: bool = False) -> None:
        self.name = name
        self.share: i64 = int(share * SHARES)
        """Of the window in the total weight, in SHARES; it has at least one node."""
        self.margin: i64 = margin
        """How many more accesses a candidate needs than the victim, to be let in."""
        self.promotes = promotes
        """Not by contest: whoever was hit twice in the window passes, and who comes back after a departure passes at
        once.
        """


class Gate:
    """The queues behind W-TinyLFU and the adaptive policy.

    The window is an LRU. What leaves it passes the gate if it was asked for more often lately than the node that the
    clock would give up for it (Einziger, Friedman and Manes, TinyLFU, 2017). The clock is first in, first out, and a
    visit earns a node another round, up to VISITS_MAX; it replaces the segmented LRU of the paper, because a hit then
    moves nothing and the hit ratio is as good or better on every trace that we measure. With a window of nine tenths
    this is LRU in all but name; with hardly any and a margin it holds on to a part of a set that is asked for round
    and round; with a rule that promotes it is S3-FIFO whose ghost is the sketch.

    A tie is won by who is there already, and nobody passes by chance. Caffeine draws lots once in a while, because
    keys that collide with a victim's counters on purpose could close its gate for good; here a victim carries its own
    count, which other keys cannot keep high. Counting is left to the owner: see `Frequencies`.
    """

    __slots__ = ("_clock", "_filling", "_frequencies", "_window", "rule")

    def __init__(self, frequencies: Frequencies, rule: Rule) -> None:
        self.rule = rule
        self._frequencies = frequencies
        self._window = Queue()
        self._clock = Queue()
        self._filling = True

    def insert(self, node: Node) -> None:
        """Start in the window; with a rule that promotes, behind the gate if it was here before."""
        node.marks = 0
        window = self._window
        rule = self.rule
        if rule.promotes and self._frequencies.of(node) > 1 and not self._filling:
            self._clock.push(node)
        else:
            window.push(node)
        # Two for each that comes, so that a window which has to become smaller does so at the pace of the traffic.
        for _turn in range(2):
            if window.count > 1 and window.weight > self._room():
                self._pass(window.oldest())

    def hit(self, node: Node) -> None:
        """Note the visit; in the window it becomes the newest."""
        if node.marks < VISITS_MAX:
            node.marks += 1
        window = self._window
        if node.queue is window:
            window.refresh(node)

    def remove(self, node: Node) -> None:
        """Take it out of its queue."""
        node.queue.remove(node)

    def evict(self) -> Node:
        """The window's oldest if it may not pass the gate, else what the clock gives up."""
        self._filling = False
        window = self._window
        clock = self._clock
        loser: Node | None = None
        for _turn in range(SCAN_MAX):
            if window.count == 0:
                break
            candidate = window.oldest()
            # What comes next is taken to weigh as much as what is about to leave.
            if clock.count and window.weight + candidate.weight <= self._room():
                break
            if not self.rule.promotes:
                if clock.count and self._wins(candidate, self._hand()):
                    self._pass(candidate)
                else:
                    loser = candidate
                break
            if candidate.marks < 2:
                loser = candidate
                break
            self._pass(candidate)
        if loser is None:
            loser = self._hand()
        loser.queue.remove(loser)
        return loser

    def in_window(self, node: Node) -> bool:
        """Whether it is in the window."""
        return node.queue is self._window

    def _room(self) -> "i64":
        """How much weight the window may hold."""
        return (self._window.weight + self._clock.weight) * self.rule.share // SHARES

    def _pass(self, node: Node) -> None:
        self._window.remove(node)
        node.marks = 0
        self._clock.push(node)

    def _hand(self) -> Node:
        """Turn the clock to a node without visits, past at most SCAN_MAX others."""
        clock = self._clock
        for _turn in range(SCAN_MAX):
            node = clock.oldest()
            if node.marks == 0:
                break
            node.marks -= 1
            clock.refresh(node)
        return clock.oldest()

    def _wins(self, candidate: Node, victim: Node) -> bool:
        return self._frequencies.of(candidate) > self._frequencies.of(victim) + self.rule.margin

    def nodes(self) -> Iterator[Node]:
        """The window, then the clock."""
        yield from self._window.nodes()
        yield from self._clock.nodes()

    def validate(self) -> None:
        """Check both queues."""
        self._window.validate()
        self._clock.validate()
