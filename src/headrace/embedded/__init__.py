"""The servers behind `headrace up`: a Redis and Postgres shards of one's own, from pip alone, in one directory."""

from headrace.embedded.directory import DirectoryLock
from headrace.embedded.postgres import EmbeddedPostgres
from headrace.embedded.redis import EmbeddedRedis
from headrace.embedded.server import Server, started, wait_until_ready

__all__ = ["DirectoryLock", "EmbeddedPostgres", "EmbeddedRedis", "Server", "started", "wait_until_ready"]
