"""What the system may do to itself, as frozen decisions.

Rules, forecasts and people write the same `Action`; `headrace.app` carries it out in one `match` statement.
"""

import msgspec


class Action(msgspec.Struct, frozen=True, tag=True):
    """A decision, not yet carried out."""


class ScaleWorkers(Action, frozen=True):
    """Serve HTTP with this many worker processes."""

    workers: int


class ResizeMemory(Action, frozen=True):
    """Let the in-memory tier hold at most this many entries."""

    entries_max: int


class ClearCache(Action, frozen=True):
    """Forget every entry of the cache's namespace, in both tiers."""


class RollbackAgent(Action, frozen=True):
    """Put an earlier version of an agent back into service."""

    agent_id: str
    version: str
