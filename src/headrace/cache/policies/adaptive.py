"""The adaptive policy: small copies of several rules watch the traffic, and the cache follows the best."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from headrace.cache.policies.eviction import EvictionPolicy
from headrace.cache.policies.frequencies import Frequencies
from headrace.cache.policies.gate import Gate, Rule
from headrace.cache.policies.node import Node
from headrace.errors import BugError

if TYPE_CHECKING:
    from mypy_extensions import i64

RULES: Final = (
    Rule("keeper", share=0.005, margin=1),
    Rule("balanced", share=0.3),
    Rule("recency", share=0.9),
    Rule("queues", share=0.1, promotes=True),
)
"""W-TinyLFU that lets hardly anything in, W-TinyLFU with a wide window, as good as LRU, and S3-FIFO."""

SHADOW_NODES: Final = 300
"""A shadow holds between this many nodes and twice as many, whatever the size of the cache."""
DECISIONS: Final = 4
"""How often to decide while the sample sees as many accesses as a shadow has nodes."""
DECISION_MIN: Final = 20
"""Sampled accesses between two decisions at least."""
MEMORY: Final = 15.0
"""Sampled accesses after which the evidence is halved, for each node of a shadow."""
DOUBT: Final = 2.0
"""Standard deviations by which a lead must exceed what chance would do."""
LEAD: Final = 0.01
"""Hits by which it must exceed that besides, for each node of a shadow: a change costs hits too."""
LEAD_MIN: Final = 5.0


class Shadow:
    """A rule in miniature: the hashes that would be held if the cache were as small as the sample."""

    __slots__ = ("_frequencies", "_gate", "_nodes", "_weight")

    def __init__(self, rule: Rule) -> None:
        self._frequencies = Frequencies()
        self._gate = Gate(self._frequencies, rule)
        self._nodes: dict[int, Node] = {}
        self._weight: i64 = 0

    def access(self, key_hash: "i64", weight: "i64", bound: "i64") -> bool:
        """Replay one access with room for `bound` in weight; whether it would have been a hit."""
        nodes = self._nodes
        node = nodes.get(key_hash)
        if node is not None:
            self._frequencies.hit(node)
            self._gate.hit(node)
            return True
        # At most two go for each that comes, so that a bound which shrank is reached at the pace of the traffic.
        for _turn in range(2):
            if self._weight + weight > bound and nodes:
                self._frequencies.fit(len(nodes))
                node = self._gate.evict()
                self._drop(node)
        if node is None:
            node = Node(key_hash, weight)
        else:
            node.hash = key_hash
            node.weight = weight
        nodes[key_hash] = node
        self._weight += weight
        self._frequencies.arrive(node)
        self._gate.insert(node)
        return False

    def forget(self, key_hash: "i64") -> None:
        """Remove what the cache was told to remove."""
        node = self._nodes.get(key_hash)
        if node is not None:
            self._gate.remove(node)
            self._drop(node)

    def thin(self, mask: "i64") -> None:
        """Forget every hash that is no longer sampled."""
        for key_hash in [key_hash for key_hash in self._nodes if key_hash & mask]:
            self.forget(key_hash)

    def _drop(self, node: Node) -> None:
        self._frequencies.leave(node)
        del self._nodes[node.hash]
        self._weight -= node.weight

    def validate(self) -> None:
        """Check the queues, and that they order what the shadow holds."""
        self._gate.validate()
        nodes = list(self._gate.nodes())
        if len(nodes) != len(self._nodes) or any(self._nodes.get(node.hash) is not node for node in nodes):
            raise BugError("a shadow and its queues hold different nodes.")
        if sum(node.weight for node in nodes) != self._weight:
            raise BugError(f"a shadow says that it weighs {self._weight}.")


class Adaptive(EvictionPolicy):
    """Follows whichever of four rules would have had the most hits lately.

    Each rule runs as a shadow on a sample of the keys, chosen by hash, with room in proportion: a miniature simulation
    (Waldspurger et al., Cache Modeling and Optimization using Miniature Simulations, ATC 2017) on a sample that thins
    out as the cache grows (SHARDS, FAST 2015). Only accesses on which a rule and the one in charge disagree are
    evidence. A change needs a lead beyond chance and beyond what a change costs; it moves the border of the window and
    exchanges the question at the gate, so it is O(1), drops nothing and forgets nothing: counts and order serve every
    rule.
    """

    __slots__ = (
        "_accesses",
        "_bits",
        "_count",
        "_frequencies",
        "_full",
        "_gate",
        "_leader",
        "_losses",
        "_shadows",
        "_since",
        "_weight",
        "_wins",
        "changes",
    )

    def __init__(self) -> None:
        self._frequencies = Frequencies()
        self._gate = Gate(self._frequencies, RULES[0])
        self._shadows = [Shadow(rule) for rule in RULES]
        self._leader = 0
        self._bits: i64 = 0
        """Hashes whose lowest bits, this many, are zero are sampled."""
        self._full = False
        self._count: i64 = 0
        self._weight: i64 = 0
        self._accesses: i64 = 0
        self._since: i64 = 0
        self._wins = [0.0] * len(RULES)
        self._losses = [0.0] * len(RULES)
        self.changes = 0
        """How often another rule took over."""

    @property
    def following(self) -> str:
        """The name of the rule in charge."""
        return self._gate.rule.name

    def insert(self, node: Node) -> None:
        """Count it, put it into the window, show it to the shadows."""
        self._count += 1
        self._weight += node.weight
        self._frequencies.arrive(node)
        self._gate.insert(node)
        self._watch(node)

    def hit(self, node: Node) -> None:
        """Count it and show it to the shadows."""
        self._frequencies.hit(node)
        self._gate.hit(node)
        self._watch(node)

    def remove(self, node: Node) -> None:
        """Take it out, of the shadows too."""
        self._gate.remove(node)
        self._leave(node)
        if node.hash & ((1 << self._bits) - 1) == 0:
            for shadow in self._shadows:
                shadow.forget(node.hash)

    def evict(self) -> Node:
        """Whoever the gate turns away; its count is remembered."""
        self._full = True
        self._frequencies.fit(self._count)
        node = self._gate.evict()
        self._leave(node)
        return node

    def _leave(self, node: Node) -> None:
        self._count -= 1
        self._weight -= node.weight
        self._frequencies.leave(node)

    def _watch(self, node: Node) -> None:
        """Replay a sampled access in every shadow, and decide once in a while."""
        if node.hash & ((1 << self._bits) - 1):
            return
        bound = (self._weight >> self._bits) if self._full else self._weight
        shadows = self._shadows
        leader = self._leader
        hit = shadows[leader].access(node.hash, node.weight, bound)
        for index in range(len(shadows)):
            if index != leader and shadows[index].access(node.hash, node.weight, bound) != hit:
                if hit:
                    self._losses[index] += 1.0
                else:
                    self._wins[index] += 1.0
        self._accesses += 1
        self._since += 1
        sampled = self._count >> self._bits
        if sampled >= 2 * SHADOW_NODES:
            self._bits += 1
            for shadow in shadows:
                shadow.thin((1 << self._bits) - 1)
        elif self._since >= DECISION_MIN and self._since * DECISIONS >= sampled:
            self._since = 0
            self._decide(float(sampled))

    def _decide(self, size: float) -> None:
        best = self._leader
        lead = 0.0
        for index in range(len(RULES)):
            wins = self._wins[index]
            losses = self._losses[index]
            chance = DOUBT * (wins + losses) ** 0.5
            if wins - losses > lead and wins - losses > chance + LEAD * size + LEAD_MIN:
                best = index
                lead = wins - losses
        if best != self._leader:
            self.changes += 1
            self._leader = best
            self._gate.rule = RULES[best]
            self._wins = [0.0] * len(RULES)
            self._losses = [0.0] * len(RULES)
        elif float(self._accesses) >= MEMORY * size:
            self._accesses = 0
            for index in range(len(RULES)):
                self._wins[index] /= 2.0
                self._losses[index] /= 2.0

    def nodes(self) -> Iterator[Node]:
        """The window, then the clock."""
        return self._gate.nodes()

    def validate(self) -> None:
        """Check the queues and the shadows."""
        self._gate.validate()
        for shadow in self._shadows:
            shadow.validate()
        count = weight = 0
        for node in self.nodes():
            count += 1
            weight += node.weight
        if count != self._count or weight != self._weight:
            raise BugError(f"{count} nodes weighing {weight} are counted as {self._count} and {self._weight}.")
