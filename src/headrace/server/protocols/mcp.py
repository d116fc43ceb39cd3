"""The door for models: the agents in service as the tools of one MCP server at `/mcp`, over Streamable HTTP [1].

Nothing is kept between two requests, so any worker answers any of them. A call of a tool is an execution; its stream
is its own, and who closes it cancels the call. Clients of the revisions before (2025), which call `initialize`, are
answered as far as that needs no session: without a stream of the server's own (GET is a 405), and a call that loses
its connection goes on to its end, as they expect.

The origin check that the specification wants against DNS rebinding is the gate's: a page of another origin is a 403,
and without a token only this machine's own names are answered.

[1] Model Context Protocol 2026-07-28, "Streamable HTTP", "Tools", "Versioning and Compatibility".
"""

from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType

from headrace.agents import AgentHost
from headrace.errors import AgentNotFound, HeadraceError
from headrace.server.agent_paths import is_id, shown
from headrace.server.exchange import Answer, Exchange, Operation, Streamed, answer
from headrace.server.protocols.executions import Executions
from headrace.server.protocols.json_rpc import (
    INVALID_PARAMS,
    INVALID_REQUEST,
    METHOD_NOT_FOUND,
    Call,
    Refused,
    read_call,
    refusal,
    success,
)
from headrace.server.protocols.mcp_objects import (
    HEADER_MISMATCH,
    STATUS_OF,
    CallToolParams,
    InitializeParams,
    ListParams,
    ToolWords,
    check_version,
    discovered,
    initialized,
    input_of,
    is_modern,
    problem_of,
    tool_list,
)
from headrace.server.protocols.profile import Profiles

PATH = "/mcp"

_PAGE = 50
_CURSOR_DIGITS = 6
_ROUTING = frozenset({"mcp-protocol-version", "mcp-method", "mcp-name"})
"""Headers that say what the body says; which of two would count is a question not to be asked."""
_ACCEPTED = Answer(b"", 202, ())

Method = Callable[[Exchange, Call], Awaitable[Answer | Streamed]]


