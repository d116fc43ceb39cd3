"""What the shards say of the declared tables: their columns, in order, and the types of their keys."""

from collections.abc import Mapping, Sequence

from headrace.database.config import Reference, Sharded
from headrace.database.planning.scope import Catalog, TableFacts
from headrace.database.postgres.nodes import Node
from headrace.errors import ConfigError

_COLUMNS = """
SELECT wanted.name, a.attname, format_type(a.atttypid, -1)
FROM unnest($1::text[]) AS wanted(name)
JOIN pg_attribute AS a ON a.attrelid = to_regclass(wanted.name)
WHERE a.attnum > 0 AND NOT a.attisdropped
ORDER BY wanted.name, a.attnum"""

_COLLATION = """
SELECT concat_ws(' ', datlocprovider, datcollate, coalesce(to_jsonb(d)->>'datlocale', to_jsonb(d)->>'daticulocale'))
FROM pg_database AS d WHERE datname = current_database()"""

Tables = Mapping[str, Sharded | Reference]


def declared(tables: Tables) -> Catalog:
    """What the configuration alone says."""
    return {name: TableFacts(_key(table)) for name, table in tables.items()}


async def read_catalog(node: Node, tables: Tables) -> Catalog:
    """The declared tables as they stand on a shard; of one that does not exist there only what is declared."""
    columns: dict[str, dict[str, str]] = {}
    for name, column, type_name in await node.fetch(_COLUMNS, (list(tables),), read_only=True):
        columns.setdefault(name, {})[column] = type_name
    facts = {}
    for name, table in tables.items():
        key, found = _key(table), columns.get(name)
        if found is None:
            facts[name] = TableFacts(key)
        else:
            facts[name] = TableFacts(key, found.get(key, "") if key is not None else "", tuple(found))
    return facts


async def check_collations(nodes: Sequence[Node]) -> None:
    """Refuse shards that sort text differently: what each has sorted could not be merged."""
    found = {node.name: (await node.fetch(_COLLATION, read_only=True))[0][0] for node in nodes}
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"The shards sort text differently: {', '.join(f'{name} by {how!r}' for name, how in found.items())}.",
            fix="Make their databases with the same provider and locale (CREATE DATABASE ... LOCALE).",
        )


def _key(table: Sharded | Reference) -> str | None:
    return table.key if isinstance(table, Sharded) else None
