"""Every policy beside a slow and obvious one: lists instead of links, on random calls. They evict the same, always."""

import random
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.cache.policies import Adaptive, EvictionPolicy, Lru, Node, S3Fifo, Sieve, WTinyLfu
from headrace.cache.policies.adaptive import RULES
from headrace.cache.policies.climber import Climber
from headrace.cache.policies.frequencies import Frequencies
from headrace.cache.policies.gate import SHARES, Rule
from headrace.cache.policies.node import spread


class Slow(Protocol):
    """What the reference policies offer, by hash instead of by node."""

    def insert(self, key: int) -> None: ...

    def hit(self, key: int) -> None: ...

    def remove(self, key: int) -> None: ...

    def evict(self) -> int: ...


class SlowLru:
    """A list from the oldest to the newest."""

    def __init__(self) -> None:
        self.keys: list[int] = []

    def insert(self, key: int) -> None:
        self.keys.append(key)

    def hit(self, key: int) -> None:
        self.keys.remove(key)
        self.keys.append(key)

    def remove(self, key: int) -> None:
        self.keys.remove(key)

    def evict(self) -> int:
        return self.keys.pop(0)


class SlowSieve:
    """A list in the order of arrival, a set of visited keys and the key under the hand."""

    def __init__(self) -> None:
        self.keys: list[int] = []
        self.visited: set[int] = set()
        self.hand: int | None = None

    def insert(self, key: int) -> None:
        self.keys.append(key)

    def hit(self, key: int) -> None:
        self.visited.add(key)

    def after(self, key: int) -> int | None:
        place = self.keys.index(key) + 1
        return self.keys[place] if place < len(self.keys) else None

    def remove(self, key: int) -> None:
        if self.hand == key:
            self.hand = self.after(key)
        self.keys.remove(key)
        self.visited.discard(key)

    def evict(self) -> int:
        while True:
            key = self.keys[0] if self.hand is None else self.hand
            if key not in self.visited:
                self.hand = self.after(key)
                self.keys.remove(key)
                return key
            self.visited.discard(key)
            self.hand = self.after(key)


