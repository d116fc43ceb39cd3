"""The statements that a database runs, how often and how long: what index advice is weighed against. Pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

from headrace.database.query_cache.text import Kind, Token, normalised, tokens
from headrace.errors import CallerError

SAMPLES_MAX: Final = 3
"""Parameters that are remembered of one statement."""
QUERIES_MAX: Final = 200
"""Statements that are weighed: those on which most time was spent."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A statement that can be run as it stands."""

    sql: str
    params: tuple[Any, ...] = ()


@dataclass(frozen=True, slots=True)
class Query:
    """One statement of a workload, whatever its parameters."""

    text: str
    """With `$1`, `$2` ... in the place of what differs from call to call."""
    calls: int = 1
    mean_ms: float | None = None
    """None: not measured."""
    samples: tuple[Sample, ...] = ()
    """How it was called; empty: with parameters that nobody noted, so that they are made from statistics."""

    @property
    def total_ms(self) -> float:
        """All the time that it took; 0 if it was not measured."""
        return self.calls * (self.mean_ms or 0.0)


@dataclass(frozen=True, slots=True)
class Workload:
    """The statements of a while."""

    queries: tuple[Query, ...]
    source: str = "given"
    """Where it comes from, for people."""
    seconds: float | None = None
    """How long the while was, so that writes can be set against it; None: not known."""
    notes: tuple[str, ...] = field(default=())
    """What it lacks."""

    @classmethod
    def of(cls, statements: "Workload | Iterable[Query | str]") -> "Workload":
        """A workload from texts and queries; the texts count as one call each."""
        if isinstance(statements, Workload):
            return statements
        queries = tuple(Query(each, samples=(Sample(each),)) if isinstance(each, str) else each for each in statements)
        if not queries:
            raise CallerError("The workload has no statements.", fix="Give at least one, or None for those observed.")
        return cls(queries)

    def heaviest(self, count: int = QUERIES_MAX) -> "Workload":
        """Only the statements on which most time was spent."""
        if len(self.queries) <= count:
            return self
        ordered = sorted(self.queries, key=lambda each: (each.total_ms, each.calls), reverse=True)
        left = len(self.queries) - count
        notes = (*self.notes, f"{left} lighter statements left out")
        return replace(self, queries=tuple(ordered[:count]), notes=notes)


def merged(workloads: Sequence[Workload]) -> Workload:
    """What several shards ran, as one: the calls of a statement are added up."""
    found: dict[str, Query] = {}
    for query in (query for workload in workloads for query in workload.queries):
        before = found.get(query.text)
        if before is None:
            found[query.text] = query
            continue
        calls = before.calls + query.calls
        mean_ms = (before.total_ms + query.total_ms) / max(1, calls)
        samples = (before.samples + query.samples)[:SAMPLES_MAX]
        found[query.text] = Query(query.text, calls, mean_ms, samples)
    seconds = [workload.seconds for workload in workloads if workload.seconds is not None]
    return Workload(
        tuple(found.values()),
        ", ".join(dict.fromkeys(workload.source for workload in workloads)),
        max(seconds, default=None),
        tuple(dict.fromkeys(note for workload in workloads for note in workload.notes)),
    )


def parametrised(sql: str) -> str:
    """The text with every literal as `?`: what statements that differ only in them have in common."""
    parts = [
        token._replace(text="?") if token.kind is Kind.STRING or re.match(r"\.?\d", token.text) else token
        for token in tokens(sql)
    ]
    return normalised(parts)


def statements(text: str) -> list[str]:
    """The statements of a file, which end with semicolons."""
    found: list[list[Token]] = [[]]
    for token in tokens(text):
        if token.text == ";":
            found.append([])
        else:
            found[-1].append(token)
    return [normalised(each) for each in found if each]
