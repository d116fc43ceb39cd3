"""S3-FIFO."""

from collections.abc import Iterator
from typing import Final

from headrace.cache.policies.eviction import SCAN_MAX, EvictionPolicy
from headrace.cache.policies.ghost import Ghost
from headrace.cache.policies.node import Node, Queue

VISITS_MAX: Final = 3
PROMOTED_FROM: Final = 2
"""Visits that move a node from the small queue to the main one."""


class S3Fifo(EvictionPolicy):
    """A small queue on probation, a main queue, and a memory of what left the small one; all first in, first out.

    Intuition: most new papers are never looked at again, so let a tenth of the desk see them off quickly, and let
    those that were wanted more than once stay on the rest of it. Source: Yang et al., FIFO Queues are All You Need for
    Cache Eviction, SOSP 2023; thresholds, shares and order of steps are those of the authors' libCacheSim. While
    nothing had to go yet, nine of ten arrivals go straight to the main queue (libCacheSim: all but the first tenth).
    """

    __slots__ = ("_filling", "_ghost", "_main", "_small")

    def __init__(self) -> None:
        self._small = Queue()
        self._main = Queue()
        self._ghost = Ghost()
        self._filling = True

    def insert(self, node: Node) -> None:
        """Start in the small queue; in the main one after a recent departure, or while the cache fills."""
        node.marks = 0
        small = self._small
        main = self._main
        if self._ghost.take(node.hash) or (self._filling and small.weight * 10 > small.weight + main.weight):
            main.push(node)
        else:
            small.push(node)

    def hit(self, node: Node) -> None:
        """Count the visit, up to VISITS_MAX."""
        if node.marks < VISITS_MAX:
            node.marks += 1

    def remove(self, node: Node) -> None:
        """Take it out of its queue."""
        node.queue.remove(node)

    def evict(self) -> Node:
        """From a main queue above nine tenths the oldest not visited, else from the small one the oldest with few
        visits."""
        self._filling = False
        small = self._small
        main = self._main
        total = small.weight + main.weight
        if main.weight > total - total // 10 or small.count == 0:
            return self._evict_main()
        for _turn in range(SCAN_MAX):
            if small.count == 0:
                return self._evict_main()
            node = small.oldest()
            small.remove(node)
            if node.marks < PROMOTED_FROM:
                break
            node.marks = 0
            main.push(node)
        else:
            node = small.oldest() if small.count else main.oldest()
            node.queue.remove(node)
        self._ghost.add(node.hash, (small.count + main.count + 1) * 9 // 10)
        return node

    def _evict_main(self) -> Node:
        main = self._main
        for _turn in range(SCAN_MAX):
            node = main.oldest()
            if node.marks == 0:
                break
            node.marks -= 1
            main.refresh(node)
        node = main.oldest()
        main.remove(node)
        return node

    def nodes(self) -> Iterator[Node]:
        """The small queue, then the main one."""
        yield from self._small.nodes()
        yield from self._main.nodes()

    def validate(self) -> None:
        """Check both queues."""
        self._small.validate()
        self._main.validate()
