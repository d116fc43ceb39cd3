"""Profiles of agents for tests."""

from typing import Any

import msgspec

from headrace.agents import Agent
from headrace.server.protocols.profile import Profile, profile_of


def agent() -> Agent:
    """An agent in service."""
    return Agent(
        tenant="default",
        agent_id="a",
        name="An agent",
        tags=("tagged",),
        version="1.0.0",
        source_sha256="",
        created_at=0.0,
        updated_at=0.0,
    )


def profile(said: Any = None, **capabilities: Any) -> Profile:
    """The profile of an agent whose `get_capabilities` returned these, or else `said`."""
    return profile_of(agent(), msgspec.Raw(msgspec.json.encode(capabilities or said)))
