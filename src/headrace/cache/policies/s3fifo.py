"""S3-FIFO."""

from collections.abc import Iterator

from headrace.cache.policies.eviction import SCAN_MAX, EvictionPolicy
from headrace.cache.policies.ghost import Ghost
from headrace.cache.policies.node import Node, Queue

FREQUENCY_MAX = 3


class S3Fifo(EvictionPolicy):
    """A small queue on probation, a main queue, and a memory of what left the small one; all first in, first out.

    Intuition: most new papers are never looked at again, so let a tenth of the desk see them off quickly, and let
    those that were wanted again stay on the rest of it. Source: Yang et al., FIFO Queues are All You Need for Cache
    Eviction, SOSP 2023; queue shares, threshold and order of steps as in the authors' libCacheSim.
    """

    __slots__ = ("_ghost", "_main", "_small")

    def __init__(self) -> None:
        self._small = Queue()
        self._main = Queue()
        self._ghost = Ghost()

    def insert(self, node: Node) -> None:
        """Start in the small queue, or in the main one after a recent departure."""
        node.marks = 0
        if self._ghost.take(node.hash):
            self._main.push(node)
        else:
            self._small.push(node)

    def hit(self, node: Node) -> None:
        """Count up to FREQUENCY_MAX."""
        if node.marks < FREQUENCY_MAX:
            node.marks += 1

    def remove(self, node: Node) -> None:
        """Take it out of its queue."""
        node.queue.remove(node)

    def evict(self) -> Node:
        """The oldest of the small queue that was not hit twice, or of a main queue above nine tenths, not hit at
        all."""
        small = self._small
        main = self._main
        for _ in range(SCAN_MAX):
            if small.count == 0 or main.weight * 10 > (small.weight + main.weight) * 9:
                node = main.oldest()
                if node.marks == 0:
                    main.remove(node)
                    return node
                node.marks -= 1
                main.refresh(node)
            else:
                node = small.oldest()
                small.remove(node)
                if node.marks < 2:
                    self._ghost.add(node.hash, (small.count + main.count) * 9 // 10)
                    return node
                node.marks = 0
                main.push(node)
        node = main.oldest() if main.count else small.oldest()
        node.queue.remove(node)
        return node

    def nodes(self) -> Iterator[Node]:
        """The small queue, then the main one."""
        yield from self._small.nodes()
        yield from self._main.nodes()
