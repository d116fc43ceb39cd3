"""Sharded Postgres behind one door: a key names its shard, a statement runs there."""

from headrace.database.agreed_map import AgreedMap
from headrace.database.config import (
    DatabaseConfig,
    KeyRange,
    ListedKey,
    Reference,
    ReplicaConfig,
    ShardConfig,
    Sharded,
)
from headrace.database.database import Database
from headrace.database.ids import Ids
from headrace.database.index_config import IndexConfig
from headrace.database.indexes.advice import IndexAdvice, IndexChange
from headrace.database.indexes.index import Index
from headrace.database.indexes.workload import Query, Workload
from headrace.database.query_policy import QueryCacheConfig, QueryPolicy
from headrace.database.shard_map import Placement, ShardMap

__all__ = [
    "AgreedMap",
    "Database",
    "DatabaseConfig",
    "Ids",
    "Index",
    "IndexAdvice",
    "IndexChange",
    "IndexConfig",
    "KeyRange",
    "ListedKey",
    "Placement",
    "Query",
    "QueryCacheConfig",
    "QueryPolicy",
    "Reference",
    "ReplicaConfig",
    "ShardConfig",
    "ShardMap",
    "Sharded",
    "Workload",
]
