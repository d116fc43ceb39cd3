"""How many slots each shard gets, and which of them change hands: no more than must.

A shard's quota is its share of the slots, rounded down or up: the quota rule of apportionment. What is left over after
rounding down goes first to shards that hold it already, then to the largest remainders. So the number of moves is the
least with which any distribution within the quota rule can be reached, max(what is missing below the rounded-down
shares, what is held above the rounded-up ones); a ring or rendezvous hashing comes near it on average only, and leaves
shards of equal weight unequal.

Slots stay in runs where they can, because a run is a short row filter. Everything follows from the arguments, in exact
arithmetic, so every process plans the same.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

from headrace.errors import ConfigError


class Move(NamedTuple):
    """One slot that changes hands."""

    slot: int
    source: str
    target: str


def place(slots: int, weights: Mapping[str, float]) -> tuple[str, ...]:
    """The shard of each slot when nothing is placed yet: a run for each shard, in the order of their names."""
    counts = quotas(slots, weights, held={})
    return tuple(name for name in sorted(weights) for _ in range(counts[name]))


def replace_slots(current: Sequence[str], weights: Mapping[str, float]) -> tuple[str, ...]:
    """The shard of each slot after the least number of moves to the quotas of `weights`.

    A shard without a weight is drained.
    """
    held: dict[str, list[int]] = {}
    for slot, name in enumerate(current):
        held.setdefault(name, []).append(slot)
    counts = quotas(len(current), weights, held={name: len(numbers) for name, numbers in held.items()})
    given_up = sorted(slot for name, numbers in held.items() for slot in numbers[counts.get(name, 0) :])
    takers = (name for name in sorted(weights) for _ in range(counts[name] - len(held.get(name, ()))))
    shards = list(current)
    for slot, taker in zip(given_up, takers, strict=True):
        shards[slot] = taker
    return tuple(shards)


def moves(before: Sequence[str], after: Sequence[str]) -> tuple[Move, ...]:
    """What changes hands between two placements of the same slots."""
    return tuple(
        Move(slot, source, target)
        for slot, (source, target) in enumerate(zip(before, after, strict=True))
        if source != target
    )


def quotas(slots: int, weights: Mapping[str, float], *, held: Mapping[str, int]) -> dict[str, int]:
    """How many slots each shard gets; `held` is what they have now."""
    if not weights:
        raise ConfigError("There is no active shard to place slots on.", fix="Add one to [[database.shards]].")
    total = sum(map(Fraction, weights.values()))
    shares = {name: slots * Fraction(weight) / total for name, weight in weights.items()}
    counts = {name: int(share) for name, share in shares.items()}

    def claim(name: str) -> tuple[bool, Fraction, str]:
        return held.get(name, 0) <= counts[name], counts[name] - shares[name], name

    fractional = sorted((name for name in weights if shares[name] != counts[name]), key=claim)
    for name in fractional[: slots - sum(counts.values())]:
        counts[name] += 1
    return counts
