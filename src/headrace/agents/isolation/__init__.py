"""Agents that are not trusted: each runs in a process without rights, and nothing it does reaches its host."""

from headrace.agents.isolation.limits import IsolationConfig, Limits
from headrace.agents.isolation.pool import PoolStatistics, ProcessPool, WorkerKey
from headrace.agents.isolation.probe import Achievable, MissingPart, probe
from headrace.agents.isolation.running import ProcessOutcome, Stopped

__all__ = [
    "Achievable",
    "IsolationConfig",
    "Limits",
    "MissingPart",
    "PoolStatistics",
    "ProcessOutcome",
    "ProcessPool",
    "Stopped",
    "WorkerKey",
    "probe",
]
