"""SIEVE."""

from collections.abc import Iterator
from typing import cast

from headrace.cache.policies.eviction import SCAN_MAX, EvictionPolicy
from headrace.cache.policies.node import Link, Node, Queue
from headrace.errors import BugError


class Sieve(EvictionPolicy):
    """Keeps the order of arrival; a hand moves from old to new, spares what was visited, takes the first that was not.

    Intuition: papers are judged where they lie, nothing is ever moved. Source: Zhang et al., SIEVE is Simpler than
    LRU, NSDI 2024.
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
        """Mark it visited."""
        node.marks = 1

    def remove(self, node: Node) -> None:
        """Take it out; a hand that points at it moves on."""
        if self._hand is node:
            self._hand = node.newer
        self._queue.remove(node)

    def evict(self) -> Node:
        """Move the hand to the first node that was not visited, sparing at most SCAN_MAX."""
        ring = self._queue.ring
        hand = self._hand
        for _turn in range(SCAN_MAX):
            if hand is ring:
                hand = ring.newer
            node = cast("Node", hand)
            if node.marks == 0:
                break
            node.marks = 0
            hand = node.newer
        node = cast("Node", ring.newer if hand is ring else hand)
        self._hand = node.newer
        self._queue.remove(node)
        return node

    def nodes(self) -> Iterator[Node]:
        """From the oldest to the newest."""
        return self._queue.nodes()

    def validate(self) -> None:
        """Check the queue, and that the hand is in it."""
        self._queue.validate()
        ring = self._queue.ring
        if self._hand is not ring and all(self._hand is not node for node in self._queue.nodes()):
            raise BugError("the hand of SIEVE points at a node that is gone.")
