"""Executions over HTTP: begin them, wait for them, watch them, stop them."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headrace.agents import AgentHost, Emitted, Execution, Progress
from headrace.errors import ExecutionNotFound, InvalidRequest
from headrace.server.agent_paths import (
    AGENT,
    EXECUTION,
    PREFIX,
    Id,
    VersionOrAlias,
    agent_id_of,
    execution_id_of,
    is_id,
    shown,
)
from headrace.server.event_stream import NO_MORE, EventStreams, Source, last_seen
from headrace.server.exchange import Answer, ClientGone, Exchange, Operation, Streamed, answer

OnDisconnect = Literal["detach", "cancel"]

_FIRST_LINE_S = 0.5
_LOG_PAUSE_S = 0.05
"""A running execution that has said nothing for so long has said all there is until now."""
_LOG_LINES_MAX = 1_000


class RetryConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """How often it may be tried."""

    max_attempts: Annotated[int, Meta(ge=1, le=100)]


class ExecuteRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """An input for the agent."""

    input: Any = None
    execution_id: Annotated[Id, Meta(description="Idempotency key: one execution, one result.")] | None = None
    timeout: Annotated[float, Meta(gt=0, description="Seconds.")] | None = None
    priority: Literal["low", "normal", "high"] = "normal"
    version: VersionOrAlias | None = None
    instance: Annotated[Id, Meta(description="Whose state it gets; its executions take turns.")] | None = None
    run_async: bool = msgspec.field(name="async", default=False)
    stream: bool = False
    """Answer with its events as they come."""
    callback_url: Annotated[str, Meta(max_length=2_000)] | None = None
    retry_config: RetryConfig | None = None
    on_disconnect: OnDisconnect = "detach"
    """What becomes of it when the client leaves before its end."""


class ExecutionView(msgspec.Struct, kw_only=True):
    """An execution. Durations are milliseconds, times seconds since 1970."""

    execution_id: str
    agent_id: str
    version: str
    status: Literal["queued", "running", "cancelling", "completed", "failed", "timeout", "cancelled", "interrupted"]
    output: msgspec.Raw
    error: str | None
    progress: Progress | None
    attempt: int
    queue_ms: float
    run_ms: float
    cpu_ms: float
    memory_bytes: int | None
    started_at: float | None
    finished_at: float | None
    status_url: str


class EventsQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """From where on, and what becomes of the execution when the reader leaves."""

    after: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    on_disconnect: OnDisconnect = "detach"


class LogsQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """From where on."""

    after: Annotated[int, Meta(ge=0, le=2**53)] = 0


class LogLine(msgspec.Struct, kw_only=True):
    """Something that the agent said with `context.emit`."""

    id: int
    data: msgspec.Raw


class Logs(msgspec.Struct, kw_only=True):
    """What an execution has said until now; the newest are kept (`agents.events_max`)."""

    execution_id: str
    lines: list[LogLine]
    dropped: int
    """How many lines before and among these are gone."""


_NULL = msgspec.Raw(b"null")
_decoder = msgspec.json.Decoder(ExecuteRequest)
_BUSY = (403, 404, 409, 413, 415, 422, 429, 503)


class ExecutionsApi:
    """The operations on executions over one host."""

    def __init__(self, host: AgentHost, streams: EventStreams) -> None:
        self._host = host
        self._streams = streams

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this API can do."""
        return (*self._beginning(), *self._ending())

    def _beginning(self) -> tuple[Operation, ...]:
        return (
            Operation(
                method="POST",
                path=f"{AGENT}/execute",
                name="executeAgent",
                summary="Run the agent; with `async` the answer is 202 and the work goes on, with `stream` it is"
                " text/event-stream.",
                handler=self.execute,
                permission="agent:execute",
                request=ExecuteRequest,
                headers={"Idempotency-Key": "The same as execution_id."},
                answers={200: ExecutionView, 202: ExecutionView},
                failures=(*_BUSY, 504),
            ),
            Operation(
                method="GET",
                path=EXECUTION,
                name="agentExecution",
                summary="One execution, under way or finished.",
                handler=self.execution,
                permission="agent:execute",
                answers={200: ExecutionView},
                failures=(404, 503),
            ),
        )

    def _ending(self) -> tuple[Operation, ...]:
        return (
            self._cancelling("DELETE", EXECUTION, "deleteExecution"),
            self._cancelling("POST", f"{EXECUTION}/cancel", "cancelExecution"),
            Operation(
                method="GET",
                path=f"{EXECUTION}/events",
                name="executionEvents",
                summary="What it emits, as server-sent events, from after Last-Event-ID until its end.",
                handler=self.events,
                permission="agent:execute",
                query=EventsQuery,
                headers={"Last-Event-ID": "The id of the last event that was got."},
                media_type="text/event-stream",
                answers={200: str},
                failures=(404, 422, 503),
            ),
            Operation(
                method="GET",
                path=f"{EXECUTION}/logs",
                name="executionLogs",
                summary="What it has emitted until now.",
                handler=self.logs,
                permission="agent:execute",
                query=LogsQuery,
                answers={200: Logs},
                failures=(404, 422, 503),
            ),
        )

    def _cancelling(self, method: str, path: str, name: str) -> Operation:
        return Operation(
            method=method,
            path=path,
            name=name,
            summary="Cancel it: 200 when it has ended, 202 while its work has not stopped yet.",
            handler=self.cancel,
            permission="agent:execute",
            answers={200: ExecutionView, 202: ExecutionView},
            failures=(403, 404, 503),
        )

    async def execute(self, exchange: Exchange) -> Answer | Streamed:
        """Run an agent."""
        agent_id, tenant = agent_id_of(exchange), exchange.tenant
        request = await exchange.body(_decoder)
        execution_id = request.execution_id
        if (key := exchange.header(b"idempotency-key")) is not None:
            execution_id = _idempotency_key(key, execution_id)
        if request.retry_config is not None:
            await self._check_attempts(agent_id, tenant, request, request.retry_config)
        if request.run_async or request.stream or request.on_disconnect == "cancel":
            return await self._submit(exchange, agent_id, execution_id, request)
        if request.callback_url is not None:
            raise InvalidRequest(
                "callback_url is for executions that are not waited for.", fix="Send async: true with it."
            )
        execution = await self._host.execute(
            agent_id,
            request.input,
            execution_id=execution_id,
            timeout=request.timeout,
            priority=request.priority,
            tenant=tenant,
            version=request.version,
            instance=request.instance,
        )
        return answer(_view(execution, exchange), 200 if execution.is_finished else 202)

    async def _submit(
        self, exchange: Exchange, agent_id: str, execution_id: str | None, request: ExecuteRequest
    ) -> Answer | Streamed:
        """What is watched, or not waited for, is on record from the beginning, so that it can be found again."""
        if request.run_async and (request.stream or request.on_disconnect == "cancel"):
            raise InvalidRequest(
                "Nobody waits for an execution with async: true, so it has no stream, and nobody to leave it.",
                fix="Leave async out, or read its events from status_url + /events.",
            )
        if request.stream:
            self._streams.admit(exchange.tenant)
        execution = await self._host.submit(
            agent_id,
            request.input,
            execution_id=execution_id,
            timeout=request.timeout,
            priority=request.priority,
            tenant=exchange.tenant,
            version=request.version,
            instance=request.instance,
            callback_url=request.callback_url,
        )
        if request.run_async:
            return answer(_view(execution, exchange), 200 if execution.is_finished else 202)
        if request.stream:
            return self._streamed(exchange, agent_id, execution.id, request.on_disconnect, after=0)
        return await self._waited_for(exchange, agent_id, execution.id)

    async def _waited_for(self, exchange: Exchange, agent_id: str, execution_id: str) -> Answer:
        """The end of an execution that is cancelled when its client leaves."""
        loop = asyncio.get_running_loop()
        ending = loop.create_task(self._end_of(exchange.tenant, agent_id, execution_id))
        departure = loop.create_task(exchange.wait_until_gone())
        try:
            await asyncio.wait({ending, departure}, return_when=asyncio.FIRST_COMPLETED)
            if not ending.done():
                await self._host.cancel(execution_id, agent_id=agent_id, tenant=exchange.tenant)
                raise ClientGone
            return answer(_view(ending.result(), exchange))
        finally:
            ending.cancel()
            departure.cancel()
            await asyncio.gather(ending, departure, return_exceptions=True)

    async def _end_of(self, tenant: str, agent_id: str, execution_id: str) -> Execution:
        async for _ in self._host.events(execution_id, agent_id=agent_id, tenant=tenant):
            continue
        return await self._host.execution(agent_id, execution_id, tenant=tenant)

    async def _check_attempts(self, agent_id: str, tenant: str, request: ExecuteRequest, retry: RetryConfig) -> None:
        agent = await self._host.agent(agent_id, tenant=tenant)
        asked = request.version or agent.version
        version = await self._host.version(agent_id, agent.aliases.get(asked, asked), tenant=tenant)
        if version.attempts_max != retry.max_attempts:
            raise InvalidRequest(
                f"retry_config.max_attempts is {retry.max_attempts}, but {agent_id!r} was deployed with"
                f" {version.attempts_max}: whether it may run twice is known to who wrote it, not to who calls it.",
                fix="Deploy it with configuration.idempotent and attempts_max, and leave retry_config out.",
            )

    async def execution(self, exchange: Exchange) -> Answer:
        """One execution."""
        execution = await self._host.execution(
            agent_id_of(exchange), execution_id_of(exchange), tenant=exchange.tenant
        )
        return answer(_view(execution, exchange))

    async def cancel(self, exchange: Exchange) -> Answer:
        """Stop one execution."""
        execution = await self._host.cancel(
            execution_id_of(exchange), agent_id=agent_id_of(exchange), tenant=exchange.tenant
        )
        return answer(_view(execution, exchange), 200 if execution.is_finished else 202)

    async def events(self, exchange: Exchange) -> Answer | Streamed:
        """Follow one execution."""
        agent_id, execution_id = agent_id_of(exchange), execution_id_of(exchange)
        query = exchange.query(EventsQuery)
        after = last_seen(exchange.header(b"last-event-id"), query.after)
        if after is None:
            return NO_MORE
        self._streams.admit(exchange.tenant)
        await self._require(exchange.tenant, agent_id, execution_id)
        return self._streamed(exchange, agent_id, execution_id, query.on_disconnect, after=after)

    async def logs(self, exchange: Exchange) -> Answer:
        """What was said until now."""
        agent_id, execution_id = agent_id_of(exchange), execution_id_of(exchange)
        after = exchange.query(LogsQuery).after
        found = Logs(execution_id=execution_id, lines=[], dropped=0)
        events = self._host.events(execution_id, after=after, agent_id=agent_id, tenant=exchange.tenant)
        event = await _soon(events, within_s=_FIRST_LINE_S)
        while event is not None:
            found.lines.append(LogLine(id=event.id, data=event.data))
            found.dropped += event.dropped
            event = await _soon(events) if len(found.lines) < _LOG_LINES_MAX else None
        return answer(found)

    async def _require(self, tenant: str, agent_id: str, execution_id: str) -> None:
        """Refuse before anything is sent what a stream could only end with."""
        try:
            await self._host.execution(agent_id, execution_id, tenant=tenant)
        except ExecutionNotFound:
            # A direct one has no row before it ends; if it runs here, its events are here too.
            await _soon(self._host.events(execution_id, agent_id=agent_id, tenant=tenant))

    def _streamed(
        self, exchange: Exchange, agent_id: str, execution_id: str, on_disconnect: OnDisconnect, *, after: int
    ) -> Streamed:
        tenant = exchange.tenant

        async def ending() -> bytes:
            execution = await self._host.execution(agent_id, execution_id, tenant=tenant)
            return msgspec.json.encode(_view(execution, exchange))

        source = Source(
            events=partial(self._host.events, execution_id, after=after, agent_id=agent_id, tenant=tenant),
            ending=ending,
            left=partial(self._host.cancel, execution_id, agent_id=agent_id, tenant=tenant)
            if on_disconnect == "cancel"
            else None,
            after=after,
            tenant=tenant,
        )
        return partial(self._streams.serve, source, is_head=exchange.scope["method"] == "HEAD")


