"""What can be asked of index advice."""

from dataclasses import dataclass

from headrace.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """Where advice on indexes comes from, and how it is tried."""

    sample_every: int = 16
    """One in so many statements of this process is timed and remembered with its parameters, for servers without
    pg_stat_statements; 0: none."""
    statements_max: int = 500
    """Statements that are remembered so; those seen longest ago go first."""
    measure_timeout_s: float = 10.0
    """Longest run of one statement while an index is tried."""

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if self.sample_every < 0:
            raise ConfigError(f"database.indexes.sample_every is {self.sample_every}; it must be 0 or more.")
        for name in ("statements_max", "measure_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"database.indexes.{name} is {getattr(self, name)}; it must be above 0.")