class McpDoor:
    """The operations of MCP on the agents of one host."""

    def __init__(self, host: AgentHost, executions: Executions, profiles: Profiles) -> None:
        self._host = host
        self._executions = executions
        self._profiles = profiles
        self._modern: Mapping[str, Method] = MappingProxyType(
            {"server/discover": self._discover, "tools/list": self._list, "tools/call": self._call}
        )
        self._legacy: Mapping[str, Method] = MappingProxyType(
            {
                "initialize": self._initialize,
                "ping": self._ping,
                "tools/list": self._legacy_list,
                "tools/call": self._legacy_call,
            }
        )

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this door opens."""
        return (
            Operation(
                method="POST",
                path=PATH,
                name="mcpCall",
                summary="A JSON-RPC call of MCP: the agents are its tools.",
                handler=self.call,
                permission="agent:execute",
                headers={
                    "MCP-Protocol-Version": "The revision, as the body has it.",
                    "Mcp-Method": "The method, as the body has it.",
                    "Mcp-Name": "The name of the tool, as the body has it.",
                },
                answers={200: None, 202: None},
                failures=(403,),
            ),
        )

    async def call(self, exchange: Exchange) -> Answer | Streamed:
        """One call, answered in MCP's words."""
        call: Call | None = None
        modern = True
        try:
            call = await read_call(exchange)
            headers = _headers_of(exchange)
            if call.is_notification:
                return _noted(headers)
            modern = is_modern(call, headers)
            return await self._method_of(call, modern=modern)(exchange, call)
        except Refused as error:
            if modern and error.status == 200:
                error.status = STATUS_OF.get(error.code, 200)
            return refusal(None if call is None else call.reply_id, error)
        except HeadraceError as error:
            return refusal(None if call is None else call.reply_id, problem_of(error))

    def _method_of(self, call: Call, *, modern: bool) -> Method:
        method = (self._modern if modern else self._legacy).get(call.method)
        if method is None:
            raise Refused(METHOD_NOT_FOUND, f"There is no method {shown(call.method)}.")
        return method

    async def _discover(self, exchange: Exchange, call: Call) -> Answer:
        return answer(success(call.reply_id, discovered()))

    async def _initialize(self, exchange: Exchange, call: Call) -> Answer:
        return answer(success(call.reply_id, initialized(call.arguments(InitializeParams))))

    async def _ping(self, exchange: Exchange, call: Call) -> Answer:
        return answer(success(call.reply_id, {}))

    async def _list(self, exchange: Exchange, call: Call) -> Answer:
        return await self._listed(exchange, call, modern=True)

    async def _legacy_list(self, exchange: Exchange, call: Call) -> Answer:
        return await self._listed(exchange, call, modern=False)

    async def _call(self, exchange: Exchange, call: Call) -> Streamed:
        return await self._called(exchange, call, modern=True)

    async def _legacy_call(self, exchange: Exchange, call: Call) -> Streamed:
        return await self._called(exchange, call, modern=False)

    async def _listed(self, exchange: Exchange, call: Call, *, modern: bool) -> Answer:
        """A page of tools, by id; the cursor is the number of the page, which is no secret."""
        cursor = call.arguments(ListParams).cursor
        page = _page_of(cursor)
        found, total = await self._host.agents(tenant=exchange.tenant, offset=page * _PAGE, limit=_PAGE)
        profiles = [await self._profiles.of(agent) for agent, _ in found]
        following = str(page + 1) if (page + 1) * _PAGE < total else None
        return answer(success(call.reply_id, tool_list(profiles, next_cursor=following, modern=modern)))

    async def _called(self, exchange: Exchange, call: Call, *, modern: bool) -> Streamed:
        params = call.arguments(CallToolParams)
        if not _reads_streams(exchange):
            raise Refused(INVALID_REQUEST, "The call is answered as text/event-stream; accept that, too.", status=406)
        self._executions.admit(exchange.tenant)
        unknown = Refused(INVALID_PARAMS, f"Unknown tool: {shown(params.name)}")
        if not is_id(params.name):
            raise unknown
        try:
            profile = await self._profiles.find(params.name, tenant=exchange.tenant)
            execution = await self._executions.begin(
                profile.agent_id, input_of(profile, params), tenant=exchange.tenant
            )
        except AgentNotFound as error:
            raise unknown from error
        words = ToolWords(call.reply_id, profile, params.progress_token, modern=modern)
        return self._executions.streamed(execution, words, is_left_cancelled=modern)


def _headers_of(exchange: Exchange) -> dict[str, str]:
    """The routing headers. Raises `Refused` for one that is there twice."""
    found: dict[str, str] = {}
    for raw_name, value in exchange.scope["headers"]:
        name = raw_name.decode("latin-1")
        if name in _ROUTING:
            if name in found:
                raise Refused(HEADER_MISMATCH, f"The header {name} is there twice.")
            found[name] = value.decode("latin-1")
    return found


def _noted(headers: Mapping[str, str]) -> Answer:
    """A notification is taken, and nothing comes of it: without a session none of a client's means anything."""
    version = headers.get("mcp-protocol-version")
    if version is not None:
        check_version(version)
    return _ACCEPTED


def _page_of(cursor: str | None) -> int:
    if cursor is None:
        return 0
    if not (cursor.isascii() and cursor.isdigit() and len(cursor) <= _CURSOR_DIGITS):
        raise Refused(INVALID_PARAMS, f"The cursor {shown(cursor)} is none of ours.")
    return int(cursor)


def _reads_streams(exchange: Exchange) -> bool:
    accepted = exchange.header(b"accept")
    if accepted is None:
        return True
    kinds = {kind.partition(";")[0].strip().lower() for kind in accepted.split(",")}
    return not kinds.isdisjoint({"text/event-stream", "text/*", "*/*"})
