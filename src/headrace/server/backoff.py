"""How long to wait before a process that ended is started again. Pure."""

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Backoff:
    """At once after a good run, then twice as long each time it ends early, up to a limit."""

    first_s: float = 0.1
    limit_s: float = 5.0
    good_run_s: float = 10.0
    """A process that ran this long has shown that it works."""
    wait_s: float = 0.0
    """The wait that the last end earned."""

    def after(self, ran_s: float) -> "Backoff":
        """The back-off after a run of this length."""
        if ran_s >= self.good_run_s or self.wait_s == 0:
            return replace(self, wait_s=self.first_s)
        return replace(self, wait_s=min(self.wait_s * 2, self.limit_s))
