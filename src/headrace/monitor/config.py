"""How the monitor looks, how long it remembers, and what it may cost."""

from dataclasses import dataclass

from headrace.errors import ConfigError
from headrace.monitor.slots import SLOT_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class MonitorConfig:
    """The options of `Monitor`.

    With the defaults a full history takes about 13 MB for thirty endpoints that answer within 1 ms to 1 s, and could
    not take more than 125 MB if every bucket of 200 endpoints were used in every step.
    """

    tick_s: float = 1.0
    """How often a process publishes its own gauges, and how often the folding one makes a new snapshot."""

    window_s: float = 10.0
    """What a snapshot looks back on. Longer: calmer, and quantiles from fewer requests a second; shorter: faster."""

    step_s: float = 5.0
    """The length of one step of the history."""

    steps_max: int = 720
    """How many steps are kept: an hour."""

    minutes_max: int = 1_440
    """How many one-minute steps are kept: a day."""

    five_minutes_max: int = 8_064
    """How many five-minute steps are kept: 28 days."""

    endpoint_minutes_max: int = 60
    """For how many minutes the response times of each endpoint are kept."""

    summary_minutes: tuple[int, ...] = (5, 15, 60)
    """The summaries that the folding process publishes for the others."""

    endpoints_max: int = 200
    """Method and route pairs that get a histogram of their own in each process; the rest share the route "(other)"."""

    loop_probe_s: float = 0.1
    """How often the event loop's lateness is measured; a stall shorter than this may go unseen."""

    slots: int = 64
    """How many processes may count at once."""

    slot_bytes: int = SLOT_BYTES
    """How much memory and disk one process's counters may take."""

    def __post_init__(self) -> None:
        for name in ("tick_s", "window_s", "step_s", "loop_probe_s"):
            _require(getattr(self, name) > 0.0, f"monitor.{name} is {getattr(self, name)}; it must be above 0.")
        _require(
            self.tick_s <= self.step_s <= 60.0,
            f"monitor.step_s is {self.step_s}; it must lie between tick_s ({self.tick_s}) and 60.",
        )
        _require(
            self.window_s >= self.tick_s,
            f"monitor.window_s is {self.window_s}; it must be at least tick_s ({self.tick_s}).",
        )
        for name in ("steps_max", "minutes_max", "five_minutes_max", "endpoint_minutes_max", "endpoints_max", "slots"):
            _require(getattr(self, name) >= 1, f"monitor.{name} is {getattr(self, name)}; it must be at least 1.")
        _require(
            all(minutes >= 1 for minutes in self.summary_minutes),
            f"monitor.summary_minutes is {self.summary_minutes}; each must be at least 1.",
        )


def _require(holds: bool, message: str) -> None:  # noqa: FBT001 - the condition is the whole point
    if not holds:
        raise ConfigError(message)


DEFAULTS = MonitorConfig()
