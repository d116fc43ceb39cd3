"""The same servers and caches as the integration tests have."""

from tests.integration.cache.conftest import open_cache, server, short_path, start_cluster, start_redis, witness

__all__ = ["open_cache", "server", "short_path", "start_cluster", "start_redis", "witness"]
