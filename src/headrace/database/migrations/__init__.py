"""Schema changes that run while the service runs."""

from headrace.database.migrations.migration import Migration, load_migrations, migrate, pending

__all__ = ["Migration", "load_migrations", "migrate", "pending"]
