"""Where a workload comes from: what pg_stat_statements tells of a shard, or what this process sees itself."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from headrace.clock import Clock
from headrace.database.indexes.workload import QUERIES_MAX, SAMPLES_MAX, Query, Sample, Workload, parametrised
from headrace.database.postgres.nodes import Node
from headrace.errors import CallerError

_TEXT_CHARACTERS_MAX: Final = 20_000
_VALUE_MAX: Final = 1000
"""Characters, bytes or items of one parameter of a call that is remembered: it stays in memory for long."""

_STATISTICS: Final = """
SELECT n.nspname FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace
WHERE e.extname = 'pg_stat_statements'
    AND current_setting('shared_preload_libraries') LIKE '%pg_stat_statements%'"""
_STATEMENTS: Final = """
SELECT query, sum(calls)::bigint, sum(total_exec_time) / greatest(sum(calls), 1)
FROM {schema}.pg_stat_statements
WHERE dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) AND toplevel AND calls > 0
    AND query ~* '^[\\s(]*(select|with|insert|update|delete|merge|values)\\y'
    AND query !~* 'headrace_|pg_catalog|pg_stat|pg_class|hypopg|information_schema'
GROUP BY query ORDER BY sum(total_exec_time) DESC LIMIT $1"""
_SINCE: Final = """
SELECT extract(epoch FROM now() - stats_reset)::float8, dealloc FROM {schema}.pg_stat_statements_info"""


async def read_statistics(node: Node) -> Workload | None:
    """What `pg_stat_statements` tells of a shard; None: it is not installed and loaded there."""
    schemas = await node.fetch(_STATISTICS, read_only=True)
    if not schemas:
        return None
    schema = '"' + schemas[0][0].replace('"', '""') + '"'
    rows = await node.fetch(_STATEMENTS.format(schema=schema), (QUERIES_MAX,), read_only=True)
    seconds, evicted = (await node.fetch(_SINCE.format(schema=schema), read_only=True))[0]
    notes = () if not evicted else (f"{node.name}: pg_stat_statements.max was reached {evicted} times; some are lost",)
    queries = tuple(Query(text, calls, mean_ms) for text, calls, mean_ms in rows)
    return Workload(queries, "pg_stat_statements", seconds, notes)


@dataclass(slots=True)
class _Entry:
    calls: int = 0
    total_s: float = 0.0
    samples: list[Sample] = field(default_factory=list)


class StatementHistogram:
    """What this process itself sees of its statements, for servers without pg_stat_statements.

    One in `every` calls is timed and counts for that many. At most `statements_max` statements are kept; the one that
    was seen longest ago goes first.
    """

    def __init__(self, *, every: int, statements_max: int, clock: Clock) -> None:
        self._every = every
        self._clock = clock
        self._statements_max = statements_max
        self._left = every
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._texts: OrderedDict[str, str] = OrderedDict()
        self._began: float | None = None
        self._ended = 0.0
        self.forgotten = 0
        """Statements that had to go."""

    def is_due(self, *, skipping: bool = False) -> bool:
        """Whether the call that begins now is one to be timed. Never true twice in a row, nor of one to be skipped."""
        if skipping:
            return False
        self._left -= 1
        if self._left > 0 or self._every == 0:
            return False
        self._left = self._every + 1
        return True

    @contextmanager
    def timing(self, sql: str, params: Sequence[Any]) -> Iterator[None]:
        """Note the call inside, if it succeeds."""
        began = self._clock.monotonic()
        yield
        self.note(sql, params, began, self._clock.monotonic())

    def note(self, sql: str, params: Sequence[Any], began: float, ended: float) -> None:
        """A call ran from `began` to `ended`, in seconds of a monotonic clock."""
        text = self._text(sql)
        if text is None:
            return
        entry = self._entries.get(text)
        if entry is None:
            entry = self._entries[text] = _Entry()
            if len(self._entries) > self._statements_max:
                self._entries.popitem(last=False)
                self.forgotten += 1
        else:
            self._entries.move_to_end(text)
        self._began = began if self._began is None else self._began
        self._ended = ended
        entry.calls += self._every
        entry.total_s += (ended - began) * self._every
        if any(len(value) > _VALUE_MAX for value in params if isinstance(value, Sized)):
            return  # counted, and not remembered
        if len(entry.samples) < SAMPLES_MAX:
            entry.samples.append(Sample(sql, tuple(params)))
        else:
            entry.samples[entry.calls // self._every % SAMPLES_MAX] = Sample(sql, tuple(params))

    def workload(self) -> Workload:
        """What was seen so far."""
        queries = tuple(
            Query(text, entry.calls, entry.total_s / entry.calls * 1000, tuple(entry.samples))
            for text, entry in self._entries.items()
        )
        notes: tuple[str, ...] = (
            f"one in {self._every} statements of this process alone; those in transactions are not seen",
        )
        if self.forgotten:
            notes += (f"{self.forgotten} statements were forgotten",)
        seconds = self._ended - self._began if self._began is not None else None
        return Workload(queries, "statements seen by this process", seconds or None, notes)

    def _text(self, sql: str) -> str | None:
        found = self._texts.get(sql)
        if found is None:
            if len(sql) > _TEXT_CHARACTERS_MAX:
                return None
            try:
                found = parametrised(sql)
            except CallerError:
                return None
            self._texts[sql] = found
            if len(self._texts) > self._statements_max:
                self._texts.popitem(last=False)
        return found
