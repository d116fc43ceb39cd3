"""Which shard a slot gets: weighted rendezvous hashing.

Every (slot, shard) pair draws a score and the slot goes to the shard with the best one. Intuition: a raffle in which
a shard of weight 2 holds two tickets; who joins or leaves only takes or gives back its own prizes, so nothing else
moves. Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998; the weights are the
logarithmic method of Schindelhauer and Schomaker, "Weighted Distributed Hash Tables", 2005.
"""

import math
from collections.abc import Mapping

from headrace.database.placement.postgres_hash import hash_bytes


def place(slots: int, weights: Mapping[str, float]) -> tuple[str, ...]:
    """The shard of each slot, deterministic in the names and weights alone."""
    names = sorted(weights)
    return tuple(max(names, key=lambda name: _score(slot, name, weights[name])) for slot in range(slots))


def _score(slot: int, name: str, weight: float) -> float:
    draw = (hash_bytes(f"{slot}/{name}".encode()) + 1) / 2**64
    return -weight / math.log(draw) if draw < 1 else math.inf
