"""What a policy orders: nodes in queues. Every operation is O(1) and allocates nothing.

Links live in the nodes themselves, so a queue costs no memory of its own, removal from the middle needs no search,
and no code of a key (`__eq__`, `__hash__`) ever runs while a policy rearranges its queues.
"""

from collections.abc import Iterator
from typing import cast

MASK_32 = 0xFFFFFFFF


def spread(key_hash: int) -> int:
    """Mix a Python hash into 32 well spread bits, never negative.

    Python's hash of an int is the int; sampling by hash and counting by hash both need bits that look random. Two
    rounds of multiply and xor-shift, after T. Mueller; the factor keeps products below 2**62, where mypyc's integers
    are fast.
    """
    mixed = (key_hash ^ (key_hash >> 32)) & MASK_32
    mixed = ((mixed ^ (mixed >> 16)) * 0x119DE1F3) & MASK_32
    mixed = ((mixed ^ (mixed >> 16)) * 0x119DE1F3) & MASK_32
    return mixed ^ (mixed >> 16)


class Link:
    """A place in a ring of links."""

    __slots__ = ("newer", "older")

    def __init__(self) -> None:
        self.newer: Link = self
        self.older: Link = self


class Queue:
    """Nodes from newest to oldest, with their number and total weight."""

    __slots__ = ("count", "ring", "weight")

    def __init__(self) -> None:
        self.ring = Link()
        self.count = 0
        self.weight = 0

    def push(self, node: "Node") -> None:
        """Add a node that is in no queue, as the newest."""
        ring = self.ring
        first = ring.older
        node.queue = self
        node.newer = ring
        node.older = first
        first.newer = node
        ring.older = node
        self.count += 1
        self.weight += node.weight

    def remove(self, node: "Node") -> None:
        """Take a node out, wherever it stands."""
        newer = node.newer
        older = node.older
        newer.older = older
        older.newer = newer
        # No link may keep its neighbours alive, nor itself: a removed entry must die with its last reader.
        node.newer = NOWHERE
        node.older = NOWHERE
        node.queue = NO_QUEUE
        self.count -= 1
        self.weight -= node.weight

    def refresh(self, node: "Node") -> None:
        """Make a node of this queue the newest."""
        ring = self.ring
        first = ring.older
        if first is node:
            return
        newer = node.newer
        older = node.older
        newer.older = older
        older.newer = newer
        node.newer = ring
        node.older = first
        first.newer = node
        ring.older = node

    def oldest(self) -> "Node":
        """The node that came first. The queue must not be empty."""
        return cast("Node", self.ring.newer)

    def nodes(self) -> "Iterator[Node]":
        """Every node, oldest first."""
        ring = self.ring
        link = ring.newer
        while link is not ring:
            yield cast("Node", link)
            link = link.newer


NOWHERE = Link()
NO_QUEUE = Queue()


class Node(Link):
    """What a policy knows of an entry: 32 bits of its key's hash, its weight, and marks of its own."""

    __slots__ = ("count", "hash", "marks", "queue", "weight")

    def __init__(self, key_hash: int, weight: int) -> None:
        self.newer = NOWHERE
        self.older = NOWHERE
        self.queue = NO_QUEUE
        self.hash = key_hash
        self.weight = weight
        self.marks = 0
        self.count = 0
        """Whatever the policy in charge keeps: a visited bit, a small frequency."""
