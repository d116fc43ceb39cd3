"""What the server knows of a query: the tables behind it, and whether each function in it may be remembered.

Which tables does a query read, views and partitions included? Postgres itself answers: while a transaction lasts it
holds a lock on every relation that it has parsed, rewritten and planned. So the query is planned once, not run, and
the locks are read. No parser of ours can miss a table.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from headrace.database.postgres.pipeline import PipelinedConnection
from headrace.database.query_cache.stored import STATE, State
from headrace.database.query_cache.text import QueryText, read_text

FIRST_USER_OID: Final = 16384
LOCKS: Final = """
SELECT relation::bigint, mode FROM pg_catalog.pg_locks
WHERE pid = pg_backend_pid() AND locktype = 'relation' AND relation <> 'pg_catalog.pg_locks'::regclass"""
RELATIONS: Final = """
WITH RECURSIVE down(oid) AS (
    SELECT unnest($1::bigint[])::oid
    UNION SELECT i.inhrelid FROM down JOIN pg_catalog.pg_inherits AS i ON i.inhparent = down.oid
), up(oid) AS (
    SELECT oid FROM down
    UNION SELECT i.inhparent FROM up JOIN pg_catalog.pg_class AS c ON c.oid = up.oid AND c.relispartition
    JOIN pg_catalog.pg_inherits AS i ON i.inhrelid = up.oid
)
SELECT c.oid::bigint, c.relname::text, c.oid::regclass::text, c.relkind::text, c.relpersistence::text,
       c.relrowsecurity, c.relispartition,
       CASE WHEN c.relkind = 'p' OR c.relreplident = 'f' THEN '' ELSE (
           SELECT '(' || string_agg(quote_ident(a.attname), ', ') || ')'
           FROM pg_catalog.pg_index AS i JOIN pg_catalog.pg_attribute AS a ON a.attrelid = c.oid
           AND a.attnum = ANY(i.indkey) WHERE i.indrelid = c.oid AND i.indisvalid AND i.indimmediate
           AND CASE c.relreplident WHEN 'd' THEN i.indisprimary WHEN 'i' THEN i.indisreplident ELSE false END) END,
       CASE WHEN c.relkind = 'v' THEN pg_get_viewdef(c.oid) END,
       down.oid IS NOT NULL
FROM up JOIN pg_catalog.pg_class AS c USING (oid) LEFT JOIN down USING (oid)
WHERE c.relkind NOT IN ('i', 'I', 't', 'c')"""
FUNCTIONS: Final = """
SELECT proname::text || '()', provolatile = 'v', pronamespace = 'pg_catalog'::regnamespace
FROM pg_catalog.pg_proc WHERE proname = ANY($1) AND provolatile <> 'i'
UNION ALL SELECT proname::text || '()', provolatile = 'v', false FROM pg_catalog.pg_proc
WHERE proname = ANY($2) AND pronargs = 1 AND provolatile <> 'i'
      AND proargtypes[0] IN (SELECT reltype FROM pg_catalog.pg_class WHERE oid = ANY($4::bigint[]) AND reltype <> 0)
