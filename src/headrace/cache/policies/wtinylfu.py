"""W-TinyLFU."""

from collections.abc import Iterator

from headrace.cache.policies.climber import SHARE_FIRST, Climber
from headrace.cache.policies.eviction import EvictionPolicy
from headrace.cache.policies.frequencies import Frequencies
from headrace.cache.policies.gate import SHARES, Gate, Rule
from headrace.cache.policies.node import Node


class WTinyLfu(EvictionPolicy):
    """A window for what is new, a larger part for what is asked for often, and a contest of counts between them.

    Intuition: everybody may try on a coat, but the wardrobe keeps those that were worn most often lately. The window
    grows and shrinks with the traffic. Sources: Einziger, Friedman and Manes, TinyLFU, 2017; Einziger, Eytan, Friedman
    and Manes, Adaptive Software Cache Management, 2018; what differs from them is said at `Gate`.
    """

    __slots__ = ("_climber", "_count", "_frequencies", "_full", "_gate")

    def __init__(self) -> None:
        self._frequencies = Frequencies()
        self._gate = Gate(self._frequencies, Rule("wtinylfu", share=SHARE_FIRST))
        self._climber = Climber()
        self._count = 0
        self._full = False

    def insert(self, node: Node) -> None:
        """Count it and put it into the window."""
        self._count += 1
        self._frequencies.arrive(node)
        self._gate.insert(node)
        if self._full:
            self._climber.miss()
            self._climb()

    def hit(self, node: Node) -> None:
        """Count it."""
        if self._full:
            self._climber.hit(in_window=self._gate.in_window(node))
            self._climb()
        self._frequencies.hit(node)
        self._gate.hit(node)

    def _climb(self) -> None:
        self._climber.climb(self._count)
        self._gate.rule.share = int(self._climber.share * SHARES)

    def remove(self, node: Node) -> None:
        """Remember its count and take it out."""
        self._count -= 1
        self._frequencies.leave(node)
        self._gate.remove(node)

    def evict(self) -> Node:
        """Whoever the gate turns away; its count is remembered."""
        self._full = True
        self._frequencies.fit(self._count)
        node = self._gate.evict()
        self._count -= 1
        self._frequencies.leave(node)
        return node

    def nodes(self) -> Iterator[Node]:
        """The window, then the clock."""
        return self._gate.nodes()

    def validate(self) -> None:
        """Check the queues."""
        self._gate.validate()
