"""What a benchmark is, and what it hands back."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum
from statistics import median

from headrace.cli.bench.context import Context
from headrace.cli.bench.targets import Target

FAILED_SHARE_MAX = 0.005
"""A latency of answers that one request in two hundred never got is not a latency: the target counts as missed."""


class State(StrEnum):
    """What can be said of a target after measuring."""

    MET = "met"
    MISSED = "missed"
    GENERATOR_BOUND = "generator-bound"
    """Not met, but the load generator itself fell behind: the server may not be to blame."""
    NOT_MEASURED = "not measured"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One target in one case, measured once a round."""

    target: Target
    """The promise that this is compared with."""
    case: str
    """Under which circumstances."""
    values: tuple[float, ...]
    """One a round, in the target's unit; empty when it could not be measured."""
    note: str = ""
    """What a reader of the number has to know."""
    failed_share: float = 0.0
    """Requests that failed, of all requests behind the values, 0 to 1."""
    generator_bound: bool = False
    """Whether the load generator fell behind its own schedule so far that this may be why the target is not met."""

    @property
    def measured(self) -> float | None:
        """The median over the rounds."""
        return median(self.values) if self.values else None

    @property
    def spread(self) -> tuple[float, float] | None:
        """Lowest and highest round: with a handful of rounds, anything finer would be made up."""
        return (min(self.values), max(self.values)) if self.values else None

    @property
    def state(self) -> State:
        """The verdict. What holds although the generator was late would hold all the more if it had not been."""
        measured = self.measured
        if measured is None:
            return State.NOT_MEASURED
        if self.target.is_met_by(measured) and self.failed_share <= FAILED_SHARE_MAX:
            return State.MET
        return State.GENERATOR_BOUND if self.generator_bound else State.MISSED


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A benchmark: what it measures and how."""

    name: str
    """Unique; what `--only` takes."""
    group: str
    """Names several scenarios at once, for `--only` too."""
    title: str
    """One line for people."""
    targets: tuple[Target, ...]
    """The promises that its measurements are compared with."""
    run: Callable[[Context], Awaitable[list[Measurement]]]
    """Measures; HeadraceError when it cannot."""
