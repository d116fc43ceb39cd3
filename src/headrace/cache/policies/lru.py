"""Least recently used."""

from collections.abc import Iterator

from headrace.cache.policies.eviction import EvictionPolicy
from headrace.cache.policies.node import Node, Queue


class Lru(EvictionPolicy):
    """Evicts what was not asked for the longest. Intuition: a pile of papers; whatever is used goes back on top."""

    __slots__ = ("_queue",)

    def __init__(self) -> None:
        self._queue = Queue()

    def insert(self, node: Node) -> None:
        """Put it on top."""
        self._queue.push(node)

    def hit(self, node: Node) -> None:
        """Put it on top again."""
        self._queue.refresh(node)

    def remove(self, node: Node) -> None:
        """Pull it out of the pile."""
        self._queue.remove(node)

    def evict(self) -> Node:
        """Take the lowest."""
        node = self._queue.oldest()
        self._queue.remove(node)
        return node

    def nodes(self) -> Iterator[Node]:
        """From the lowest to the top."""
        return self._queue.nodes()

    def validate(self) -> None:
        """Check the pile."""
        self._queue.validate()
