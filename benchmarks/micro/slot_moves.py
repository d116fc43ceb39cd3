"""How many slots move when the shards change, and how even the shards are: our planner, its peers, and the minimum.

    python -m benchmarks.micro.slot_moves

The minimum is the least number of moves to any placement in which every shard has its exact share, rounded down or up.
A peer that moves fewer has left the shares uneven: `worst` is the fullest shard's part above its share.
"""

import hashlib
import math
from bisect import bisect
from collections.abc import Mapping, Sequence

from headrace.clock import SystemClock
from headrace.database.placement.quotas import place, replace_slots

SLOTS = 4096
VIRTUAL_NODES = 100
Weights = Mapping[str, float]


def even(count: int) -> dict[str, float]:
    return {f"shard-{number:02}": 1.0 for number in range(count)}


CHANGES: list[tuple[str, Weights, Weights]] = [
    ("2 to 3 shards", even(2), even(3)),
    ("4 to 5 shards", even(4), even(5)),
    ("16 to 17 shards", even(16), even(17)),
    ("4 shards, one more of weight 2", even(4), {**even(4), "big": 2.0}),
    ("5 to 4 shards", even(5), even(4)),
    ("4 shards, one of weight 1 to 3", even(4), {**even(4), "shard-03": 3.0}),
]


def score(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def rendezvous(weights: Weights) -> tuple[str, ...]:
    """Weighted rendezvous hashing, by the logarithmic method."""

    def draw(slot: int, name: str) -> float:
        return -weights[name] / math.log((score(f"{slot}/{name}") + 1) / (2**64 + 1))

    return tuple(max(weights, key=lambda name: draw(slot, name)) for slot in range(SLOTS))


def ring(weights: Weights) -> tuple[str, ...]:
    """A consistent ring, a hundred virtual nodes for each unit of weight."""
    points = sorted(
        (score(f"{name}#{n}"), name) for name in weights for n in range(round(VIRTUAL_NODES * weights[name]))
    )
    starts = [point for point, _ in points]
    return tuple(points[bisect(starts, score(f"slot {slot}")) % len(points)][1] for slot in range(SLOTS))


def modulo(weights: Weights) -> tuple[str, ...]:
    """The slot's number, divided by the number of tickets."""
    tickets = [name for name in weights for _ in range(round(weights[name]))]
    return tuple(tickets[slot % len(tickets)] for slot in range(SLOTS))


def moved(before: Sequence[str], after: Sequence[str]) -> int:
    return sum(one != other for one, other in zip(before, after, strict=True))


def worst(shards: Sequence[str], weights: Weights) -> float:
    total = sum(weights.values())
    return max(shards.count(name) / (SLOTS * weights[name] / total) for name in weights) - 1


def minimum(before: Sequence[str], weights: Weights) -> int:
    total = sum(weights.values())
    held = {name: before.count(name) for name in {*weights, *before}}
    shares = {name: SLOTS * weights.get(name, 0.0) / total for name in held}
    missing = sum(max(0, math.floor(shares[name]) - held[name]) for name in held)
    return max(missing, sum(max(0, held[name] - math.ceil(shares[name])) for name in held))


def main() -> None:
    now = SystemClock.monotonic
    print("| change | minimum | headrace | worst | rendezvous | worst | ring | worst | modulo |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|")
    for name, before, after in CHANGES:
        first = place(SLOTS, before)
        ours = replace_slots(first, after)
        assert all(abs(ours.count(each) - SLOTS * after[each] / sum(after.values())) < 1 for each in after)
        cells = [str(minimum(first, after)), str(moved(first, ours)), f"{worst(ours, after):.1%}"]
        for peer in (rendezvous, ring):
            theirs = peer(after)
            cells += [str(moved(peer(before), theirs)), f"{worst(theirs, after):.1%}"]
        print(f"| {name} | {' | '.join(cells)} | {moved(modulo(before), modulo(after))} |")
    started = now()
    replace_slots(place(SLOTS, even(16)), even(17))
    print(f"\n{SLOTS} slots; planning 16 to 17 shards took {(now() - started) * 1000:.1f} ms")


if __name__ == "__main__":
    main()
