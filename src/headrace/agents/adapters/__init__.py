"""Agents of other frameworks, hosted as they are: Agno, Pydantic AI, LangGraph."""

from headrace.agents.adapters.exchange import Answer, Request, Usage
from headrace.agents.adapters.hosted import current_context, hosted, is_hosted

__all__ = ["Answer", "Request", "Usage", "current_context", "hosted", "is_hosted"]
