"""W-TinyLFU."""

from collections.abc import Iterator

from headrace.cache.policies.climber import SHARE_FIRST, Climber
from headrace.cache.policies.eviction import EvictionPolicy
from headrace.cache.policies.frequencies import Frequencies
from headrace.cache.policies.node import Node
from headrace.cache.policies.segments import Segments


class WTinyLfu(EvictionPolicy):
    """A window for what is new, a main part for what is asked for often, and a contest of counts between them.

    Intuition: everybody may try on a coat, but the wardrobe keeps those that were worn most often lately. The window grows
    and shrinks with the traffic, unless its share is given. Sources: Einziger, Friedman and Manes, TinyLFU, 2017; Einziger,
    Eytan, Friedman and Manes, Adaptive Software Cache Management, 2018.
    """

    __slots__ = ("_climber", "_climbs", "_count", "_frequencies", "_full", "_segments")

    def __init__(self, share: float | None = None, margin: int = 0) -> None:
        self._frequencies = Frequencies()
        self._segments = Segments(self._frequencies, SHARE_FIRST if share is None else share, margin)
        self._climber = Climber()
        self._climbs = share is None
        self._count = 0
        self._full = False

    def insert(self, node: Node) -> None:
        """Count it and put it into the window."""
        self._count += 1
        self._frequencies.arrive(node)
        self._segments.insert(node)
        if self._full and self._climbs:
            self._climber.miss()
            self._climb()

    def hit(self, node: Node) -> None:
        """Count it and let it rise."""
        if self._full and self._climbs:
            self._climber.hit(in_window=self._segments.in_window(node))
            self._climb()
        self._frequencies.hit(node)
        self._segments.hit(node)

    def _climb(self) -> None:
        self._climber.climb(self._count)
        self._segments.share = self._climber.share

    def remove(self, node: Node) -> None:
        """Remember its count and take it out."""
        self._count -= 1
        self._frequencies.leave(node)
        self._segments.remove(node)

    def evict(self) -> Node:
        """The loser of the contest; its count is remembered."""
        self._full = True
        self._frequencies.fit(self._count)
        node = self._segments.evict()
        self._count -= 1
        self._frequencies.leave(node)
        return node

    def holds(self, node: Node) -> bool:
        """Whether it is in one of the queues."""
        return self._segments.holds(node)

    def release(self) -> Node | None:
        """The least valuable of the queues."""
        node = self._segments.release()
        if node is not None:
            self._count -= 1
        return node

    def adopt(self, node: Node) -> None:
        """As the newest of the window."""
        self._count += 1
        self._segments.adopt(node)

    def nodes(self) -> Iterator[Node]:
        """Those on probation, the window, the protected."""
        return self._segments.nodes()

    def validate(self) -> None:
        """Check the queues."""
        self._segments.validate()
