"""Somebody's own app, whose slow function got a cache: `headrace up examples.app.starlette_app:app`."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from headrace.cache import Cache

cache = Cache()


@asynccontextmanager
async def _open_cache(_: Starlette) -> AsyncIterator[None]:
    async with cache:
        yield


@cache.cached("user:{user_id}", ttl=60)
async def load_user(user_id: int) -> dict[str, int | str]:
    """A user, as if from a database that takes its time."""
    await asyncio.sleep(0.2)
    return {"id": user_id, "name": f"User {user_id}"}


async def home(_: Request) -> JSONResponse:
    """Where to go from here."""
    return JSONResponse({"try": "/users/1"})


async def user(request: Request) -> JSONResponse:
    """One user; only the first request in a minute waits."""
    return JSONResponse(await load_user(request.path_params["user_id"]))


app = Starlette(routes=[Route("/", home), Route("/users/{user_id:int}", user)], lifespan=_open_cache)
