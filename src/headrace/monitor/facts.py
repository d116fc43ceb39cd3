"""Counts the facts that the rooms report."""

from headrace.events import Event, ExecutionFinished, TierRecovered, TierUnavailable
from headrace.monitor.catalogue import CACHE_AVAILABLE, EVENTS, EXECUTION_DURATION, EXECUTIONS
from headrace.monitor.counters import Counter, Counters


class FactCounter:
    """An observer that turns facts into counters: by type, and executions and cache tiers by what they say."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._by_type: dict[type[Event], Counter] = {}
        self._by_status: dict[str, Counter] = {}
        self._run_duration = counters.histogram(EXECUTION_DURATION)

    def on(self, event: Event) -> None:
        """Count one fact."""
        kind = type(event)
        counter = self._by_type.get(kind)
        if counter is None:
            counter = self._by_type[kind] = self._counters.counter(EVENTS, type=kind.__name__)
        counter.add()
        match event:
            case ExecutionFinished(status=status, run_ms=run_ms):
                ended = self._by_status.get(status)
                if ended is None:
                    ended = self._by_status[status] = self._counters.counter(EXECUTIONS, status=status)
                ended.add()
                self._run_duration.record(run_ms / 1e3)
            case TierUnavailable(tier=tier):
                self._counters.gauge(CACHE_AVAILABLE, tier=tier).set(0.0)
            case TierRecovered(tier=tier):
                self._counters.gauge(CACHE_AVAILABLE, tier=tier).set(1.0)
            case _:
                return
