"""The promises that headrace is measured against: floors, every one of them. What is better is in the results."""

from dataclasses import dataclass
from enum import StrEnum


class Direction(StrEnum):
    """Which side of its limit a measured value has to be on."""

    BELOW = "below"
    AT_LEAST = "at least"


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One promise with a number."""

    name: str
    """Stable, for programs that read the JSON."""
    title: str
    """For people."""
    limit: float
    """In `unit`."""
    unit: str
    """Unit of `limit` and of everything that is compared with it."""
    direction: Direction
    """Below the limit, or at least the limit."""

    def is_met_by(self, value: float) -> bool:
        """Whether `value`, in `unit`, keeps the promise."""
        return value < self.limit if self.direction is Direction.BELOW else value >= self.limit


def _below(name: str, title: str, limit: float, unit: str) -> Target:
    return Target(name=name, title=title, limit=limit, unit=unit, direction=Direction.BELOW)


def _at_least(name: str, title: str, limit: float, unit: str) -> Target:
    return Target(name=name, title=title, limit=limit, unit=unit, direction=Direction.AT_LEAST)


API_P50 = _below("api-p50", "API response time, p50", 100, "ms")
API_P95 = _below("api-p95", "API response time, p95", 200, "ms")
API_P99 = _below("api-p99", "API response time, p99", 500, "ms")
API_P999 = _below("api-p99.9", "API response time, p99.9", 1000, "ms")
API_PEAK = _at_least("api-peak", "API throughput, peak", 10_000, "/s")
API_SUSTAINED = _at_least("api-sustained", "API throughput, sustained", 5_000, "/s")
AGENT_COLD = _below("agent-cold", "agent start, cold", 2_000, "ms")
AGENT_WARM = _below("agent-warm", "agent start, warm", 100, "ms")
SERVER_MEMORY = _below("server-memory", "API server memory, one instance", 2.0, "GB")

TARGETS = (
    API_P50,
    API_P95,
    API_P99,
    API_P999,
    API_PEAK,
    API_SUSTAINED,
    AGENT_COLD,
    AGENT_WARM,
    _at_least("agent-executions", "agent executions at once", 50_000, ""),
    _at_least("agent-instantiation", "agent instantiation", 1_000, "/s"),
    _below("agent-memory", "memory of one agent", 6.5, "KB"),
    _below("database-simple", "database query, simple", 10, "ms"),
    _below("database-complex", "database query, complex", 100, "ms"),
    _below("database-analytics", "database query, analytics", 1_000, "ms"),
    _at_least("database-reads", "database reads", 100_000, "/s"),
    _at_least("database-writes", "database writes", 10_000, "/s"),
    SERVER_MEMORY,
    _below("database-memory", "database memory, of what it was given", 80, "%"),
    _below("cpu-normal", "CPU in normal load", 60, "%"),
    _below("cpu-peak", "CPU at peak", 80, "%"),
    _below("network-bandwidth", "network bandwidth used", 70, "%"),
    _at_least("pool-efficiency", "connection pool efficiency", 90, "%"),
)