UNION ALL SELECT 'operator ' || oprname, provolatile = 'v', false
FROM pg_catalog.pg_operator AS o JOIN pg_catalog.pg_proc AS p ON p.oid = o.oprcode
WHERE oprname = ANY($3) AND oprnamespace <> 'pg_catalog'::regnamespace AND provolatile <> 'i'
UNION ALL SELECT 'aggregate ' || c.proname, p.provolatile = 'v', false
FROM pg_catalog.pg_aggregate AS a JOIN pg_catalog.pg_proc AS c ON c.oid = a.aggfnoid
JOIN pg_catalog.pg_proc AS p ON p.oid IN (a.aggtransfn, a.aggfinalfn, a.aggcombinefn)
WHERE c.proname = ANY($1) AND c.oid >= 16384 AND p.provolatile <> 'i'
UNION ALL SELECT 'the cast to ' || t.typname, p.provolatile = 'v', false
FROM pg_catalog.pg_cast AS c JOIN pg_catalog.pg_proc AS p ON p.oid = c.castfunc
JOIN pg_catalog.pg_type AS t ON t.oid = c.casttarget
WHERE c.oid >= 16384 AND p.provolatile <> 'i' AND (t.typname = ANY($2) OR c.castcontext <> 'e')"""
STRUCTURE: Final = """
SELECT w.name, md5(concat((SELECT string_agg(concat_ws(',', c.oid, c.xmin, n.xmin, (
           SELECT string_agg(a.xmin::text, '.' ORDER BY a.attnum) FROM pg_catalog.pg_attribute AS a
           WHERE a.attrelid = c.oid AND a.attnum > 0), (
           SELECT string_agg(r.xmin::text, '.' ORDER BY r.oid) FROM pg_catalog.pg_rewrite AS r
           WHERE r.ev_class = c.oid), (
           SELECT string_agg(i.inhrelid::text, '.' ORDER BY i.inhrelid) FROM pg_catalog.pg_inherits AS i
           WHERE i.inhparent = c.oid), (
           SELECT string_agg(p.xmin::text, '.' ORDER BY p.oid) FROM pg_catalog.pg_policy AS p
           WHERE p.polrelid = c.oid)), ';' ORDER BY c.oid)
       FROM pg_catalog.pg_class AS c JOIN pg_catalog.pg_namespace AS n ON n.oid = c.relnamespace
       WHERE c.relname = w.name::name AND c.relkind IN ('r', 'p', 'v', 'm', 'f')), '/', (
       SELECT string_agg(concat_ws(',', f.oid, f.xmin, n.xmin), ';' ORDER BY f.oid)
       FROM pg_catalog.pg_proc AS f JOIN pg_catalog.pg_namespace AS n ON n.oid = f.pronamespace
       WHERE f.proname = w.name::name)))
