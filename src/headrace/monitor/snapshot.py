"""What is true now: the one frozen picture that the dashboard, `headrace top`, the rules and the forecast read.

`None` always means "not enough data to say", never zero. Rates are per second over `interval_s`; `at` is wall time
because a snapshot leaves the process.
"""

import msgspec


class Latency(msgspec.Struct, frozen=True):
    """Response times over the window, in milliseconds. A p-quantile is None below 10 / (1 - q) samples."""

    count: int
    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    over_100_ms: int = 0
    """Exact, like the three below: how many took longer than the promise that the name carries."""
    over_200_ms: int = 0
    over_500_ms: int = 0
    over_1000_ms: int = 0


class Endpoint(msgspec.Struct, frozen=True):
    """One route and method over the window."""

    method: str
    route: str
    requests_per_s: float
    errors_per_s: float
    """Answers of 500 and above."""
    total_s: float
    """Time spent answering it within the window: what to optimise first."""
    latency: Latency


class Tier(msgspec.Struct, frozen=True):
    """One cache tier over the window, over all workers."""

    tier: str
    """`memory` or `remote`."""
    hits_per_s: float
    misses_per_s: float
    hit_rate: float | None
    entries: int | None
    available: bool


class Agents(msgspec.Struct, frozen=True):
    """Agent executions over the window, over all workers."""

    running: int
    started_per_s: float
    completed_per_s: float
    failed_per_s: float
    timeouts_per_s: float
    run_latency: Latency


class Worker(msgspec.Struct, frozen=True):
    """One serving process."""

    slot: int
    pid: int
    started_at: float
    requests_per_s: float
    cpu_percent: float | None
    """Of one core; 100 means one core busy."""
    memory_bytes: int | None
    """Resident set size."""
    loop_lag_ms: float | None
    """How late the event loop woke, at worst, within the window."""


class Host(msgspec.Struct, frozen=True):
    """The machine or container, read from cgroup v2 first."""

    cpu_percent: float | None
    """Of all CPUs that we may use."""
    cpus: float
    memory_bytes: int | None
    memory_bytes_max: int | None
    disk_read_bytes_per_s: float | None
    disk_write_bytes_per_s: float | None
    network_received_bytes_per_s: float | None
    network_sent_bytes_per_s: float | None
    cpu_throttled_ratio: float | None = None
    """Share of the scheduler's periods in which a CPU quota held us back; None without a quota."""


class Snapshot(msgspec.Struct, frozen=True):
    """Everything that is known of the last `interval_s` seconds, over all processes."""

    at: float
    interval_s: float
    requests_per_s: float
    errors_per_s: float
    error_rate: float | None
    """Share of answers of 500 and above, 0 to 1."""
    connections: int
    """Requests in flight now."""
    latency: Latency
    endpoints: tuple[Endpoint, ...]
    """By `total_s`, largest first."""
    tiers: tuple[Tier, ...]
    agents: Agents
    workers: tuple[Worker, ...]
    host: Host


class Point(msgspec.Struct, frozen=True):
    """One step of the history: what the charts draw."""

    at: float
    requests_per_s: float
    errors_per_s: float
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    hit_rate: float | None
    cpu_percent: float | None
    memory_bytes: int | None
    executions_per_s: float


class Summary(msgspec.Struct, frozen=True):
    """What happened in the last minutes, over all processes that lived in them."""

    at: float
    minutes: int
    """As asked for."""
    covered_s: float
    """How much of that time was really watched: less after a start or a gap."""
    requests: int
    errors: int
    """Answers of 500 and above."""
    error_rate: float | None
    latency: Latency
    hit_rate: float | None
    """Of the whole cache: a lookup is a hit when any tier had it."""
    executions: int
    cpu_percent_mean: float | None
    cpu_percent_max: float | None
    memory_bytes_mean: int | None
    memory_bytes_max: int | None
    endpoints: tuple[Endpoint, ...]
    """By `total_s`, largest first; kept by the minute for an hour."""
