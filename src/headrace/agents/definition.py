"""From source text to something that can be executed."""

import builtins
import hashlib
import inspect
import itertools
import sys
import types
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.agents.adapters import hosted, is_hosted
from headrace.agents.code.compilation import CodePolicy, Refusal, compile_source, measured
from headrace.agents.code.fingerprint import Interpreter
from headrace.errors import AgentInvalid, AgentUnhealthy

if TYPE_CHECKING:  # isolated workers load definitions, and are to know nothing of caches, keys and drivers
    from headrace.agents.code.cache import CodeCache

HOOKS = ("start", "check", "get_capabilities", "stop")
"""Methods that are called on one instance for all of them."""

_loads = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What was deployed: one version of one agent."""

    agent_id: str
    version: str
    text: str
    entrypoint: str = "Agent"
    timeout_s: float | None = None
    dependencies: tuple[str, ...] = ()
    """Requirements that it declares; what its import statements name is known without."""

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
    caretaker: Callable[[], Any] | None = None
    """Makes the instance whose hooks are called for all of them; None when it has no hooks."""

    def unload(self) -> None:
        """Forget the module; executions under way keep what they hold."""
        sys.modules.pop(self.module, None)


def load(source: Source, *, bytes_max: int, code_cache: "CodeCache | None" = None) -> Definition:
    """Compile the source's module, or take it from the code cache; run it, and find its entrypoint.

    Definitions of one source share its code through the cache, and nothing else: each has a module of its own. Runs
    the module's top level: call it off the event loop. Raises `AgentInvalid` with the line and the reason.
    """
    code = _code(source, bytes_max, code_cache)
    filename = f"<agent {source.agent_id} {source.version}>"
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


def _code(source: Source, bytes_max: int, code_cache: "CodeCache | None") -> types.CodeType:
    policy = CodePolicy(source_bytes_max=bytes_max)
    if code_cache is not None:
        encoded = measured(source.text, policy)
        if isinstance(encoded, Refusal):
            raise encoded.error(source.agent_id)
        return code_cache.compile(source.agent_id, source.text, source.dependencies).code
    outcome = compile_source(source.text, policy=policy, interpreter=Interpreter.current())
    if isinstance(outcome, Refusal):
        raise outcome.error(source.agent_id)
    return outcome.code


def _found(source: Source, module: types.ModuleType) -> Definition:
    entry = hosted(module.__dict__.get(source.entrypoint))
    if entry is None:
        raise AgentInvalid(
            f"The source of {source.agent_id!r} has no {source.entrypoint!r}.{_candidates(module)}",
            fix="Define `class Agent` with `async def execute(self, input, context)`, or name the entrypoint.",
        )
    if not _is_entry(entry):
        raise AgentInvalid(
            f"{source.entrypoint!r} in the source of {source.agent_id!r} cannot be executed.{_candidates(module)}",
            fix="Name a class with an `execute(self, input, context)` method, an `async def` function, or an agent "
            "object of Agno, Pydantic AI or LangGraph.",
        )
    is_class = inspect.isclass(entry)
    make = _of_class(entry) if is_class else _of_function(entry)
    is_streaming = is_class and inspect.isasyncgenfunction(entry.execute)
    has_hooks = is_class and any(callable(getattr(entry, hook, None)) for hook in HOOKS)
    return Definition(
        agent_id=source.agent_id,
        version=source.version,
        sha256=source.sha256,
        make=partial(_streaming, make) if is_streaming else make,
        is_async=not is_class or is_streaming or inspect.iscoroutinefunction(entry.execute),
        timeout_s=source.timeout_s,
        module=module.__name__,
        caretaker=entry if has_hooks else None,
    )


def _candidates(module: types.ModuleType) -> str:
    names = [name for name, thing in module.__dict__.items() if _is_entry(thing) or is_hosted(thing)]
    return f" It has {', '.join(sorted(names))}." if names else ""


def _of_class(entry: Any) -> Callable[[], Callable[[Any, Any], Any]]:
    return lambda: entry().execute


def _of_function(entry: Any) -> Callable[[], Callable[[Any, Any], Any]]:
    return lambda: entry


def _streaming(make: Callable[[], Callable[[Any, Any], Any]]) -> Callable[[Any, Any], Any]:
    """An asynchronous generator as an agent: it emits what it yields, and its output is what it yielded last."""
    execute = make()

    async def run(value: Any, context: Any) -> Any:
        last = None
        async with aclosing(execute(value, context)) as items:
            async for last in items:
                context.emit(last)
        return last

    return run


def unhealthy(agent_id: str, version: str, hook: str, reason: str) -> AgentUnhealthy:
    """The error for a hook that fails."""
    return AgentUnhealthy(f"{hook}() of {agent_id!r} {version} fails: {reason}.")


def _is_entry(thing: Any) -> bool:
    if inspect.isclass(thing):
        return callable(getattr(thing, "execute", None))
    return inspect.iscoroutinefunction(thing)
