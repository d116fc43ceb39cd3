"""How large the window of W-TinyLFU should be."""

import math
from typing import Final

SHARE_FIRST: Final = 0.01
SHARE_MAX: Final = 0.80
STEP: Final = 0.0625
RESTART: Final = 0.05
"""A change of the hit rate between two samples that means: other traffic, search again."""
REACTIVE_MAX: Final = 4096
"""Nodes up to which samples are compared with each other; beyond, window and main part are compared within one."""
DENSITY_GAIN: Final = 0.03
DENSITY_STEP_MAX: Final = 0.30
DENSITY_FLOOR: Final = 0.02


class Climber:
    """Moves the share of the window towards more hits, from the hits alone.

    A small cache climbs reactively: on while the hit rate rises, back when it falls, in steps that shrink until the
    traffic changes. A large one has hits enough to compare, within one sample, the hits per unit of room in the window
    and in the main part, and gives room to the denser; the ups and downs of the traffic cancel out. Both laws and
    their constants are those of Caffeine's WindowClimber (its probes and audits are left out: the adaptive policy
    compares whole policies instead).
    """

    __slots__ = ("_main_hits", "_misses", "_rate", "_step", "_window_hits", "share")

    def __init__(self) -> None:
        self.share = SHARE_FIRST
        self._window_hits = 0
        self._main_hits = 0
        self._misses = 0
        self._rate = 0.0
        self._step = STEP

    def hit(self, *, in_window: bool) -> None:
        """Note a hit and where it was."""
        if in_window:
            self._window_hits += 1
        else:
            self._main_hits += 1

    def miss(self) -> None:
        """Note a miss."""
        self._misses += 1

    def climb(self, nodes: int) -> None:
        """Move `share` if a sample is complete; for a cache that is full with so many nodes."""
        hits = self._window_hits + self._main_hits
        reactive = nodes <= REACTIVE_MAX
        if hits + self._misses < nodes * (10 if reactive else 4):
            return
        if reactive:
            self._climb_by_rate(hits / (hits + self._misses), nodes)
        else:
            self._climb_by_density()
        self._window_hits = 0
        self._main_hits = 0
        self._misses = 0

    def _climb_by_rate(self, rate: float, nodes: int) -> None:
        change = rate - self._rate
        self._rate = rate
        step = self._step if change >= 0.0 else -self._step
        self.share = min(max(self.share + step, SHARE_FIRST), SHARE_MAX)
        if abs(change) >= RESTART:
            self._step = STEP if step >= 0.0 else -STEP
        else:
            self._step = step * (0.995 if nodes <= 512 else 0.98)

    def _climb_by_density(self) -> None:
        window = (self._window_hits + 1) / self.share
        main = (self._main_hits + 1) / (1.0 - self.share)
        error = math.log(window / main)
        step = min(DENSITY_STEP_MAX, abs(error) * DENSITY_GAIN)
        self.share = min(max(self.share + (step if error >= 0.0 else -step), DENSITY_FLOOR), SHARE_MAX)
