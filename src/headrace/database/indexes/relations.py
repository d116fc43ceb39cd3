"""The tables, columns, statistics and indexes of a shard, as its catalogue has them."""

from collections.abc import Mapping
from typing import Any, Final

from headrace.database.indexes.index import ColumnFacts, Schema, StandingIndex, TableFacts
from headrace.database.postgres.nodes import Node

_TABLES: Final = """
SELECT c.oid::bigint AS oid, c.oid::regclass::text AS name, n.nspname AS schema, c.relname AS bare,
    pg_table_is_visible(c.oid) AS visible, c.relkind AS kind,
    CASE WHEN c.reltuples >= 0 THEN c.reltuples ELSE coalesce(s.n_live_tup, 0) END::float8 AS rows,
    CASE WHEN c.relkind = 'p' THEN 0 ELSE pg_relation_size(c.oid) END AS bytes,
    coalesce(s.n_tup_ins, 0)::float8 AS inserts, (coalesce(s.n_tup_upd, 0) - coalesce(s.n_tup_hot_upd, 0))::float8
    AS updates, coalesce(s.n_tup_del, 0)::float8 AS deletes, coalesce(s.seq_scan, 0) AS scans
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace LEFT JOIN pg_stat_user_tables s ON s.relid = c.oid
WHERE c.relkind IN ('r', 'm', 'p') AND c.relpersistence <> 't' AND n.nspname !~ '^(pg_|information_schema$)'
    AND c.relname NOT LIKE 'headrace\\_%'"""
_COLUMNS: Final = """
SELECT a.attrelid::bigint AS oid, a.attname AS bare, quote_ident(a.attname) AS sql,
    format_type(a.atttypid, -1) AS type,
    (y.typcategory IN ('N', 'S', 'D', 'B', 'T', 'E', 'I') OR y.typname IN ('uuid', 'bytea')) AS orders,
    y.typname NOT IN ('numeric', 'float4', 'float8') AS packs,
    s.avg_width AS width, s.n_distinct AS distinct, s.null_frac AS nulls,
    s.most_common_vals::text::text[] AS common, s.most_common_freqs::float8[] AS shares,
    s.histogram_bounds::text::text[] AS bounds
FROM pg_attribute a JOIN pg_class c ON c.oid = a.attrelid JOIN pg_namespace n ON n.oid = c.relnamespace
JOIN pg_type y ON y.oid = a.atttypid
LEFT JOIN LATERAL (SELECT * FROM pg_stats p WHERE p.schemaname = n.nspname AND p.tablename = c.relname
    AND p.attname = a.attname ORDER BY p.inherited DESC LIMIT 1) s ON true
WHERE a.attrelid = ANY($1::bigint[]::oid[]) AND a.attnum > 0 AND NOT a.attisdropped
ORDER BY a.attrelid, a.attnum"""
_INDEXES: Final = """
SELECT i.indexrelid::regclass::text AS name, i.indrelid::regclass::text AS table,
    pg_get_indexdef(i.indexrelid) AS definition, m.amname AS method, i.indisunique AS unique,
    (SELECT string_agg(k.conname, ', ') FROM pg_constraint k WHERE k.conindid = i.indexrelid) AS constraint,
    (i.indisreplident OR i.indisclustered OR c.relispartition) AS identity,
    (SELECT string_agg(k.conname, ', ') FROM pg_constraint k WHERE k.contype = 'f' AND k.conrelid = i.indrelid
        AND (i.indkey::int2[])[0:cardinality(k.conkey) - 1] @> k.conkey) AS refers, i.indisvalid AS valid,
    pg_get_expr(i.indpred, i.indrelid, true) AS where, coalesce(s.idx_scan, 0) AS scans,
    pg_relation_size(i.indexrelid) AS bytes,
    (SELECT array_agg(pg_get_indexdef(i.indexrelid, n, true)
        || CASE WHEN o.opcdefault THEN '' ELSE ' ' || o.opcname END
        || CASE WHEN i.indcollation[n - 1] IN (0, a.attcollation) OR a.attnum IS NULL AND e.attcollation =
            i.indcollation[n - 1] THEN '' ELSE ' COLLATE ' || i.indcollation[n - 1]::regcollation END
        || CASE i.indoption[n - 1] & 3 WHEN 0 THEN '' WHEN 3 THEN ' DESC' WHEN 1 THEN ' DESC NULLS LAST'
            ELSE ' NULLS FIRST' END ORDER BY n)
     FROM generate_series(1, i.indnkeyatts) n
     JOIN pg_opclass o ON o.oid = i.indclass[n - 1]
     JOIN pg_attribute e ON e.attrelid = i.indexrelid AND e.attnum = n
     LEFT JOIN pg_attribute a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[n - 1]) AS key,
    (SELECT coalesce(array_agg(pg_get_indexdef(i.indexrelid, n, true) ORDER BY n), '{}')
     FROM generate_series(i.indnkeyatts + 1, i.indnatts) n) AS include
FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid JOIN pg_am m ON m.oid = c.relam
LEFT JOIN pg_stat_user_indexes s ON s.indexrelid = i.indexrelid
WHERE i.indrelid = ANY($1::bigint[]::oid[]) AND c.relkind = 'i' ORDER BY i.indexrelid"""
_AGE: Final = """
SELECT extract(epoch FROM now() - coalesce(stats_reset, pg_postmaster_start_time()))::float8
FROM pg_stat_database WHERE datname = current_database()"""
# A clean shutdown keeps the statistics, so the start of the server is their youngest possible beginning.


