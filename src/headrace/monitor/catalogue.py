"""The names of all that headrace counts, what each means, and how the rooms name what they hand in."""

import re
from typing import Final, NamedTuple

from headrace.errors import CallerError
from headrace.monitor.slots import COUNTER, GAUGE, Series

HTTP_REQUESTS: Final = "headrace_http_requests_total"
HTTP_DURATION: Final = "headrace_http_request_duration_seconds"
EXECUTIONS: Final = "headrace_agent_executions_total"
EXECUTIONS_STARTED: Final = "headrace_agent_executions_started_total"
EXECUTIONS_RUNNING: Final = "headrace_agent_executions_running"
EXECUTION_DURATION: Final = "headrace_agent_execution_duration_seconds"
CACHE_HITS: Final = "headrace_cache_hits_total"
CACHE_MISSES: Final = "headrace_cache_misses_total"
CACHE_ENTRIES: Final = "headrace_cache_entries"
CACHE_AVAILABLE: Final = "headrace_cache_available"
EVENTS: Final = "headrace_events_total"
WORKER_START: Final = "headrace_worker_start_time_seconds"
WORKER_CPU: Final = "headrace_worker_cpu_ratio"
WORKER_MEMORY: Final = "headrace_worker_memory_bytes"
WORKER_LAG: Final = "headrace_worker_loop_lag_seconds"
WORKER_IN_FLIGHT: Final = "headrace_worker_requests_in_flight"
SERIES_REFUSED: Final = "headrace_series_refused_total"
PROCESSES_RETIRED: Final = "headrace_processes_retired_total"

OTHER: Final = "(other)"
"""The label of whatever would make the number of series unbounded."""

TIERS: Final = ("memory", "remote")

HELP: Final = {
    HTTP_REQUESTS: "HTTP requests answered, by status class.",
    HTTP_DURATION: "From the request's arrival in the application to the last part of its answer.",
    EXECUTIONS: "Agent executions that ended, by how they ended.",
    EXECUTIONS_STARTED: "Agent executions that began.",
    EXECUTIONS_RUNNING: "Agent executions that run now.",
    EXECUTION_DURATION: "How long agent executions ran, without their time in the queue.",
    CACHE_HITS: "Lookups that a cache tier answered.",
    CACHE_MISSES: "Lookups that a cache tier could not answer.",
    CACHE_ENTRIES: "Entries in a cache tier.",
    CACHE_AVAILABLE: "Whether a cache tier answers: 1 or 0.",
    EVENTS: "Facts that the rooms reported, by type.",
    WORKER_START: "When the process began to serve, in seconds since 1970.",
    WORKER_CPU: "CPU that the process used; 1 is one core busy.",
    WORKER_MEMORY: "Resident memory of the process.",
    WORKER_LAG: "How late the event loop woke, at worst, since the last tick.",
    WORKER_IN_FLIGHT: "HTTP requests that are being answered.",
    SERIES_REFUSED: 'Series that found no room; they count under the label overflow="true".',
    PROCESSES_RETIRED: "Processes that are gone and whose counts are kept.",
}


class Statistic(NamedTuple):
    """Where a number that a source hands in is kept."""

    kind: int
    series: Series


_SOURCES: Final = {
    **{f"{tier}_hits": Statistic(COUNTER, Series(CACHE_HITS, (("tier", tier),))) for tier in TIERS},
    **{f"{tier}_misses": Statistic(COUNTER, Series(CACHE_MISSES, (("tier", tier),))) for tier in TIERS},
    **{f"{tier}_entries": Statistic(GAUGE, Series(CACHE_ENTRIES, (("tier", tier),))) for tier in TIERS},
    "entries": Statistic(GAUGE, Series(CACHE_ENTRIES, (("tier", "memory"),))),
    "executions_running": Statistic(GAUGE, Series(EXECUTIONS_RUNNING)),
    "executions_started": Statistic(COUNTER, Series(EXECUTIONS_STARTED)),
}
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,99}")


def statistic(key: str) -> Statistic:
    """What a source's key stands for.

    `memory_hits`, `remote_misses`, `entries`, `executions_running` and their like have a meaning of their own; any
    other `<name>_total` becomes the counter `headrace_<name>_total` and any other name a gauge.
    """
    known = _SOURCES.get(key)
    if known is not None:
        return known
    if not _NAME.fullmatch(key):
        raise CallerError(
            f"A source handed in {key!r}, which cannot be the name of a metric.",
            fix="Use small letters, digits and underscores, at most 100.",
        )
    return Statistic(COUNTER if key.endswith("_total") else GAUGE, Series(f"headrace_{key}"))
