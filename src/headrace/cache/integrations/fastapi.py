"""The cache in FastAPI and Starlette: open as long as the application, and an argument of its handlers.

    cache = Cache(remote=RemoteConfig(url="redis://cache:6379/0"))
    app = FastAPI(lifespan=lifespan(cache))

    @app.get("/users/{user_id}")
    async def user(user_id: int, cache: Annotated[Cache, Depends(cache_dependency)]) -> User:
        return await cache.get_or_load(f"user:{user_id}", lambda: load_user(user_id), type=User)

`lifespan` suits Litestar too (`Litestar(lifespan=[lifespan(cache)])`), whose handlers get a cache by
`Provide(lambda: cache, sync_to_thread=False)`.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any

from starlette.requests import HTTPConnection

from headrace.cache.cache import Cache
from headrace.errors import NotOpen

STATE = "headrace_cache"
Lifespan = Callable[[Any], AbstractAsyncContextManager[Mapping[str, Any] | None]]


def lifespan(cache: Cache, inner: Lifespan | None = None) -> Callable[[Any], AbstractAsyncContextManager[Any]]:
    """A lifespan that opens the cache before the application starts, and closes it after it has ended.

    `inner` is the application's own lifespan, for which the cache is open already.
    """

    @asynccontextmanager
    async def run(app: Any) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(cache)
            state = await stack.enter_async_context(inner(app)) if inner is not None else None
            yield {**(state or {}), STATE: cache}

    return run


def cache_dependency(connection: HTTPConnection) -> Cache:
    """The cache of the application that this request or web socket belongs to: `Depends(cache_dependency)`.

    A test replaces it: `app.dependency_overrides[cache_dependency] = lambda: other_cache`.
    """
    cache = getattr(connection.state, STATE, None)
    if not isinstance(cache, Cache):
        raise NotOpen(
            "The application was started without a cache.",
            fix="Write FastAPI(lifespan=lifespan(cache)); in tests use `with TestClient(app) as client`.",
        )
    return cache
