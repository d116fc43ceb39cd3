"""From source text to a code object, or to the reason why not. Runs none of it.

The parser and compiler of CPython hold the interpreter's lock and were not made for enemies: an f-string of 300,000
fields takes Python 3.11 a minute, half a million names take a gigabyte. So text and tree are measured before each
step. That bounds the damage to about a second; it does not make foreign code safe to compile in a process that others
depend on.
"""

import ast
import hashlib
import re
import threading
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from headrace.agents.code.fingerprint import Interpreter, imported_modules
from headrace.errors import AgentInvalid, ConfigError

# No word or sign makes more than two nodes of a tree, and so no character does: "-" is an operation and its kind.
_NODES_A_CHARACTER = 2
_TREE = threading.Lock()
"""CPython 3.11 counts the depth of all threads' syntax trees in one place, and raises SystemError when they mix."""
_LEXEME = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True, kw_only=True)
class CodePolicy:
    """Which sources are compiled at all. Part of every key: under another policy everything is compiled anew."""

    source_bytes_max: int = 1 << 20
    """Largest source, in UTF-8."""
    nodes_max: int = 50_000
    """Most nodes of the syntax tree, about 300 kB of ordinary code; twice as many words and signs."""
    version: int = 1
    """Raise it to have everything compiled again."""

    def __post_init__(self) -> None:
        """Refuse limits that nothing could meet."""
        for name in ("source_bytes_max", "nodes_max"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"CodePolicy.{name} is {getattr(self, name)}; it must be above 0.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledAgent:
    """A source that was compiled, shared by every agent that has it. Nothing of it has run."""

    code: types.CodeType
    metadata: Mapping[str, Any]
    """What the source says of itself: `definitions` (its top-level classes and functions), `imports` (modules outside
    the standard library), `lines` and `source_bytes`."""
    compiled_at: float
    """Seconds since 1970-01-01 UTC."""
    compile_ms: float
    dependencies: Mapping[str, str]
    """The version of each distribution that is declared or imported; "" for one that is not installed."""
    source_sha256: str
    key: str
    """The name of all that it was made of: source, interpreter, policy and dependencies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a source is not compiled."""

    reason: str
    """The end of a sentence that begins with "The source of 'agent'"."""
    fix: str | None = None
    is_lasting: bool = True
    """False when it may be the moment's fault: memory that was short, a stack that was deep."""

    def error(self, agent_id: str) -> AgentInvalid:
        """What the caller gets."""
        return AgentInvalid(f"The source of {agent_id!r} {self.reason}", fix=self.fix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compilation:
    """What comes out of a source alone, before anybody asked what is installed."""

    code: types.CodeType
    metadata: Mapping[str, Any]
    imports: tuple[str, ...]


def measured(text: str, policy: CodePolicy) -> bytes | Refusal:
    """The bytes of a source that is text and short enough."""
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        return Refusal(reason=f"is not text: character {error.start:,} is half of a surrogate pair.")
    if len(encoded) <= policy.source_bytes_max:
        return encoded
    return Refusal(
        reason=f"is {len(encoded):,} bytes; at most {policy.source_bytes_max:,} are accepted.",
        fix="Shorten it, move data out of it, or raise agents.source_bytes_max.",
    )


def compile_source(text: str, *, policy: CodePolicy, interpreter: Interpreter) -> Compilation | Refusal:
    """Measure and compile a source. Blocks for about a millisecond for each 6 kB."""
    encoded = measured(text, policy)
    if isinstance(encoded, Refusal):
        return encoded
    if refusal := _too_many_words(text, policy):
        return refusal
    try:
        if refusal := _too_many_nodes(text, policy):
            return refusal
        code = compile(
            text,
            f"<agent {hashlib.sha256(encoded).hexdigest()[:12]}>",
            "exec",
            flags=interpreter.flags,
            dont_inherit=True,
            optimize=interpreter.optimize,
        )
    except SyntaxError as error:
        line = f" at line {error.lineno}" if error.lineno else ""
        return Refusal(reason=f"does not compile{line}: {error.msg}.")
    except (ValueError, OverflowError) as error:
        return Refusal(reason=f"does not compile: {error}.")
    except (MemoryError, RecursionError):
        return Refusal(
            reason="does not compile: it is nested too deeply.",
            fix="Split long expressions; build long texts and tables in a loop.",
            is_lasting=False,
        )
    imports = imported_modules(code)
    metadata = {
        "definitions": [name for name in _inner_names(code) if name.isidentifier()],
        "imports": list(imports),
        "lines": len(text.splitlines()),
        "source_bytes": len(encoded),
    }
    return Compilation(code=code, metadata=metadata, imports=imports)


def _inner_names(code: types.CodeType) -> Iterator[str]:
    return (constant.co_name for constant in code.co_consts if isinstance(constant, types.CodeType))


def _too_many_words(text: str, policy: CodePolicy) -> Refusal | None:
    """Before the parser builds anything: a tree grows with the words and signs of its text."""
    limit = _NODES_A_CHARACTER * policy.nodes_max
    if len(text) <= limit or sum(1 for _ in _LEXEME.finditer(text)) <= limit:
        return None
    return Refusal(
        reason=f"has more than {limit:,} words and signs.",
        fix="Move data out of it, or raise CodePolicy.nodes_max.",
    )


def _too_many_nodes(text: str, policy: CodePolicy) -> Refusal | None:
    """Before it is compiled; a text too short for so many is not parsed twice for it."""
    if _NODES_A_CHARACTER * len(text) <= policy.nodes_max:
        return None
    with _TREE:
        tree = ast.parse(text)
    nodes = sum(1 for _ in ast.walk(tree))
    if nodes <= policy.nodes_max:
        return None
    return Refusal(
        reason=f"has {nodes:,} nodes in its syntax tree; at most {policy.nodes_max:,} are accepted.",
        fix="Move data out of it, or raise CodePolicy.nodes_max.",
    )
