"""The door for other agents: A2A v1.0 over JSON-RPC [1].

Each agent is a server of its own at `/a2a/<agent id>`, with its card below that as RFC 8615 has it, so whoever knows
the agent's URL finds the rest. A host of many has no card of its own: `/a2a` lists them, and the well-known path at
the root holds the card of the one agent that the configuration names.

A stream that breaks off breaks nothing but itself: the task goes on, and `SubscribeToTask` tells it again from the
beginning of what is kept. The version of a request is in the header `A2A-Version`; without one it is 0.3, which is
another protocol.

[1] A2A Protocol Specification v1.0, sections 3 (operations), 5.4 (error codes), 8 (discovery), 9 (JSON-RPC).
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Annotated
from urllib.parse import parse_qs

import msgspec
from msgspec import Meta

from headrace.agents import AgentHost, Execution
from headrace.errors import AgentNotFound, ExecutionNotFound, HeadraceError
from headrace.server.agent_paths import agent_id_of, is_id, shown
from headrace.server.exchange import Answer, Exchange, Operation, Streamed, answer
from headrace.server.protocols.a2a_objects import (
    PUSH_NOTIFICATION_NOT_SUPPORTED,
    TASK_NOT_CANCELABLE,
    UNSUPPORTED_OPERATION,
    VERSION,
    VERSION_NOT_SUPPORTED,
    SendMessageRequest,
    TaskRequest,
    TaskWords,
    card,
    context_of,
    input_of,
    problem_of,
    refused,
    task,
)
from headrace.server.protocols.executions import Executions
from headrace.server.protocols.json_rpc import (
    INVALID_PARAMS,
    METHOD_NOT_FOUND,
    Call,
    Refused,
    read_call,
    refusal,
    success,
)
from headrace.server.protocols.profile import Profiles

PREFIX = "/a2a"
AGENT = f"{PREFIX}/{{agent_id}}"
WELL_KNOWN = "/.well-known/agent-card.json"

_CARD_S = 60
"""How long a client may keep a card."""
_MEDIA_TYPE = (b"content-type", b"application/json")

Method = Callable[[Exchange, Call, str], Awaitable[Answer | Streamed]]


class CardsQuery(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Which part of the list."""

    page: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    limit: Annotated[int, Meta(ge=1, le=200)] = 50


class CardEntry(msgspec.Struct, kw_only=True, rename="camel"):
    """An agent and where its card is."""

    agent_id: str
    name: str
    version: str
    card: str


class CardList(msgspec.Struct, kw_only=True, rename="camel"):
    """Agents by id."""

    agents: list[CardEntry]
    page: int
    limit: int
    total: int


