"""Servers of one's own for each test, and caches on them."""

import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from headrace.cache import Cache, RemoteConfig
from tests.redis_servers import HAS_CLUSTERS, PATIENT, RedisCluster, RedisServer, Witness


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose path fits into a Unix socket address."""
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        yield Path(directory)


@pytest.fixture
def witness() -> Witness:
    return Witness()


@pytest.fixture
def start_redis(short_path: Path) -> Iterator[Callable[..., RedisServer]]:
    servers: list[RedisServer] = []

    def start(*options: str, **named: object) -> RedisServer:
        server = RedisServer(short_path / str(len(servers)), *options, **named)  # type: ignore[arg-type]
        servers.append(server)
        return server.start()

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def server(start_redis: Callable[..., RedisServer]) -> RedisServer:
    return start_redis()


@pytest.fixture
async def open_cache(server: RedisServer, witness: Witness) -> AsyncIterator[Callable[..., object]]:
    """Opens caches on the server; each is a process of its own as far as coherence goes."""
    caches: list[Cache] = []

    async def open_one(*, remote: dict[str, object] | None = None, **options: object) -> Cache:
        config = RemoteConfig(**{"url": server.url, **PATIENT, **(remote or {})})  # type: ignore[arg-type]
        options.setdefault("observer", witness)
        cache = Cache(remote=config, **options)  # type: ignore[arg-type]
        await cache.open()
        caches.append(cache)
        return cache

    yield open_one
    for cache in caches:
        await cache.close()


@pytest.fixture
def start_cluster(short_path: Path) -> Iterator[Callable[..., RedisCluster]]:
    if not HAS_CLUSTERS:
        pytest.skip("clusters are put together with redis-server 7.0 or newer")
    clusters: list[RedisCluster] = []

    def start(**options: int) -> RedisCluster:
        cluster = RedisCluster(short_path / f"cluster{len(clusters)}", **options)
        clusters.append(cluster)
        return cluster.start()

    yield start
    for cluster in clusters:
        cluster.stop()
