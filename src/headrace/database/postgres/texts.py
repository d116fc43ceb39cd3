"""What the words of a statement say of how it may be sent. Pure.

A connection serves one caller after the other, and a round trip many at once. What a statement sets for its session,
or for its transaction, must not reach the next caller: so it does not share a trip, and where it outlives the
transaction the connection is closed afterwards. Only the words count: what a function does inside is not seen.
"""

import re
from enum import IntEnum
from functools import lru_cache
from typing import Final

from headrace.errors import CallerError

_TEXTS_MAX: Final = 1000
_GAP: Final = r"(?>\s|--[^\n]*\n|/\*.*?\*/)*+"
_FIRST_WORD: Final = re.compile(rf"(?:{_GAP}[;(])*{_GAP}(\w+)", re.DOTALL)
_WRITES: Final = frozenset({"insert", "update", "delete", "merge", "with"})
_QUERIES: Final = frozenset({"select", "values", "table"})
_COMMITTING: Final = frozenset({"call", "do"})
_LASTING: Final = re.compile(
    rf"""
    (?:^|;){_GAP}(?:set\s+(?!local\b|transaction\b|constraints\b)|reset\b|listen\b|load\b|declare\b.*\bwith\s+hold\b
               |prepare\s+(?!transaction\b))
  | \bpg_(?:try_)?advisory_lock(?:_shared)?\s*\(
  | \bset_config\s*\((?![^()]*,\s*true\s*\))
  | \b(?:create|into)\s+(?:local\s+|global\s+)?temp(?:orary)?\b(?!.*\bon\s+commit\s+drop\b)
    """,
    re.VERBOSE | re.DOTALL | re.IGNORECASE,
)
_HINTS: Final = ("set", "listen", "load", "declare", "prepare", "advisory", "temp")
"""One of these is in every text that leaves something; most of the long ones, full of values, have none."""
_PASSING: Final = re.compile(
    rf"(?:^|;){_GAP}set\b|\bset_config\s*\(|\bpg_(?:try_)?advisory_xact_lock(?:_shared)?\s*\(",
    re.DOTALL | re.IGNORECASE,
)


class Trace(IntEnum):
    """What a statement leaves behind, beside rows."""

    NONE = 0
    TRANSACTION = 1
    """A setting or a lock until the end of the transaction."""
    SESSION = 2
    """A setting, a lock, a temporary table or the like, as long as the connection lives."""


def _first_word(sql: str) -> str:
    found = _FIRST_WORD.match(sql)
    return found[1].lower() if found else ""


@lru_cache(maxsize=_TEXTS_MAX)
def trace_of(sql: str) -> Trace:
    """What it leaves behind, as far as its words tell."""
    lowered = sql.lower()
    if not any(hint in lowered for hint in _HINTS):
        return Trace.NONE
    if _LASTING.search(sql):
        return Trace.SESSION
    return Trace.TRANSACTION if _PASSING.search(sql) else Trace.NONE


@lru_cache(maxsize=_TEXTS_MAX)
def is_copy(sql: str) -> bool:
    """It would turn the conversation around, for everybody on the connection."""
    return _first_word(sql) == "copy"


@lru_cache(maxsize=_TEXTS_MAX)
def is_write(sql: str) -> bool:
    """Whether it can run in a transaction that is made for it."""
    return _first_word(sql) in _WRITES


@lru_cache(maxsize=_TEXTS_MAX)
def is_query(sql: str) -> bool:
    """Whether it only reads, unless a function in it does not."""
    return _first_word(sql) in _QUERIES


@lru_cache(maxsize=_TEXTS_MAX)
def may_commit(sql: str) -> bool:
    """Whether something of it may be kept although its end is not: it can have a COMMIT inside."""
    return _first_word(sql) in _COMMITTING or ";" in sql.rstrip("; \n")


def check_groupable(sql: str) -> None:
    """Refuse what would end or forbid the transaction of the others, or act on their statements."""
    if not is_write(sql) or trace_of(sql):
        raise CallerError(
            f"Only INSERT, UPDATE, DELETE and MERGE can be grouped, and no settings or locks, not {sql[:40]!r}.",
            fix="Leave out grouped=True.",
        )