FROM unnest($1::text[]) AS w(name)"""
"""A digest of every table, view and function of a name, in all schemas: a table that hides another through search_path
is a change, and so is a schema that takes the name of another, or a function with a new body."""
WRITERS: Final = """
WITH RECURSIVE written(oid) AS (
    SELECT unnest($1::bigint[])::oid
    UNION SELECT w.oid FROM written CROSS JOIN LATERAL (
        SELECT i.inhparent FROM pg_catalog.pg_inherits AS i WHERE i.inhrelid = written.oid
        UNION ALL SELECT r.ev_class FROM pg_catalog.pg_depend AS d JOIN pg_catalog.pg_rewrite AS r ON r.oid = d.objid
        WHERE d.classid = 'pg_catalog.pg_rewrite'::regclass AND d.refclassid = 'pg_catalog.pg_class'::regclass
            AND d.refobjid = written.oid) AS w(oid)
)
SELECT c.relname::text FROM written JOIN pg_catalog.pg_class AS c USING (oid)"""
"""The names under which tables can be written: their own, those of their parents, and of views and rules over them."""

_DETERMINED: Final = frozenset(
    [
        "to_char",
        "to_date",
        "to_timestamp",
        "to_number",
        "date_trunc",
        "date_part",
        "extract",
        "timezone",
        "date_add",
        "date_subtract",
        "make_timestamptz",
        "generate_series",
        "concat",
        "concat_ws",
        "format",
        "array_to_string",
        "to_json",
        "to_jsonb",
        "row_to_json",
        "array_to_json",
        "json_build_array",
        "json_build_object",
        "jsonb_build_array",
        "jsonb_build_object",
        "json_agg",
        "jsonb_agg",
        "json_object_agg",
        "jsonb_object_agg",
        "json_agg_strict",
        "jsonb_agg_strict",
        "quote_literal",
        "quote_nullable",
        "to_tsvector",
        "to_tsquery",
        "plainto_tsquery",
        "phraseto_tsquery",
        "websearch_to_tsquery",
        "ts_headline",
        "date",
        "time",
        "timestamp",
        "timestamptz",
        "timetz",
        "interval",
        "text",
        "overlaps",
        "isfinite",
        "lower_inc",
        "array_in",
    ]
)
"""Stable functions of Postgres whose answer follows from their arguments and the settings that are in the key."""

_NO_TABLES: Final = {
    "m": "{} is a materialized view: nobody tells of its refresh",
    "f": "{} is a foreign table: nobody tells of changes over there",
    "S": "{} is a sequence",
}


class Relation(NamedTuple):
    """A table or view that a query reads, or the parent or a partition of one."""

    oid: int
    name: str
    path: str
    """With its schema where that is needed, quoted."""
    kind: str
    persistence: str
    has_row_security: bool
    is_partition: bool
    identity: str | None
    """The columns of its replica identity, in parentheses; empty: all. None: publishing it would make UPDATE fail."""
    definition: str | None
    """Of a view."""
    is_read: bool
    """False: only a parent of what is read."""


class Analysis(NamedTuple):
    """What the server says of a query."""

    reason: str | None
    """Why its result must not be cached."""
    has_row_security: bool = False
    tables: tuple[int, ...] = ()
    names: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    """Names under which its tables can be written."""
    unfollowed: str | None = None
    """Why the change stream cannot tell of one of its tables."""
    publish: tuple[Relation, ...] = ()
    """The tables that a publication needs for it."""
    digests: Mapping[str, str] = {}
    """By the name of a table, view or function, of STRUCTURE."""

    @property
    def structure(self) -> bytes:
        """Stands for all that it found: a result that was read under another structure is that of another query."""
        return hashlib.blake2b(repr((self.tables, sorted(self.digests.items()))).encode(), digest_size=16).digest()


async def analyse(
    connection: PipelinedConnection, sql: str, params: Sequence[Any], text: QueryText
) -> tuple[State, Analysis]:
    """Plan the query and look at what it uses."""
    async with connection.transaction(force_rollback=True):
        state = State.of(await (await connection.execute(STATE)).fetchone() or ())
        await connection.execute(f"EXPLAIN (COSTS OFF) {sql}", params or None)
        locks = await (await connection.execute(LOCKS)).fetchall()
        for oid, mode in locks:
            if mode != "AccessShareLock":
                return state, Analysis(f"it locks or writes a table ({mode})")
            if oid < FIRST_USER_OID:
                return state, Analysis("it reads a system catalog, which is not replicated")
        oids = sorted({oid for oid, _ in locks})
        found = await (await connection.execute(RELATIONS, (oids,))).fetchall()
        relations = [Relation(*row) for row in found]
        texts = [text, *(read_text(each.definition) for each in relations if each.definition is not None)]
        asked = (*(sorted(names) for names in _used(texts)), oids)
        functions = await (await connection.execute(FUNCTIONS, asked)).fetchall()
        names = {relation.name for relation in relations}
        digests = await (await connection.execute(STRUCTURE, (sorted(names.union(asked[0])),))).fetchall()
        writers = await (await connection.execute(WRITERS, (oids,))).fetchall()
    reason = next((each.reason for each in texts if each.reason), None) or _forbidden(relations, functions)
    if reason is not None:
        return state, Analysis(reason)
    return state, Analysis(
        None,
        has_row_security=any(relation.has_row_security for relation in relations),
        tables=tuple(relation.oid for relation in relations if relation.kind in {"r", "p"}),
        names=tuple(sorted(names)),
        writers=tuple(sorted(names.union(row[0] for row in writers))),
        unfollowed=_unfollowed(relations),
        publish=_publishable(relations),
        digests={name: digest for name, digest in digests},
    )


def _used(texts: Sequence[QueryText]) -> tuple[set[str], set[str], set[str]]:
    return (
        {name for text in texts for name in text.calls},
        {name for text in texts for name in text.names},
        {operator for text in texts for operator in text.operators},
    )


def _forbidden(relations: Iterable[Relation], functions: Iterable[Any]) -> str | None:
    for relation in relations:
        if relation.persistence == "t":
            return f"{relation.path} is a temporary table"
        if relation.kind in _NO_TABLES and relation.is_read:
            return _NO_TABLES[relation.kind].format(relation.path)
    for name, is_volatile, is_builtin in functions:
        if is_volatile:
            return f"{name} is volatile: each call may answer differently, or act"
        if not is_builtin:
            return f"{name} is stable, not immutable: it may read tables that nobody sees"
        if name.removesuffix("()") not in _DETERMINED:
            return f"{name} depends on more than its arguments"
    return None


def _unfollowed(relations: Iterable[Relation]) -> str | None:
    for relation in relations:
        if relation.kind == "r" and relation.persistence == "u":
            return f"{relation.path} is unlogged: its changes are not in the log"
        if relation.kind == "r" and relation.identity is None:
            return f"{relation.path} has neither a primary key nor another replica identity"
    return None


def _publishable(relations: Iterable[Relation]) -> tuple[Relation, ...]:
    """Of a partitioned table its root stands for all partitions."""
    return tuple(each for each in relations if each.kind in {"r", "p"} and not each.is_partition)
