"""The monitor: counts in every process, sees all of them, and remembers.

It stands beside the database and above the cache and imports neither: they hand their facts to an `Observer` and their
statistics to a source.
"""

from headrace.monitor.config import MonitorConfig
from headrace.monitor.counters import Counter, Counters, Gauge
from headrace.monitor.histogram import Distribution, Histogram
from headrace.monitor.monitor import Monitor
from headrace.monitor.publication import SnapshotFile
from headrace.monitor.slots import Folded, Series
from headrace.monitor.snapshot import Point, Snapshot, Summary

__all__ = [
    "Counter",
    "Counters",
    "Distribution",
    "Folded",
    "Gauge",
    "Histogram",
    "Monitor",
    "MonitorConfig",
    "Point",
    "Series",
    "Snapshot",
    "SnapshotFile",
    "Summary",
]
