"""What an agent says of itself, as far as other agents, models and pages want to know it.

`get_capabilities` may return anything. A dict may have the keys `description`, `input_schema` and `output_schema`
(JSON Schema), `input_modes` and `output_modes` (media types), `skills` (as in an A2A card) and `ag_ui` (`prompt` or
`run`); what has another shape than it should is passed over, for it is the agent's own and nobody else's mistake.
"""

from collections import OrderedDict
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from headrace.agents import Agent, AgentHost

T = TypeVar("T")
AgUiInput = Literal["prompt", "run"]

DEFAULT_MODES = ("text/plain", "application/json")
_DESCRIPTION_MAX = 4_000
_SCHEMA_BYTES_MAX = 64 * 1024
_KNOWN_MAX = 1_000
"""Agents whose profile a process remembers."""
_MIRRORED = "x-mcp-header"
"""Would have callers repeat arguments in headers of HTTP, which no agent sees."""

_Line = Annotated[str, Meta(min_length=1, max_length=200)]


class Skill(msgspec.Struct, frozen=True, kw_only=True):
    """Something that the agent can do, as an A2A card tells it."""

    id: _Line
    name: _Line
    description: Annotated[str, Meta(max_length=_DESCRIPTION_MAX)]
    tags: tuple[_Line, ...] = ()
    examples: tuple[str, ...] = ()


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """An agent in service, as it presents itself."""

    agent_id: str
    name: str
    version: str
    tags: tuple[str, ...]
    description: str
    input_schema: dict[str, Any] | None
    """Of an object: the fields of the input. None: the input is any JSON."""
    output_schema: dict[str, Any] | None
    input_modes: tuple[str, ...]
    output_modes: tuple[str, ...]
    skills: tuple[Skill, ...]
    """At least one."""
    ag_ui: AgUiInput
    """What a page's run becomes: the last prompt, or all that the page sent."""

    def takes(self, media_type: str) -> bool:
        """Whether it says that it can read this."""
        return any(fnmatchcase(media_type.lower(), mode.lower()) for mode in self.input_modes)


class Profiles:
    """The profiles of one host's agents; a version's is read once."""

    def __init__(self, host: AgentHost) -> None:
        self._host = host
        self._known: OrderedDict[tuple[str, str, str, float], Profile] = OrderedDict()

    async def find(self, agent_id: str, *, tenant: str) -> Profile:
        """The profile of the version in service. Raises `AgentNotFound`."""
        return await self.of(await self._host.agent(agent_id, tenant=tenant))

    async def of(self, agent: Agent) -> Profile:
        """The profile of an agent that was looked up already."""
        # The time is part of it because a version that is deployed again is asked again.
        key = (agent.tenant, agent.agent_id, agent.version, agent.updated_at)
        known = self._known.get(key)
        if known is None:
            version = await self._host.version(agent.agent_id, agent.version, tenant=agent.tenant)
            known = self._known[key] = profile_of(agent, version.capabilities)
            while len(self._known) > _KNOWN_MAX:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(key)
        return known


def profile_of(agent: Agent, capabilities: msgspec.Raw | None) -> Profile:
    """What an agent and its capabilities say."""
    said = _said(capabilities)
    description = _field(said, "description", str, "")[:_DESCRIPTION_MAX] or f"The agent {agent.name!r}."
    modes = tuple[_Line, ...]
    return Profile(
        agent_id=agent.agent_id,
        name=agent.name,
        version=agent.version,
        tags=agent.tags,
        description=description,
        input_schema=_schema(said, "input_schema", object_only=True),
        output_schema=_schema(said, "output_schema", object_only=False),
        input_modes=_field(said, "input_modes", modes, ()) or DEFAULT_MODES,
        output_modes=_field(said, "output_modes", modes, ()) or DEFAULT_MODES,
        skills=_field(said, "skills", tuple[Skill, ...], ())
        or (Skill(id=agent.agent_id, name=agent.name, description=description, tags=agent.tags),),
        ag_ui=_field(said, "ag_ui", AgUiInput, "prompt"),
    )


def _said(capabilities: msgspec.Raw | None) -> dict[str, Any]:
    try:
        said = None if capabilities is None else msgspec.json.decode(capabilities)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}  # an isolated worker may say anything
    return said if isinstance(said, dict) else {}


def _field(said: Mapping[str, Any], name: str, kind: Any, default: T) -> T:
    try:
        found: T = msgspec.convert(said.get(name, default), kind)
    except msgspec.ValidationError:
        return default
    return found


def _schema(said: Mapping[str, Any], name: str, *, object_only: bool) -> dict[str, Any] | None:
    schema = said.get(name)
    if not isinstance(schema, dict) or (object_only and schema.get("type") != "object"):
        return None
    try:
        if len(msgspec.json.encode(schema)) > _SCHEMA_BYTES_MAX:
            return None
        unmirrored: dict[str, Any] = _without_mirrors(schema)
    except RecursionError:
        return None
    return unmirrored


def _without_mirrors(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: _without_mirrors(value) for name, value in schema.items() if name != _MIRRORED}
    if isinstance(schema, list):
        return [_without_mirrors(value) for value in schema]
    return schema
