"""The protocol of eviction policies."""

from collections.abc import Iterator

from headrace.cache.policies.node import Node

SCAN_MAX = 1024
"""How many nodes one eviction may spare before it takes the next whatever its marks: the bound of its work."""


class EvictionPolicy:
    """Keeps an order over nodes and names the next one to go.

    A policy sees neither keys nor values, neither clock nor bounds: the cache says what is inserted, hit and removed,
    and asks for a victim whenever it is full. Shares of a queue are shares of what is there, so that one policy
    serves any bound, in entries or in weight, and a resize needs no word.
    """

    __slots__ = ()

    def insert(self, node: Node) -> None:
        """Take charge of a node that is in no queue."""
        raise NotImplementedError

    def hit(self, node: Node) -> None:
        """Note an access to a node that is in a queue of this policy."""
        raise NotImplementedError

    def remove(self, node: Node) -> None:
        """Let go of a node that is in a queue of this policy: deleted or expired."""
        raise NotImplementedError

    def evict(self) -> Node:
        """Choose the node to go and let go of it. There must be one."""
        raise NotImplementedError

    def nodes(self) -> Iterator[Node]:
        """Every node, roughly from the next victim to the last."""
        raise NotImplementedError
