"""Where agents, versions and executions stand in the API's paths, and what they may be called."""

import re
from typing import Annotated

from msgspec import Meta

from headrace.errors import AgentNotFound, DeploymentNotFound, ExecutionNotFound, VersionNotFound
from headrace.server.exchange import Exchange

PREFIX = "/api/v1/agents"
AGENT = f"{PREFIX}/{{agent_id}}"
EXECUTION = f"{AGENT}/executions/{{execution_id}}"
DEPLOYMENT = f"{AGENT}/deployments/{{deployment_id}}"
VERSION = f"{AGENT}/versions/{{version}}"
RESERVED = frozenset({"deploy"})
"""Words that stand where an agent's id does in a path."""

# In Python `$` also matches before a newline at the end; in the regular expressions of JSON Schema it does not, and
# they have no `\Z`. This means the same in both.
_END = r"$(?!\n)"
_ID = rf"^[A-Za-z0-9][A-Za-z0-9._-]{{0,127}}{_END}"
_VERSION = rf"^[0-9]{{1,9}}\.[0-9]{{1,9}}\.[0-9]{{1,9}}([-+][0-9A-Za-z.+-]{{1,64}})?{_END}"

Id = Annotated[str, Meta(pattern=_ID, description="Letters, digits, `.`, `_`, `-`.")]
Version = Annotated[str, Meta(pattern=_VERSION, description="A semantic version.")]
VersionOrAlias = Annotated[str, Meta(pattern=_ID, description="A version or an alias.")]
Name = Annotated[str, Meta(pattern=rf"^[A-Za-z_][A-Za-z0-9_]{{0,127}}{_END}", description="A name in Python.")]
Line = Annotated[
    str, Meta(max_length=200, pattern=rf"^[^\x00-\x1f\x7f]*{_END}", description="Text without control characters.")
]

_SHOWN_MAX = 80
"""Characters of a wrong id that its problem repeats."""

is_id = re.compile(_ID).match
_is_version = re.compile(_VERSION).match


def agent_id_of(exchange: Exchange) -> str:
    """What stands in the path, if an agent can be called so; the rooms below take ids as they are."""
    agent_id = exchange.path("agent_id")
    if not is_id(agent_id):
        raise AgentNotFound(f"No agent has the id {shown(agent_id)}, which breaks the rule for ids.")
    return agent_id


def execution_id_of(exchange: Exchange) -> str:
    """What stands in the path, if an execution can be called so."""
    execution_id = exchange.path("execution_id")
    if not is_id(execution_id):
        raise ExecutionNotFound(f"No execution has the id {shown(execution_id)}, which breaks the rule for ids.")
    return execution_id


def deployment_id_of(exchange: Exchange) -> str:
    """What stands in the path, if a deployment can be called so."""
    deployment_id = exchange.path("deployment_id")
    if not is_id(deployment_id):
        raise DeploymentNotFound(f"No deployment has the id {shown(deployment_id)}, which breaks the rule for ids.")
    return deployment_id


def version_of(exchange: Exchange) -> str:
    """What stands in the path, if it is a version."""
    version = exchange.path("version")
    if not _is_version(version):
        raise VersionNotFound(f"{shown(version)} is no semantic version.", fix="Write it as 1.2.3.")
    return version


def shown(text: str) -> str:
    """A text of somebody else's in a message of ours."""
    return repr(text) if len(text) <= _SHOWN_MAX else f"{text[:_SHOWN_MAX]!r}…"