class A2ADoor:
    """The operations of A2A on the agents of one host.

    `url` is where clients reach the service, for one behind a proxy; without it cards say what the request said.
    A client that waits for a task is answered within `wait_s`, with the task as it is then.
    """

    def __init__(
        self,
        host: AgentHost,
        executions: Executions,
        profiles: Profiles,
        *,
        has_keys: bool,
        wait_s: float,
        url: str | None = None,
        root_agent: str | None = None,
    ) -> None:
        self._host = host
        self._executions = executions
        self._profiles = profiles
        self._has_keys = has_keys
        self._wait_s = wait_s
        self._url = url
        self._root_agent = root_agent
        no_push = (
            PUSH_NOTIFICATION_NOT_SUPPORTED,
            "Nobody is called back by A2A here; poll or subscribe to the task.",
        )
        no_list = (UNSUPPORTED_OPERATION, "Tasks are not listed; keep the ids that SendMessage returned.")
        no_card = (UNSUPPORTED_OPERATION, "The card is the whole card; there is no extended one.")
        self._methods: Mapping[str, Method | tuple[int, str]] = MappingProxyType(
            {
                "SendMessage": self._send,
                "SendStreamingMessage": self._send_streaming,
                "GetTask": self._get,
                "CancelTask": self._cancel,
                "SubscribeToTask": self._subscribe,
                "ListTasks": no_list,
                "GetExtendedAgentCard": no_card,
                "CreateTaskPushNotificationConfig": no_push,
                "GetTaskPushNotificationConfig": no_push,
                "ListTaskPushNotificationConfigs": no_push,
                "DeleteTaskPushNotificationConfig": no_push,
            }
        )

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this door opens."""
        found = (
            Operation(
                method="POST",
                path=AGENT,
                name="a2aCall",
                summary="A JSON-RPC call of A2A v1.0 to this agent.",
                handler=self.call,
                permission="agent:execute",
                headers={"A2A-Version": "1.0; without it a call is one of 0.3, which is refused."},
                answers={200: None},
                failures=(403, 404),
            ),
            self._reading(f"{AGENT}{WELL_KNOWN}", "a2aCard", "The agent's card.", self.card),
            self._reading(PREFIX, "a2aAgents", "The agents, and where their cards are.", self.list),
        )
        if self._root_agent is None:
            return found
        summary = f"The card of the agent {self._root_agent}."
        return (*found, self._reading(WELL_KNOWN, "a2aRootCard", summary, self.root_card))

    def _reading(
        self, path: str, name: str, summary: str, handler: Callable[[Exchange], Awaitable[Answer]]
    ) -> Operation:
        return Operation(
            method="GET",
            path=path,
            name=name,
            summary=summary,
            handler=handler,
            permission="agent:execute",
            query=CardsQuery if path == PREFIX else None,
            answers={200: CardList if path == PREFIX else None},
            failures=(404, 503),
        )

    # -- discovery -------------------------------------------------------------------------------------------------

    async def card(self, exchange: Exchange) -> Answer:
        """The card of the agent in the path."""
        return await self._card_of(exchange, agent_id_of(exchange))

    async def root_card(self, exchange: Exchange) -> Answer:
        """The card of the agent that stands for the service."""
        return await self._card_of(exchange, self._root_agent or "")

    async def list(self, exchange: Exchange) -> Answer:
        """The agents."""
        query = exchange.query(CardsQuery)
        first = (query.page - 1) * query.limit
        found, total = await self._host.agents(tenant=exchange.tenant, offset=first, limit=query.limit)
        at = self._base(exchange)
        agents = [
            CardEntry(
                agent_id=agent.agent_id,
                name=agent.name,
                version=agent.version,
                card=f"{at}{PREFIX}/{agent.agent_id}{WELL_KNOWN}",
            )
            for agent, _ in found
        ]
        return answer(CardList(agents=agents, page=query.page, limit=query.limit, total=total))

    async def _card_of(self, exchange: Exchange, agent_id: str) -> Answer:
        profile = await self._profiles.find(agent_id, tenant=exchange.tenant)
        url = f"{self._base(exchange)}{PREFIX}/{agent_id}"
        body = msgspec.json.encode(card(profile, url=url, has_keys=self._has_keys))
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        # Private: the card of one tenant's agent is no other's.
        kept = ((b"cache-control", f"private, max-age={_CARD_S}".encode()), (b"etag", tag.encode()))
        if tag in (exchange.header(b"if-none-match") or ""):
            return Answer(b"", 304, kept)
        return Answer(body, 200, (_MEDIA_TYPE, *kept))

    def _base(self, exchange: Exchange) -> str:
        if self._url is not None:
            return self._url.rstrip("/")
        host = exchange.header(b"host") or "localhost"
        return f"{exchange.scope['scheme']}://{host}{exchange.mounted_at}"

    # -- calls -----------------------------------------------------------------------------------------------------

    async def call(self, exchange: Exchange) -> Answer | Streamed:
        """One call, answered in A2A's words. Raises `AgentNotFound`: where no agent is, nobody speaks A2A."""
        agent_id = agent_id_of(exchange)
        call: Call | None = None
        try:
            call = await read_call(exchange)
            _check_version(exchange)
            return await self._method_of(call)(exchange, call, agent_id)
        except Refused as error:
            return refusal(None if call is None else call.reply_id, error)
        except AgentNotFound:
            raise
        except HeadraceError as error:
            return refusal(None if call is None else call.reply_id, problem_of(error))

    def _method_of(self, call: Call) -> Method:
        method = self._methods.get(call.method)
        if method is None:
            raise Refused(METHOD_NOT_FOUND, f"A2A {VERSION} has no method {shown(call.method)}.")
        if isinstance(method, tuple):
            raise refused(*method)
        return method

    async def _send(self, exchange: Exchange, call: Call, agent_id: str) -> Answer:
        loop = asyncio.get_running_loop()
        answer_at = loop.time() + self._wait_s
        request = call.arguments(SendMessageRequest)
        execution = await self._begun(exchange, agent_id, request)
        if request.configuration is None or not request.configuration.return_immediately:
            execution = await self._executions.end_of(execution, within_s=answer_at - loop.time())
        return answer(success(call.reply_id, {"task": task(execution)}))

    async def _send_streaming(self, exchange: Exchange, call: Call, agent_id: str) -> Streamed:
        self._executions.admit(exchange.tenant)
        execution = await self._begun(exchange, agent_id, call.arguments(SendMessageRequest))
        return self._streamed(call, execution)

    async def _get(self, exchange: Exchange, call: Call, agent_id: str) -> Answer:
        execution = await self._found(exchange, agent_id, call.arguments(TaskRequest).id)
        return answer(success(call.reply_id, task(execution)))

    async def _cancel(self, exchange: Exchange, call: Call, agent_id: str) -> Answer:
        execution = await self._found(exchange, agent_id, call.arguments(TaskRequest).id)
        if not execution.is_finished:
            execution = await self._executions.cancel(execution)
            if not execution.is_finished or execution.status == "cancelled":
                return answer(success(call.reply_id, task(execution)))
        raise refused(TASK_NOT_CANCELABLE, f"The task is {execution.status} already.", taskId=execution.id)

    async def _subscribe(self, exchange: Exchange, call: Call, agent_id: str) -> Streamed:
        self._executions.admit(exchange.tenant)
        execution = await self._found(exchange, agent_id, call.arguments(TaskRequest).id)
        if execution.is_finished:
            raise refused(UNSUPPORTED_OPERATION, f"The task is {execution.status} already: get it with GetTask.")
        return self._streamed(call, execution)

    def _streamed(self, call: Call, execution: Execution) -> Streamed:
        words = TaskWords(call.reply_id, execution)
        return self._executions.streamed(execution, words, is_left_cancelled=False)

    async def _begun(self, exchange: Exchange, agent_id: str, request: SendMessageRequest) -> Execution:
        message = request.message
        if request.configuration is not None and request.configuration.task_push_notification_config is not None:
            raise refused(PUSH_NOTIFICATION_NOT_SUPPORTED, "Nobody is called back by A2A here.")
        if message.task_id:
            await self._refuse_more(exchange, agent_id, message.task_id, message.context_id)
        profile = await self._profiles.find(agent_id, tenant=exchange.tenant)
        context, task_id = context_of(message, agent_id)
        value = input_of(message, profile)
        return await self._executions.begin(
            agent_id, value, tenant=exchange.tenant, execution_id=task_id, instance=context
        )

    async def _refuse_more(self, exchange: Exchange, agent_id: str, task_id: str, context: str | None) -> None:
        """A task has one message: nothing that runs here waits for another."""
        execution = await self._found(exchange, agent_id, task_id)
        of = task(execution)["contextId"]
        if context and context != of:
            raise refused(INVALID_PARAMS, f"The task is of the context {of!r}, not of {shown(context)}.")
        raise refused(
            UNSUPPORTED_OPERATION,
            f"A task takes one message; this one is {execution.status}. Send the next one with its contextId alone.",
        )

    async def _found(self, exchange: Exchange, agent_id: str, task_id: str) -> Execution:
        if not is_id(task_id):
            raise ExecutionNotFound(f"No task has the id {shown(task_id)}.")
        return await self._executions.find(agent_id, task_id, tenant=exchange.tenant)


def _check_version(exchange: Exchange) -> None:
    query = parse_qs(exchange.scope["query_string"].decode("latin-1"))
    asked = exchange.header(b"a2a-version") or query.get("A2A-Version", [""])[-1] or "0.3"
    if asked.split(".")[:2] != VERSION.split("."):
        raise refused(VERSION_NOT_SUPPORTED, f"A2A-Version is {shown(asked)}; {VERSION} is spoken here.")
