"""SIEVE."""

from collections.abc import Iterator
from typing import cast

from headrace.cache.policies.eviction import SCAN_MAX, EvictionPolicy
from headrace.cache.policies.node import Link, Node, Queue


class Sieve(EvictionPolicy):
    """Keeps arrival order; a hand moves from old to new, spares what was visited once, takes the first that was not.

    Intuition: new papers are judged where they lie, nothing is ever moved to the top. Source: Zhang et al., SIEVE is
    Simpler than LRU, NSDI 2024.
    """

    __slots__ = ("_hand", "_queue")

    def __init__(self) -> None:
        self._queue = Queue()
        self._hand: Link = self._queue.ring

    def insert(self, node: Node) -> None:
        """Append it, not visited."""
        node.marks = 0
        self._queue.push(node)

    def hit(self, node: Node) -> None:
        """Mark it."""
        node.marks = 1

    def remove(self, node: Node) -> None:
        """Take it out; a hand that points at it moves on."""
        if self._hand is node:
            self._hand = node.newer
        self._queue.remove(node)

    def evict(self) -> Node:
        """Move the hand to the first node that is not visited, over at most SCAN_MAX visited ones."""
        ring = self._queue.ring
        hand = self._hand
        for _ in range(SCAN_MAX):
            if hand is ring:
                hand = ring.newer
            node = cast("Node", hand)
            if node.marks == 0:
                break
            node.marks = 0
            hand = node.newer
        if hand is ring:
            hand = ring.newer
        node = cast("Node", hand)
        self._hand = node.newer
        self._queue.remove(node)
        return node

    def nodes(self) -> Iterator[Node]:
        """From the oldest to the newest."""
        return self._queue.nodes()
