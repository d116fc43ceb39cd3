"""Agents: Python source that is deployed, executed and watched while the service runs."""

from headrace.agents.code.cache import CodeCache, CodeStatistics
from headrace.agents.code.compilation import CodePolicy, CompiledAgent
from headrace.agents.config import AgentsConfig, TenantConfig, TierConfig
from headrace.agents.definition import Definition, Source
from headrace.agents.execution import Context, Execution, Progress
from headrace.agents.host import AgentHost, AgentStatus
from headrace.agents.isolation import IsolationConfig, Limits
from headrace.agents.running.streams import Emitted
from headrace.agents.store import Agent, Canary, Deployment, Totals, Version

__all__ = [
    "Agent",
    "AgentHost",
    "AgentStatus",
    "AgentsConfig",
    "Canary",
    "CodeCache",
    "CodePolicy",
    "CodeStatistics",
    "CompiledAgent",
    "Context",
    "Definition",
    "Deployment",
    "Emitted",
    "Execution",
    "IsolationConfig",
    "Limits",
    "Progress",
    "Source",
    "TenantConfig",
    "TierConfig",
    "Totals",
    "Version",
]
