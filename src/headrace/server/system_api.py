"""The system's part of the HTTP API: health, history, metrics."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from headrace.app import Rooms
from headrace.monitor.snapshot import Point
from headrace.server.exchange import Answer, Exchange, Operation, answer

PREFIX = "/api/v1/system"


class Component(msgspec.Struct, frozen=True):
    """Something that we depend on, as this process sees it."""

    name: str
    status: Literal["up", "down"]


class WorkerView(msgspec.Struct, frozen=True):
    """A serving process."""

    pid: int
    started_at: float


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """`ok`: everything is up; `degraded`: something is not, but requests are served; `down`: none can be."""

    status: Literal["ok", "degraded", "down"]
    version: str
    components: tuple[Component, ...]
    workers: tuple[WorkerView, ...]


class HistoryQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How far back."""

    minutes: Annotated[int, Meta(ge=1, le=60)] = 60


class History(msgspec.Struct, frozen=True):
    """Steps of five seconds, oldest first."""

    points: list[Point]


class SystemApi:
    """The system's operations over the open rooms."""

    def __init__(self, rooms: Rooms, *, version: str) -> None:
        self._rooms = rooms
        self._version = version

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this API can do."""
        return (
            Operation(
                method="GET",
                path=f"{PREFIX}/health",
                name="health",
                summary="What is up, as this worker sees it; 503 when nothing can be served.",
                handler=self.health,
                answers={200: Health, 503: Health},
                is_public=True,
            ),
            Operation(
                method="GET",
                path=f"{PREFIX}/history",
                name="history",
                summary="The last hour in steps of five seconds.",
                handler=self.history,
                permission="system:health",
                query=HistoryQuery,
                answers={200: History},
                failures=(422,),
            ),
            Operation(
                method="GET",
                path="/metrics",
                name="metrics",
                summary="All processes' metrics in the Prometheus text format.",
                handler=self.metrics,
                permission="system:health",
                answers={200: str},
                media_type="text/plain",
            ),
        )

    async def health(self, exchange: Exchange) -> Answer:
        """What is up."""
        remote = self._rooms.cache.statistics().remote_available
        cache = () if remote is None else (_component("redis", is_up=remote),)
        shards: tuple[Component, ...] = ()
        if self._rooms.database is not None:
            nodes = self._rooms.database.statistics().shards
            shards = tuple(_component(name, is_up=node.available) for name, node in nodes.items())
        snapshot = self._rooms.monitor.snapshot()
        workers = snapshot.workers if snapshot else ()
        health = Health(
            status=_status(cache, shards),
            version=self._version,
            components=cache + shards,
            workers=tuple(WorkerView(worker.pid, worker.started_at) for worker in workers),
        )
        return answer(health, 503 if health.status == "down" else 200, (b"cache-control", b"no-store"))

    async def history(self, exchange: Exchange) -> Answer:
        """The last hour."""
        query = exchange.query(HistoryQuery)
        return answer(History(self._rooms.monitor.history(query.minutes)), 200, (b"cache-control", b"no-store"))

    async def metrics(self, exchange: Exchange) -> Answer:
        """Everything that all processes counted."""
        accept = next((value for name, value in exchange.scope["headers"] if name == b"accept"), b"")
        content_type, text = await self._rooms.monitor.metrics(accept.decode("latin-1"))
        return Answer(text, 200, ((b"content-type", content_type.encode()),))


def _component(name: str, *, is_up: bool) -> Component:
    return Component(name, "up" if is_up else "down")


def _status(cache: tuple[Component, ...], shards: tuple[Component, ...]) -> Literal["ok", "degraded", "down"]:
    """Every request needs a shard, of which each serves its own keys; the cache only makes them faster."""
    if shards and all(shard.status == "down" for shard in shards):
        return "down"
    return "ok" if all(each.status == "up" for each in cache + shards) else "degraded"
