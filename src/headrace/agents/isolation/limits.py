"""What a worker may use."""

from dataclasses import dataclass

from headrace.errors import ConfigError

_MAY_BE_ZERO = {"scratch_bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one worker: one process that runs one version of one agent of one tenant."""

    memory_bytes: int = 256 << 20
    """Address space beyond what the interpreter has at its start; an allocation above it is a MemoryError."""
    cpu_s: float = 600.0
    """CPU time in the whole life of a worker. The kernel kills it there; at half of it, it is replaced in peace."""
    step_s: float = 2.0
    """Longest that an asynchronous agent may keep the worker's event loop to itself before the worker is killed."""
    files: int = 64
    """Open descriptors."""
    processes: int = 64
    """Threads. A worker can start no process, whatever this says."""
    threads: int = 16
    """Synchronous `execute` methods at once in one worker."""
    output_bytes: int = 1 << 20
    """Largest result, as JSON; a larger one fails the execution."""
    printed_bytes: int = 64 << 10
    """What is kept of an execution's stdout and stderr, together; the rest is counted and dropped."""
    scratch_bytes: int = 0
    """Size of a private TMPDIR in memory; 0: the agent can write no file at all."""
    concurrent: int = 64
    """Executions at once in one worker; above it another worker starts."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing could run under."""
        for name in self.__slots__:
            value = getattr(self, name)
            if value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
                raise ConfigError(f"Limits.{name} is {value}; it must be above 0.")
        if self.processes <= self.threads:
            raise ConfigError(
                f"Limits.processes ({self.processes}) must be above Limits.threads ({self.threads}).",
                fix="The worker itself is one of its processes: raise `processes` or lower `threads`.",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class IsolationConfig:
    """What the pool of one host process may do."""

    workers_max: int = 256
    """Workers at once, those that wait for their first agent included."""
    workers_per_agent_max: int = 4
    """Workers at once of one tenant's version of one agent."""
    workers_per_tenant_max: int = 128
    """Workers at once of one tenant, so that a busy one leaves some to others."""
    warm_min: int = 1
    """Hardened workers without an agent that are kept ready when nothing arrives."""
    warm_max: int = 8
    """Most of them, however many agents arrive."""
    warm_horizon_s: float = 0.25
    """The warm workers cover the arrivals that are expected within this time."""
    idle_s: float = 60.0
    """A worker without an execution for this long is retired."""
    calls_max: int = 100_000
    """Executions after which a worker is replaced."""
    age_s: float = 3600.0
    """Age at which a worker is replaced."""
    resident_bytes_max: int = 384 << 20
    """Resident memory at which a worker is replaced."""
    source_bytes_max: int = 1 << 20
    """Largest source."""
    input_bytes_max: int = 16 << 20
    """Largest input, as JSON."""
    start_timeout_s: float = 5.0
    """Longest from the request for a worker to its report that it is hardened."""
    load_timeout_s: float = 10.0
    """Longest that the top level of a source and its hooks may take."""
    cancel_grace_s: float = 0.5
    """How long an execution may take to stop when it is told to, before its worker is killed."""
    watch_s: float = 0.1
    """How often busy workers are looked at for a step that does not end."""
    zygote_backoff_first_s: float = 0.05
    """Wait before a zygote that died is started again; doubled each time, up to `zygote_backoff_max_s`."""
    zygote_backoff_max_s: float = 5.0
    """Longest such wait."""
    preload: tuple[str, ...] = (
        "asyncio", "base64", "collections", "contextlib", "dataclasses", "datetime", "decimal", "enum", "functools",
        "hashlib", "itertools", "json", "logging", "math", "random", "re", "statistics", "string", "typing", "uuid",
    )  # fmt: skip
    """Modules that every worker has from its start; an agent that imports one pays nothing."""
    readable: tuple[str, ...] = ()
    """Directories that agents may read besides the standard library, site-packages and the system's libraries."""

    def __post_init__(self) -> None:
        """Refuse what nothing could meet."""
        for name in self.__slots__:
            value = getattr(self, name)
            if isinstance(value, int | float) and (value < 0 or (value == 0 and name != "warm_min")):
                raise ConfigError(f"IsolationConfig.{name} is {value}; it must be above 0.")
        if self.warm_min > self.warm_max or self.warm_max >= self.workers_max:
            raise ConfigError(
                f"IsolationConfig needs warm_min ({self.warm_min}) <= warm_max ({self.warm_max}) < workers_max "
                f"({self.workers_max})."
            )
