"""What executions put out, sorted into what people read and what programs read."""

from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from headrace.agents import Emitted, Execution

_ANSWER: Final = frozenset({"text", "data", "usage"})
"""The fields of an answer of a hosted framework's agent (`headrace.agents.adapters`)."""
_ATTEMPT_BITS = 32
"""Ids of events count on from a multiple of 2**32 in each attempt."""


class Usage(msgspec.Struct, frozen=True):
    """Tokens that models say they used."""

    input_tokens: int = 0
    output_tokens: int = 0


class Content(msgspec.Struct, frozen=True):
    """An output in parts."""

    text: str | None = None
    data: Any | UnsetType = UNSET
    usage: Usage | None = None


def content_of(execution: Execution) -> Content:
    """Text is text, a framework's answer is taken apart, anything else is data; None is nothing."""
    match execution.output:
        case None:
            return Content()
        case str(text):
            return Content(text)
        case {"text": str() | None as text, "data": data, "usage": usage, **others} if not others:
            return Content(text, UNSET if data is None else data, _usage(usage))
        case output:
            return Content(data=output)


def attempt_of(event: Emitted) -> int:
    """Which attempt said it: what an earlier one said is not part of the same text."""
    return event.id >> _ATTEMPT_BITS


def _usage(said: Any) -> Usage | None:
    try:
        return msgspec.convert(said, Usage)
    except msgspec.ValidationError:
        return None