class SlowS3Fifo:
    """Three lists and a dict of visits."""

    def __init__(self) -> None:
        self.small: list[int] = []
        self.main: list[int] = []
        self.ghost: list[int] = []
        self.visits: dict[int, int] = {}
        self.filling = True

    def insert(self, key: int) -> None:
        self.visits[key] = 0
        if key in self.ghost:
            self.ghost.remove(key)
            self.main.append(key)
        elif self.filling and 10 * len(self.small) > len(self.small + self.main):
            self.main.append(key)
        else:
            self.small.append(key)

    def hit(self, key: int) -> None:
        self.visits[key] = min(self.visits[key] + 1, 3)

    def remove(self, key: int) -> None:
        (self.small if key in self.small else self.main).remove(key)

    def evict(self) -> int:
        self.filling = False
        total = len(self.small + self.main)
        if len(self.main) <= total - total // 10:
            while self.small:
                key = self.small.pop(0)
                if self.visits[key] < 2:
                    self.ghost = [*self.ghost, key][-(total * 9 // 10) :] if total > 1 else []
                    return key
                self.visits[key] = 0
                self.main.append(key)
        while self.visits[self.main[0]]:
            key = self.main.pop(0)
            self.visits[key] -= 1
            self.main.append(key)
        return self.main.pop(0)


class SlowGate:
    """A window and a clock as lists. Counts come from Frequencies, which is compared with exact counts below."""

    def __init__(self, rule: Rule, counts: "Counts") -> None:
        self.rule = rule
        self.counts = counts
        self.window: list[int] = []
        self.clock: list[int] = []
        self.visits: dict[int, int] = {}
        self.filling = True

    def room(self) -> int:
        return len(self.window + self.clock) * self.rule.share // SHARES

    def insert(self, key: int) -> None:
        self.visits[key] = 0
        is_known = self.rule.promotes and not self.filling and self.counts.of(key) > 1
        (self.clock if is_known else self.window).append(key)
        for _ in range(2):
            if len(self.window) > max(1, self.room()):
                self.let_pass()

    def let_pass(self) -> None:
        key = self.window.pop(0)
        self.visits[key] = 0
        self.clock.append(key)

    def hit(self, key: int) -> None:
        self.visits[key] = min(self.visits[key] + 1, 3)
        if key in self.window:
            self.window.remove(key)
            self.window.append(key)

    def remove(self, key: int) -> None:
        (self.window if key in self.window else self.clock).remove(key)

    def turn(self) -> int:
        while self.visits[self.clock[0]]:
            key = self.clock.pop(0)
            self.visits[key] -= 1
            self.clock.append(key)
        return self.clock[0]

    def evict(self) -> int:
        self.filling = False
        while self.window and (not self.clock or len(self.window) + 1 > self.room()):
            candidate = self.window[0]
            if self.rule.promotes:
                if self.visits[candidate] < 2:
                    return self.window.pop(0)
                self.let_pass()
                continue
            if self.clock:
                victim = self.turn()
                if self.counts.of(candidate) > self.counts.of(victim) + self.rule.margin:
                    self.let_pass()
                    return self.clock.pop(self.clock.index(victim))
            return self.window.pop(0)
        self.turn()
        return self.clock.pop(0)


class Counts:
    """Frequencies by key: a node for each key that is there."""

    def __init__(self) -> None:
        self.frequencies = Frequencies()
        self.nodes: dict[int, Node] = {}

    def arrive(self, key: int) -> None:
        self.nodes[key] = Node(key, 1)
        self.frequencies.arrive(self.nodes[key])

    def hit(self, key: int) -> None:
        self.frequencies.hit(self.nodes[key])

    def leave(self, key: int) -> None:
        self.frequencies.leave(self.nodes.pop(key))

    def of(self, key: int) -> int:
        return self.frequencies.of(self.nodes[key])

    def fit(self) -> None:
        self.frequencies.fit(len(self.nodes))


class SlowCounted:
    """A slow gate with its counts; with a climber it is W-TinyLFU."""

    def __init__(self, rule: Rule, climber: Climber | None = None) -> None:
        self.counts = Counts()
        self.gate = SlowGate(rule, self.counts)
        self.climber = climber

    def climb(self, note: Callable[[], None]) -> None:
        if self.climber is not None and not self.gate.filling:
            note()
            self.climber.climb(len(self.counts.nodes))
            self.gate.rule.share = int(self.climber.share * SHARES)

    def insert(self, key: int) -> None:
        self.counts.arrive(key)
        self.gate.insert(key)
        if self.climber is not None:
            self.climb(self.climber.miss)

    def hit(self, key: int) -> None:
        if self.climber is not None:
            climber = self.climber
            self.climb(lambda: climber.hit(in_window=key in self.gate.window))
        self.counts.hit(key)
        self.gate.hit(key)

    def remove(self, key: int) -> None:
        self.gate.remove(key)
        self.counts.leave(key)

    def evict(self) -> int:
        self.counts.fit()
        key = self.gate.evict()
        self.counts.leave(key)
        return key


class SlowShadow:
    """A set of keys and a slow policy that decides what is in it."""

    def __init__(self, rule: Rule) -> None:
        self.policy = SlowCounted(rule)

    def access(self, key: int, bound: int) -> bool:
        held = self.policy.counts.nodes
        if key in held:
            self.policy.hit(key)
            return True
        for _ in range(2):
            if len(held) + 1 > bound and held:
                self.policy.evict()
        self.policy.insert(key)
        return False

    def forget(self, key: int) -> None:
        if key in self.policy.counts.nodes:
            self.policy.remove(key)


class SlowAdaptive:
    """A slow gate, four slow shadows of everything, and the rule of decision in one line."""

    def __init__(self) -> None:
        self.real = SlowCounted(RULES[0])
        self.shadows = [SlowShadow(rule) for rule in RULES]
        self.leader = 0
        self.gains: list[tuple[float, float]] = [(0.0, 0.0)] * len(RULES)
        self.accesses = self.since = 0

    def watch(self, key: int) -> None:
        size = len(self.real.counts.nodes)
        # Nothing is a shadow's own reason to evict before the cache had one.
        hits = [shadow.access(key, size) for shadow in self.shadows]
        for index, hit in enumerate(hits):
            wins, losses = self.gains[index]
            self.gains[index] = (wins + (hit > hits[self.leader]), losses + (hit < hits[self.leader]))
        self.accesses += 1
        self.since += 1
        if self.since >= 20 and self.since * 4 >= size:
            self.since = 0
            self.decide(size)

    def decide(self, size: int) -> None:
        leads = {
            wins - losses: index
            for index, (wins, losses) in reversed(list(enumerate(self.gains)))
            if wins - losses > 2.0 * (wins + losses) ** 0.5 + 0.01 * size + 5.0
        }
        if leads:
            self.leader = leads[max(leads)]
            self.real.gate.rule = RULES[self.leader]
            self.gains = [(0.0, 0.0)] * len(RULES)
        elif self.accesses >= 15.0 * size:
            self.accesses = 0
            self.gains = [(wins / 2, losses / 2) for wins, losses in self.gains]

    def insert(self, key: int) -> None:
        self.real.insert(key)
        self.watch(key)

    def hit(self, key: int) -> None:
        self.real.hit(key)
        self.watch(key)

    def remove(self, key: int) -> None:
        self.real.remove(key)
        for shadow in self.shadows:
            shadow.forget(key)

    def evict(self) -> int:
        return self.real.evict()


PAIRS: dict[str, tuple[Callable[[], EvictionPolicy], Callable[[], Any]]] = {
    "lru": (Lru, SlowLru),
    "sieve": (Sieve, SlowSieve),
    "s3fifo": (S3Fifo, SlowS3Fifo),
    "wtinylfu": (WTinyLfu, lambda: SlowCounted(Rule("slow", share=0.01), Climber())),
    "adaptive": (Adaptive, SlowAdaptive),
}


def traffic(rng: random.Random, keys: int, length: int) -> Iterator[int]:
    """Each key once, and then as in life: favourites, loops and scans take turns."""
    yield from range(keys)
    scanned = keys
    while length > 0:
        phase = rng.randrange(10, 200)
        length -= phase
        match rng.choice(["favourites", "loop", "scan", "pairs"]):
            case "favourites":
                yield from (int(keys * rng.random() ** 3) for _ in range(phase))
            case "loop":
                around = rng.randint(1, keys)
                yield from (step % around for step in range(phase))
            case "scan":
                yield from range(scanned, scanned + phase)
                scanned += phase
            case "pairs":
                yield from (key for _ in range(phase // 2) for key in [rng.randrange(keys)] * 2)


def replay(policy: EvictionPolicy, slow: Slow, bound: int, rng: random.Random) -> int:
    """Make the same calls on both; they must never disagree. How many went."""
    nodes: dict[int, Node] = {}
    evictions = 0
    for key in map(spread, traffic(rng, rng.randint(bound + 1, 4 * bound + 1), 2000)):
        if key in nodes and rng.random() < 0.03:
            policy.remove(nodes.pop(key))
            slow.remove(key)
        elif key in nodes:
            policy.hit(nodes[key])
            slow.hit(key)
        else:
            if len(nodes) == bound:
                victim = policy.evict()
                assert slow.evict() == victim.hash
                del nodes[victim.hash]
                evictions += 1
            nodes[key] = Node(key, 1)
            policy.insert(nodes[key])
            slow.insert(key)
        if rng.random() < 0.02:
            policy.validate()
            assert sorted(node.hash for node in policy.nodes()) == sorted(nodes)
    return evictions


@pytest.mark.parametrize("name", PAIRS)
@settings(max_examples=25)
@given(bound=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_a_policy_evicts_what_its_slow_twin_evicts(name, bound, seed):
    """Call by call over mixed traffic, long enough for periods of counting to end and for rules to change."""
    policy, slow = PAIRS[name]
    assert replay(policy(), slow(), bound, random.Random(seed)) > 0


@settings(max_examples=40)
@given(st.integers(2, 20), st.integers(0, 2**32))
def test_frequencies_tell_exact_counts_where_no_keys_share_counters(bound, seed):
    """Beside a dict of counts that are halved every ten accesses for each node, from the first eviction on."""
    frequencies = Frequencies()
    nodes: dict[int, Node] = {}
    exact: dict[int, int] = {}
    has_evicted = False
    accesses = 0
    rng = random.Random(seed)
    numbers = [number for _ in range(60) for number in [rng.randrange(41)] * rng.randrange(30)]
    for key in map(spread, numbers):
        if key not in nodes and len(nodes) == bound:
            has_evicted = True
            frequencies.fit(bound)
            frequencies.leave(nodes.pop(next(iter(nodes))))
        accesses += has_evicted
        if accesses == 10 * bound:
            accesses = 0
            exact = {other: count // 2 for other, count in exact.items()}
        exact[key] = min(exact.get(key, 0) + 1, 15)
        if key in nodes:
            frequencies.hit(nodes[key])
        else:
            nodes[key] = Node(key, 1)
            frequencies.arrive(nodes[key])
        for other, count in exact.items():
            assert count == (frequencies.of(nodes[other]) if other in nodes else frequencies.estimate(other))
