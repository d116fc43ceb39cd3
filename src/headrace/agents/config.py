"""What the agent room can be told."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from headrace.agents.isolation.limits import IsolationConfig, Limits
from headrace.errors import ConfigError

MiB = 1 << 20
Priority = Literal["low", "normal", "high"]
Isolation = Literal["trusted", "process"]
"""Where a version runs: in the host, or in processes without rights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierConfig:
    """What the tenants of one service tier may do."""

    name: str
    """How tenants refer to it."""
    executions_max: int
    """Executions at once over all nodes; each enforces its share."""
    executions_per_day: int | None = None
    """Executions between two midnights UTC; None: unlimited."""
    rate_per_s: float | None = None
    """Requests a second on each node, after a burst; None: unlimited."""
    burst: int = 20
    """Requests that may come at once before `rate_per_s` holds."""
    queued_max: int = 10_000
    """Submitted executions that may wait."""
    priority_max: Priority = "high"
    """The most urgent priority; a higher one counts as this."""

    def __post_init__(self) -> None:
        """Refuse a tier that nobody could use."""
        for name in ("executions_max", "executions_per_day", "rate_per_s", "burst", "queued_max"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"agents.tiers: {name} of {self.name!r} is {value}; it must be above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantConfig:
    """A tenant that is known by name."""

    name: str
    """As calls name it."""
    tier: str | None = None
    """One of `agents.tiers`; None: `agents.tier_default`."""
    callback_key: str | None = field(default=None, repr=False)
    """Signs its callbacks; None: `agents.callback_key`."""


TIERS = (
    TierConfig(
        name="developer",
        executions_max=10,
        executions_per_day=1_000,
        rate_per_s=10,
        queued_max=1_000,
        priority_max="normal",
    ),
    TierConfig(name="professional", executions_max=100, executions_per_day=10_000, rate_per_s=100, burst=200),
    TierConfig(name="enterprise", executions_max=500, executions_per_day=50_000, rate_per_s=500, burst=1_000),
    TierConfig(name="enterprise plus", executions_max=1_000, queued_max=100_000),
)

LIMITS_MAX = Limits(
    memory_bytes=1 << 30,
    cpu_s=3600.0,
    step_s=10.0,
    files=256,
    processes=256,
    threads=64,
    output_bytes=16 * MiB,
    printed_bytes=MiB,
    scratch_bytes=256 * MiB,
    concurrent=256,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentsConfig:
    """Limits of one process that hosts agents."""

    source_bytes_max: int = MiB
    """Largest source that can be deployed."""
    output_bytes_max: int = MiB
    """Largest output, as JSON; a larger one fails the execution."""
    executions_max: int = 10_000
    """Executions at once in one process.

    The last 5 % are kept for `high` priority, the last 20 % not given to `low`.
    """
    threads_max: int = 32
    """Synchronous `execute` methods at once in one process."""
    timeout_s: float = 30.0
    """Longest run when neither the call nor the deployment says another."""
    timeout_max_s: float = 600.0
    """Longest run that a call or a deployment may ask for."""
    cancel_grace_s: float = 1.0
    """How long an agent may take to stop after its deadline before it is reported and left behind."""
    drain_s: float = 3.0
    """How long a stopping host lets executions end by themselves before it interrupts them."""
    step_max_s: float = 1.0
    """How long an agent may hold the event loop at a time, where the guard is armed; then it is interrupted."""
    step_strikes_max: int = 3
    """Interruptions after which a version of an agent is executed no more."""
    load_timeout_s: float = 10.0
    """Longest time that a source may take to load."""
    health_timeout_s: float = 10.0
    """Longest time that an agent's `start`, `check`, `get_capabilities` or `stop` may take."""
    journal_batch_max: int = 500
    """Executions written in one transaction."""
    journal_retry_s: float = 8.0
    """How long a finished execution waits for a dead shard before its caller gets the error."""
    definitions_max: int = 1_000
    """Loaded definitions kept in memory; the least recently used one goes first."""
    code_directory: Path | None = None
    """Where compiled code outlives the process; None: it is kept in memory alone, and `headrace up` puts it below its
    data."""
    code_bytes_max: int = 64 * MiB
    """Compiled code in memory; in the directory four times as much."""
    isolation_default: Isolation = "trusted"
    """Where a version runs whose deployment does not say it."""
    trusted_allowed: bool = True
    """Whether versions may run in the host. If not, none is deployed or loaded there, whoever deploys it or did."""
    isolation: IsolationConfig = field(default_factory=IsolationConfig)
    """The pool of isolated workers."""
    limits: Limits = field(default_factory=Limits)
    """Limits of a worker whose deployment asks for none."""
    limits_max: Limits = field(default_factory=lambda: LIMITS_MAX)
    """The most that a deployment may ask for."""
    node_lease_s: float = 10.0
    """A process that has not been heard of for so long is dead: its executions go to others. Renewed five times as
    often."""
    queue_batch_max: int = 200
    """Queued executions that a process takes at once."""
    queue_poll_s: float = 1.0
    """Longest time until an idle process sees what another one put into the queue."""
    queued_max: int = 100_000
    """Queued executions of one tenant."""
    ageing_s: float = 60.0
    """How much longer than a `high` one a `normal` execution has to wait to go first; a `low` one twice that."""
    retry_first_s: float = 0.5
    """Upper limit of the wait before the second attempt of an idempotent execution; it doubles with each attempt."""
    retry_max_s: float = 60.0
    """Upper limit of that wait."""
    attempts_max: int = 10
    """Most attempts that a deployment may ask for."""
    canary_runs_min: int = 20
    """Runs of a canary before it is judged."""
    canary_failure_margin: float = 0.02
    """How much higher a canary's failure rate may surely be than that of the version in service."""
    canary_slowdown_max: float = 1.5
    """How many times the 95th percentile of the version in service a canary's may surely be."""
    events_max: int = 256
    """Emitted events of one execution that are kept for readers; the oldest go first."""
    events_bytes_max: int = MiB
    """Their bytes, as JSON."""
    event_bytes_max: int = 64 * 1024
    """Largest emitted event, as JSON."""
    state_bytes_max: int = MiB
    """Largest state of one agent instance, as JSON."""
    state_idle_s: float = 60.0
    """How long the state of an instance that does nothing stays in memory."""
    state_turns_max: int = 1_000
    """Executions that may wait for their turn at one instance."""
    executions_kept_s: float = 30 * 86_400.0
    """How long a finished execution can be asked for, and its id is an idempotency key."""
    callback_key: str | None = field(default=None, repr=False)
    """Signs callbacks (HMAC-SHA256) of tenants without a key of their own; without any there are no callbacks."""
    callback_private: bool = False
    """Whether callbacks may go to private addresses and plain http beyond this machine's loopback."""
    callback_timeout_s: float = 10.0
    """Longest time that a receiver of a callback may take."""
    callback_attempts_max: int = 8
    """How often a callback is tried."""
    tiers: tuple[TierConfig, ...] = TIERS
    """The service tiers."""
    tier_default: str | None = None
    """The tier of tenants that have none; None: no limits but those of the process."""
    tenants: tuple[TenantConfig, ...] = ()
    """Tenants with a tier or a key of their own."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing could meet."""
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ConfigError(f"agents.{name} is {value}; it must be above 0.")
        if self.timeout_s > self.timeout_max_s:
            raise ConfigError(
                f"agents.timeout_s ({self.timeout_s:g}) is above agents.timeout_max_s ({self.timeout_max_s:g}).",
                fix="Raise timeout_max_s or lower timeout_s.",
            )
        if self.isolation_default == "trusted" and not self.trusted_allowed:
            raise ConfigError(
                "agents.trusted_allowed is false, but agents.isolation_default is 'trusted'.",
                fix="Set agents.isolation_default = 'process'.",
            )
        for each in fields(Limits):
            value, most = getattr(self.limits, each.name), getattr(self.limits_max, each.name)
            if value > most:
                raise ConfigError(f"agents.limits.{each.name} ({value:,}) is above agents.limits_max ({most:,}).")
        known = {tier.name for tier in self.tiers}
        wanted = {tenant.tier for tenant in self.tenants} | {self.tier_default}
        for name in sorted(tier for tier in wanted if tier is not None):
            if name not in known:
                raise ConfigError(f"agents: there is no tier {name!r}; there are {', '.join(sorted(known))}.")
