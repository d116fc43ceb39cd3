"""The protocol of eviction policies."""

from collections.abc import Iterator
from typing import Final

from headrace.cache.policies.node import Node

SCAN_MAX: Final = 1024
"""How many nodes one eviction may spare before it takes the next whatever its marks: the bound of its work."""


class EvictionPolicy:
    """Keeps nodes in an order and names the next one to go.

    A policy sees neither keys nor values, neither clock nor bounds: the cache says what is inserted, hit and removed,
    and asks for a victim before each insertion that would not fit. The share of a queue is a share of what is there,
    so the same code serves any bound, in entries or in weight, and needs no word when a bound changes.
    """

    __slots__ = ()

    def insert(self, node: Node) -> None:
        """Take charge of a new node."""
        raise NotImplementedError

    def hit(self, node: Node) -> None:
        """Note an access to a node of this policy."""
        raise NotImplementedError

    def remove(self, node: Node) -> None:
        """Let go of a node of this policy that was deleted or has expired."""
        raise NotImplementedError

    def evict(self) -> Node:
        """Choose a node, let go of it and return it. There must be one."""
        raise NotImplementedError

    def nodes(self) -> Iterator[Node]:
        """Every node, roughly from the next victim to the last."""
        raise NotImplementedError

    def validate(self) -> None:
        """Raise BugError unless the invariants hold. O(n): for tests."""
        raise NotImplementedError