async def _soon(events: AsyncIterator[Emitted], *, within_s: float = _LOG_PAUSE_S) -> Emitted | None:
    """The next event, if it is there already; else the reading is over."""
    try:
        async with asyncio.timeout(within_s):
            return await anext(events)
    except (TimeoutError, StopAsyncIteration):
        return None


def _idempotency_key(header: str, execution_id: str | None) -> str:
    """The header's key, which the draft standard writes as a quoted string, and which must not contradict the body."""
    key = header.strip()
    if len(key) > 1 and key[0] == key[-1] == '"':
        key = key[1:-1]
    if not is_id(key):
        raise InvalidRequest(
            f"Idempotency-Key is {shown(key)}, which breaks the rule for ids.",
            fix="Use up to 128 letters, digits, `.`, `_` and `-`.",
        )
    if execution_id not in {None, key}:
        raise InvalidRequest(
            f"Idempotency-Key is {key!r}, but execution_id is {execution_id!r}.", fix="Send one of them."
        )
    return key


def _view(execution: Execution, exchange: Exchange) -> ExecutionView:
    return ExecutionView(
        execution_id=execution.id,
        agent_id=execution.agent_id,
        version=execution.version,
        status=execution.status,
        output=_NULL if execution.output_json is None else msgspec.Raw(execution.output_json),
        error=execution.error,
        progress=execution.progress,
        attempt=execution.attempt,
        queue_ms=execution.queue_ms,
        run_ms=execution.run_ms,
        cpu_ms=execution.cpu_ms,
        memory_bytes=execution.memory_bytes,
        started_at=execution.started_at,
        finished_at=execution.finished_at,
        status_url=f"{exchange.mounted_at}{PREFIX}/{execution.agent_id}/executions/{execution.id}",
    )
