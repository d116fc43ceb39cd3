"""The adaptive policy: whom it follows, how soon, and how seldom it changes its mind."""

from collections.abc import Iterable

import pytest

from headrace.cache.policies import Adaptive, Lru, Node
from headrace.cache.policies.adaptive import RULES, SHADOW_NODES, Shadow
from headrace.cache.policies.eviction import EvictionPolicy
from headrace.cache.policies.node import spread


class Replay:
    """A cache of nothing but nodes, and its hits."""

    def __init__(self, policy: EvictionPolicy, size: int) -> None:
        self.policy = policy
        self.size = size
        self.nodes: dict[int, Node] = {}
        self.hits = 0

    def run(self, numbers: Iterable[int]) -> int:
        """The hits of these accesses."""
        before = self.hits
        for key in map(spread, numbers):
            node = self.nodes.get(key)
            if node is not None:
                self.hits += 1
                self.policy.hit(node)
                continue
            if len(self.nodes) == self.size:
                del self.nodes[self.policy.evict().hash]
            self.nodes[key] = Node(key, 1)
            self.policy.insert(self.nodes[key])
        return self.hits - before


def loop(length: int, rounds: int) -> list[int]:
    """Round and round: the worst case of LRU."""
    return list(range(length)) * rounds


def sliding(size: int, steps: int, start: int) -> list[int]:
    """Each key is asked for twice, the second time when it is nearly forgotten: the best case of LRU."""
    return [key for step in range(start, start + steps) for key in (step, step - size // 3)]


def test_it_holds_on_to_a_loop_that_lru_loses_entirely():
    """Of a loop twice its size it keeps nearly half."""
    adaptive = Replay(Adaptive(), 500)
    assert Replay(Lru(), 500).run(loop(1000, 20)) == 0
    assert adaptive.run(loop(1000, 20)) > 0.45 * 19 * 1000


def test_the_keeper_holds_on_to_a_part_of_a_loop_so_long_that_counts_are_forgotten_on_the_way():
    """Of a loop sixteen times its size it keeps most of what fits: being asked for once lets nobody in."""
    keeper = Shadow(RULES[0])
    hits = sum(keeper.access(key_hash, 1, 64) for key_hash in map(spread, loop(1024, 20)))
    assert hits > 0.8 * 19 * 63


def test_it_follows_recency_where_recency_is_everything():
    """Within a few sizes of the cache it is as good as LRU, and says whom it follows."""
    adaptive, lru = Replay(Adaptive(), 500), Replay(Lru(), 500)
    warm_up = sliding(500, 3000, 0)
    adaptive.run(warm_up)
    lru.run(warm_up)
    rest = sliding(500, 6000, 3000)
    assert adaptive.run(rest) > 0.97 * lru.run(rest)
    assert adaptive.policy.following == "recency"


def test_it_changes_its_mind_when_the_traffic_changes_and_not_more_often():
    """Three phases, and hardly more changes than phases."""
    adaptive = Replay(Adaptive(), 500)
    adaptive.run(sliding(500, 6000, 0))
    adaptive.run(index + 100_000 for index in loop(1000, 40))
    tail = adaptive.run(index + 100_000 for index in loop(1000, 10))
    assert tail > 0.4 * 10_000
    adaptive.run(sliding(500, 6000, 200_000))
    assert adaptive.policy.following == "recency"
    assert adaptive.policy.changes <= 6


def test_a_change_of_rule_drops_nothing():
    """Every node that was there is there afterwards, and each is ordered once."""
    adaptive = Replay(Adaptive(), 500)
    adaptive.run(loop(1000, 5))
    rules = set()
    for start in range(3000, 9000, 20):
        adaptive.run(sliding(500, 20, start))
        adaptive.policy.validate()
        rules.add(adaptive.policy.following)
        assert len(list(adaptive.policy.nodes())) == len(adaptive.nodes) == 500
    assert len(rules) > 1


@pytest.mark.parametrize("size", [10, 1000, 20_000])
def test_shadows_stay_small_whatever_the_size_of_the_cache(size):
    """A sample of hashes that thins out: no shadow holds more than about twice SHADOW_NODES."""
    adaptive = Adaptive()
    replay = Replay(adaptive, size)
    replay.run(range(2 * size))
    adaptive.validate()
    held = [len(shadow._nodes) for shadow in adaptive._shadows]
    assert max(held) <= min(size, 2.6 * SHADOW_NODES)
    assert min(held) >= min(size, SHADOW_NODES // 2)


def test_what_is_removed_leaves_the_shadows_too():
    """A deleted or expired key is a miss to every rule."""
    adaptive = Adaptive()
    replay = Replay(adaptive, 100)
    replay.run(range(100))
    for node in list(replay.nodes.values()):
        adaptive.remove(node)
    replay.nodes.clear()
    adaptive.validate()
    assert all(not shadow._nodes for shadow in adaptive._shadows)


def test_rules_are_what_their_names_say():
    """The candidates cover the range from holding on to letting go."""
    assert [rule.name for rule in RULES] == ["keeper", "balanced", "recency", "queues"]
    assert RULES[0].share < RULES[3].share < RULES[1].share < RULES[2].share
