"""What the agent room can be told."""

from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentsConfig:
    """Limits of one process that hosts agents."""

    source_bytes_max: int = 1 << 20
    """Largest source that can be deployed."""
    output_bytes_max: int = 1 << 20
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
    load_timeout_s: float = 10.0
    """Longest time that a source may take to load."""
    lease_grace_s: float = 30.0
    """How long after its deadline an unfinished execution is given up as interrupted."""
    journal_batch_max: int = 500
    """Executions written in one transaction."""
    journal_retry_s: float = 8.0
    """How long a finished execution waits for a dead shard before its caller gets the error."""
    definitions_max: int = 1_000
    """Loaded definitions kept in memory; the least recently used one goes first."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing could meet."""
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigError(f"agents.{name} is {getattr(self, name)}; it must be above 0.")
        if self.timeout_s > self.timeout_max_s:
            raise ConfigError(
                f"agents.timeout_s ({self.timeout_s:g}) is above agents.timeout_max_s ({self.timeout_max_s:g}).",
                fix="Raise timeout_max_s or lower timeout_s.",
            )
