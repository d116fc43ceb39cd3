"""Numbered SQL files, applied once and in order to every shard before it serves.

While a service is being replaced, the old code and the new one run on the same schema. So a file may only do what the
release before can live with: it adds what its own release needs, and removes what the release before needed no more.
That is why there is no second stage for "after the old code is gone": nobody can tell when that is, but the next
release can assume it of the one before the last.

Each file runs in one transaction together with its row in `headrace_migrations`, under an advisory lock, so that ten
nodes may start at once. A file that was changed after it was applied is refused.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources.abc import Traversable

from headrace.clock import Clock
from headrace.database.postgres.nodes import Node
from headrace.errors import BugError
from headrace.events import MigrationApplied, Observer

_NAME = re.compile(r"[0-9]{4}_[a-z0-9_]+\.sql")
_LOCK = 0x68656164  # "head": any number, as long as it is always the same
_TABLE = """
CREATE TABLE IF NOT EXISTS headrace_migrations (
    name text PRIMARY KEY, checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now()
)"""


@dataclass(frozen=True, slots=True, order=True)
class Migration:
    """One SQL file."""

    name: str
    sql: str

    @property
    def checksum(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.sql.encode()).hexdigest()


def load_migrations(folder: Traversable) -> tuple[Migration, ...]:
    """The SQL files of a folder in the order of their names."""
    found: list[Migration] = []
    for file in folder.iterdir():
        if not file.name.endswith(".sql"):
            continue
        if _NAME.fullmatch(file.name) is None:
            raise BugError(f"The migration {file.name} is not named NNNN_title.sql.")
        found.append(Migration(file.name, file.read_text()))
    return tuple(sorted(found))


def pending(migrations: Iterable[Migration], applied: Mapping[str, str]) -> list[Migration]:
    """The migrations that are still to run; `applied` maps names to checksums."""
    waiting = []
    for migration in migrations:
        checksum = applied.get(migration.name)
        if checksum is None:
            waiting.append(migration)
        elif checksum != migration.checksum:
            raise BugError(
                f"The migration {migration.name} was changed after it was applied.",
                fix="Restore the file and put the change into a new migration.",
            )
    return waiting


async def migrate(node: Node, migrations: Sequence[Migration], *, clock: Clock, observer: Observer) -> None:
    """Bring one shard to the newest schema."""
    async with node.transaction() as transaction:
        await transaction.fetch("SELECT pg_advisory_xact_lock($1)", _LOCK)
        await transaction.execute(_TABLE)
        rows = await transaction.fetch("SELECT name, checksum FROM headrace_migrations")
        for migration in pending(migrations, {row[0]: row[1] for row in rows}):
            started = clock.monotonic()
            await transaction.execute(migration.sql)
            await transaction.execute(
                "INSERT INTO headrace_migrations (name, checksum) VALUES ($1, $2)", migration.name, migration.checksum
            )
            observer.on(MigrationApplied(node.name, migration.name, clock.monotonic() - started))
