"""What the shards say of the declared tables: their columns, in order, and the types of their keys."""

from collections.abc import Mapping, Sequence

from headrace.database.config import Reference, Sharded
from headrace.database.planning.scope import Catalog, TableFacts
from headrace.database.postgres.nodes import Node
from headrace.errors import ConfigError

_COLUMNS = """
SELECT wanted.name, a.attname, format_type(a.atttypid, a.atttypmod),
       a.attidentity <> '' OR coalesce(a.attgenerated = '' AND pg_get_expr(d.adbin, d.adrelid) ~* $2, false)
FROM unnest($1::text[]) AS wanted(name)
JOIN pg_attribute AS a ON a.attrelid = to_regclass(wanted.name)
LEFT JOIN pg_attrdef AS d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
WHERE a.attnum > 0 AND NOT a.attisdropped
ORDER BY wanted.name, a.attnum"""

_COMPUTED = r"\(|\m(current|local|session|user)"
"""Looks like a function in a default: `nextval(...)`, `now()`, `CURRENT_DATE`; `'a'::text` and `0` do not."""

_AGGREGATES = "SELECT DISTINCT proname::text FROM pg_proc WHERE prokind = 'a' AND oid >= 16384"
"""Those that users have made: lower oids are Postgres' own."""

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
    computed: dict[str, set[str]] = {}
    for name, column, type_name, is_computed in await node.fetch(_COLUMNS, (list(tables), _COMPUTED), read_only=True):
        columns.setdefault(name, {})[column] = type_name
        if is_computed:
            computed.setdefault(name, set()).add(column)
    facts = {}
    for name, table in tables.items():
        key, found = _key(table), columns.get(name)
        if found is None:
            facts[name] = TableFacts(key)
        else:
            key_type = found.get(key, "") if key is not None else ""
            facts[name] = TableFacts(key, key_type, tuple(found), frozenset(computed.get(name, ())))
    return facts


async def read_aggregates(node: Node) -> frozenset[str]:
    """The names of aggregates that users have made."""
    return frozenset(name for (name,) in await node.fetch(_AGGREGATES, read_only=True))


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
