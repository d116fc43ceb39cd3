"""From source text to something that can be executed."""

import builtins
import hashlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from headrace.errors import AgentInvalid

_loads = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What was deployed: one version of one agent."""

    agent_id: str
    version: str
    text: str
    entrypoint: str = "Agent"
    timeout_s: float | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Definition:
    """A loaded version of an agent, shared by all its executions."""

    agent_id: str
    version: str
    sha256: str
    make: Callable[[], Callable[[Any, Any], Any]]
    """A fresh `execute` for one execution: instances are never shared, so neither is their state."""
    is_async: bool
    timeout_s: float | None
    module: str
    """Its name in `sys.modules`, where dataclasses and typing look up annotations."""

    def unload(self) -> None:
        """Forget the module; executions under way keep what they hold."""
        sys.modules.pop(self.module, None)


def load(source: Source, *, bytes_max: int) -> Definition:
    """Compile and run the source's module, and find its entrypoint.

    Runs the module's top level: call it off the event loop. Raises `AgentInvalid` with the line and the reason.
    """
    size = len(source.text.encode())
    if size > bytes_max:
        raise AgentInvalid(
            f"The source of {source.agent_id!r} is {size:,} bytes; at most {bytes_max:,} are accepted.",
            fix="Shorten it, move data out of it, or raise agents.source_bytes_max.",
        )
    filename = f"<agent {source.agent_id} {source.version}>"
    try:
        code = compile(source.text, filename, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f" at line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        raise AgentInvalid(f"The source of {source.agent_id!r} does not compile{line}: {error}.") from error
    module = types.ModuleType(f"headrace_agent_{next(_loads)}", f"Agent {source.agent_id} {source.version}")
    module.__dict__.update(__builtins__=builtins, __file__=filename)
    sys.modules[module.__name__] = module
    try:
        exec(code, module.__dict__)  # noqa: S102 - to run deployed code is what this room is for
        return _found(source, module)
    except AgentInvalid:
        sys.modules.pop(module.__name__, None)
        raise
    except (Exception, SystemExit) as error:
        sys.modules.pop(module.__name__, None)
        raise AgentInvalid(
            f"The source of {source.agent_id!r} fails when it is loaded: {type(error).__name__}: {error}."
        ) from error


def _found(source: Source, module: types.ModuleType) -> Definition:
    entry = module.__dict__.get(source.entrypoint)
    if entry is None:
        candidates = [name for name, thing in module.__dict__.items() if _is_entry(thing)]
        named = f" It has {', '.join(sorted(candidates))}." if candidates else ""
        raise AgentInvalid(
            f"The source of {source.agent_id!r} has no {source.entrypoint!r}.{named}",
            fix="Define `class Agent` with `async def execute(self, input, context)`, or name the entrypoint.",
        )
    if not _is_entry(entry):
        raise AgentInvalid(
            f"{source.entrypoint!r} in the source of {source.agent_id!r} cannot be executed.",
            fix="Make it a class with an `execute(self, input, context)` method, or an `async def` function.",
        )
    is_class = inspect.isclass(entry)
    return Definition(
        agent_id=source.agent_id,
        version=source.version,
        sha256=source.sha256,
        make=_of_class(entry) if is_class else _of_function(entry),
        is_async=inspect.iscoroutinefunction(entry.execute) if is_class else True,
        timeout_s=source.timeout_s,
        module=module.__name__,
    )


def _of_class(entry: Any) -> Callable[[], Callable[[Any, Any], Any]]:
    return lambda: entry().execute


def _of_function(entry: Any) -> Callable[[], Callable[[Any, Any], Any]]:
    return lambda: entry


def _is_entry(thing: Any) -> bool:
    if inspect.isclass(thing):
        return callable(getattr(thing, "execute", None))
    return inspect.iscoroutinefunction(thing)
