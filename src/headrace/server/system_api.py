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
    """`ok` when everything is up, `degraded` when something is not but requests are served."""

    status: Literal["ok", "degraded"]
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
                summary="What is up, as this worker sees it.",
                handler=self.health,
                answers={200: Health},
            ),
            Operation(
                method="GET",
                path=f"{PREFIX}/history",
                name="history",
                summary="The last hour in steps of five seconds.",
                handler=self.history,
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
                answers={200: str},
                media_type="text/plain",
            ),
        )

    async def health(self, exchange: Exchange) -> Answer:
        """What is up."""
        components = []
        remote = self._rooms.cache.statistics().remote_available
        if remote is not None:
            components.append(Component("redis", "up" if remote else "down"))
        if self._rooms.database is not None:
            shards = self._rooms.database.statistics().shards
            components += [Component(name, "up" if node.available else "down") for name, node in shards.items()]
        snapshot = self._rooms.monitor.snapshot()
        workers = snapshot.workers if snapshot else ()
        health = Health(
            status="ok" if all(each.status == "up" for each in components) else "degraded",
            version=self._version,
            components=tuple(components),
            workers=tuple(WorkerView(worker.pid, worker.started_at) for worker in workers),
        )
        return answer(health, 200, (b"cache-control", b"no-store"))

    async def history(self, exchange: Exchange) -> Answer:
        """The last hour."""
        query = exchange.query(HistoryQuery)
        return answer(History(self._rooms.monitor.history(query.minutes)), 200, (b"cache-control", b"no-store"))

    async def metrics(self, exchange: Exchange) -> Answer:
        """Everything that all processes counted."""
        accept = next((value for name, value in exchange.scope["headers"] if name == b"accept"), b"")
        content_type, text = await self._rooms.monitor.metrics(accept.decode("latin-1"))
        return Answer(text, 200, ((b"content-type", content_type.encode()),))