async def read_schema(node: Node) -> Schema:
    """What a shard has."""
    found = [row.asdict() for row in await node.fetch(_TABLES, read_only=True)]
    oids = [row["oid"] for row in found]
    columns: dict[int, dict[str, ColumnFacts]] = {}
    rows_of = {row["oid"]: row["rows"] for row in found}
    for row in await node.fetch(_COLUMNS, (oids,), read_only=True):
        values = row.asdict()
        columns.setdefault(values["oid"], {})[values["bare"]] = _column(values, rows_of[values["oid"]])
    tables = {
        row["name"]: TableFacts(
            name=row["name"],
            rows=row["rows"],
            size_bytes=row["bytes"],
            columns=columns.get(row["oid"], {}),
            inserts=row["inserts"],
            updates=row["updates"],
            deletes=row["deletes"],
            scans=row["scans"],
            plain=row["kind"] != "p",
        )
        for row in found
    }
    names = {(row["schema"], row["bare"]): row["name"] for row in found}
    names |= {("", row["bare"]): row["name"] for row in found if row["visible"]}
    age_s = (await node.fetch(_AGE, read_only=True))[0][0]
    indexes = [_standing(row.asdict(), age_s) for row in await node.fetch(_INDEXES, (oids,), read_only=True)]
    return Schema(tables, names, tuple(indexes), age_s)


def _column(values: Mapping[str, Any], rows: float) -> ColumnFacts:
    distinct = values["distinct"]
    if distinct is None:
        distinct = rows / 10 if rows else 1.0
    return ColumnFacts(
        sql=values["sql"],
        type_name=values["type"],
        width_bytes=float(values["width"] or 8),
        distinct=float(distinct if distinct > 0 else -distinct * rows) or 1.0,
        null_share=float(values["nulls"] or 0.0),
        orders=values["orders"],
        packs=values["packs"],
        common=tuple(zip(values["common"] or (), values["shares"] or (), strict=True)),
        bounds=tuple(values["bounds"] or ()),
    )


def _standing(values: Mapping[str, Any], age_s: float | None) -> StandingIndex:
    return StandingIndex(
        name=values["name"],
        table=values["table"],
        definition=values["definition"],
        method=values["method"],
        key=tuple(values["key"]),
        include=tuple(values["include"]),
        where=values["where"],
        unique=values["unique"],
        constraint=values["constraint"],
        identity=values["identity"],
        refers=values["refers"],
        valid=values["valid"],
        scans=values["scans"],
        size_bytes=values["bytes"],
        age_s=age_s,
    )
