"""Sharded Postgres behind one door: a key names its shard, a statement runs there."""

from headrace.database.config import DatabaseConfig, ShardConfig
from headrace.database.database import Database
from headrace.database.shard_map import Placement, ShardMap

__all__ = ["Database", "DatabaseConfig", "Placement", "ShardConfig", "ShardMap"]
