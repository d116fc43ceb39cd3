"""Doors to the agents in protocols that others have agreed on: A2A for agents, MCP for models, AG-UI for pages.

Each is a mapping onto the same host, behind the same keys, permissions and limits as our own API, and closed until the
configuration opens it. They speak their protocols themselves, without the protocols' libraries, which prove them in
the tests.
"""

from headrace.agents import AgentHost
from headrace.config import Config
from headrace.server.event_stream import EventStreams
from headrace.server.exchange import Operation

_WAIT = 0.9
"""The part of a request's time after which a client that waits for a task gets it as it is."""


def protocol_operations(host: AgentHost, streams: EventStreams, config: Config) -> tuple[Operation, ...]:
    """The operations of the doors that `config.protocols` opens; a closed one is not even imported."""
    protocols = config.protocols
    if not (protocols.a2a or protocols.mcp or protocols.ag_ui):
        return ()
    from headrace.server.protocols.executions import Executions
    from headrace.server.protocols.profile import Profiles

    executions, profiles = Executions(host, streams), Profiles(host)
    found: list[Operation] = []
    if protocols.a2a:
        from headrace.server.protocols.a2a import A2ADoor

        door = A2ADoor(
            host,
            executions,
            profiles,
            has_keys=bool(config.server.token),
            wait_s=_WAIT * config.server.request_timeout_s,
            url=protocols.url,
            root_agent=protocols.a2a_root_agent,
        )
        found += door.operations()
    if protocols.mcp:
        from headrace.server.protocols.mcp import McpDoor

        found += McpDoor(host, executions, profiles).operations()
    if protocols.ag_ui:
        from headrace.server.protocols.ag_ui import AgUiDoor

        found += AgUiDoor(executions, profiles).operations()
    return tuple(found)


__all__ = ["protocol_operations"]
