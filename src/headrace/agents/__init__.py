"""Agents: Python source that is deployed, executed and watched while the service runs."""

from headrace.agents.config import AgentsConfig
from headrace.agents.definition import Definition, Source
from headrace.agents.execution import Context, Execution, Progress
from headrace.agents.host import AgentHost, AgentStatus
from headrace.agents.store import Agent, Deployment, Totals

__all__ = [
    "Agent",
    "AgentHost",
    "AgentStatus",
    "AgentsConfig",
    "Context",
    "Definition",
    "Deployment",
    "Execution",
    "Progress",
    "Source",
    "Totals",
]
