"""The door of index advice: what to make, what to drop, with evidence; making it, measured; what was done.

Costs and schema are those of one shard, the largest: shards hold the same tables, and hash alike. Sizes, writes and
budget count all shards. A change is tried on the largest shard first. Where the measured workload becomes slower, it
is taken back on every shard that has it by then, and not made on the others.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from headrace.clock import Clock
from headrace.database.config import DatabaseConfig
from headrace.database.indexes.advice import IndexAdvice, IndexChange, QueryGain, Verdict
from headrace.database.indexes.building import Builder, Progress
from headrace.database.indexes.costs import Capability, Prepared, capability, prepared, what_if
from headrace.database.indexes.extend import Chosen, Limits, Problem, Selection, extend, guessed
from headrace.database.indexes.index import Index, Schema
from headrace.database.indexes.journal import read_journal
from headrace.database.indexes.measuring import QUERIES_MAX
from headrace.database.indexes.observation import StatementHistogram, read_statistics
from headrace.database.indexes.redundant import UNUSED_AFTER_S, Superfluous, superfluous
from headrace.database.indexes.relations import read_schema
from headrace.database.indexes.trial import Trial
from headrace.database.indexes.workload import Query, Workload, merged
from headrace.database.postgres.nodes import Node
from headrace.errors import BackendError, CallerError, StatementFailed
from headrace.events import Observer

_EVIDENCE_QUERIES: Final = 5
_TEND_S: Final = 60.0
CONNECTIONS_MIN: Final = 3

Statements = Workload | Iterable[Query | str]


def _unheard(words: str) -> None:
    """Nobody asked."""


@dataclass(frozen=True, slots=True)
class _Survey:
    """What was found out before the search."""

    schemas: Mapping[str, Schema]
    home: str
    """The largest shard."""
    queries: tuple[Prepared, ...]
    evidence: tuple[str, ...]
    seconds: float | None

    @property
    def schema(self) -> Schema:
        return self.schemas[self.home]

    def problem(self) -> Problem:
        """What is to be made faster."""
        scale, own = {}, self.schema.tables
        writes: dict[str, tuple[float, float, float]] = {}
        for name, table in own.items():
            copies = [schema.tables[name] for schema in self.schemas.values() if name in schema.tables]
            rows = sum(each.rows for each in copies)
            scale[name] = rows / table.rows if table.rows > 0 else float(len(copies))
            writes[name] = (
                sum(each.inserts for each in copies),
                sum(each.updates for each in copies),
                sum(each.deletes for each in copies),
            )
        tables = {
            name: replace(table, inserts=writes[name][0], updates=writes[name][1], deletes=writes[name][2])
            for name, table in own.items()
        }
        age_s, share = self.schema.age_s, None
        if self.seconds is not None and age_s:
            share = min(1.0, self.seconds / age_s)
        return Problem(
            weights=[float(each.query.calls) for each in self.queries],
            uses=[each.uses for each in self.queries],
            schema=replace(self.schema, tables=tables),
            scale=scale,
            write_share=share,
        )


class Indexes:
    """Advice on the indexes of a database, and what was made of it."""

    def __init__(
        self,
        nodes: Callable[[], Sequence[Node]],
        *,
        seen: StatementHistogram,
        config: DatabaseConfig,
        clock: Clock,
        observer: Observer,
    ) -> None:
        self._nodes = nodes
        self._seen = seen
        self._measure_timeout_s = config.indexes.measure_timeout_s
        self._connections_max = config.connections_max
        self._clock = clock
        self._builder = Builder(clock=clock, observer=observer, lock_timeout_s=config.lock_timeout_s)

    async def advise(
        self,
        workload: Statements | None = None,
        *,
        budget_bytes: int | None = None,
        limits: Limits | None = None,
        unused_after_s: float = UNUSED_AFTER_S,
        progress: Progress = _unheard,
    ) -> list[IndexAdvice]:
        """What to create, what to drop, and what was rejected, in this order; nothing is changed.

        Without a `workload` it is what pg_stat_statements has on the shards, else what this process has seen. All new
        indexes together take at most `budget_bytes` on all shards together; None: as much as the tables. Raises
        `CallerError` if there is no statement to go by.
        """
        limits = replace(limits or Limits(), **({} if budget_bytes is None else {"budget_bytes": budget_bytes}))
        survey = await self._survey(workload, progress)
        advice = await self._created(survey, limits, progress)
        dropped = superfluous(
            {name: schema.indexes for name, schema in survey.schemas.items()}, unused_after_s=unused_after_s
        )
        advice += [_dropping(each) for each in dropped]
        order = list(Verdict)
        return sorted(advice, key=lambda each: order.index(each.verdict))

    async def apply(
        self,
        advice: IndexAdvice | Sequence[IndexAdvice],
        workload: Statements | None = None,
        *,
        progress: Progress = _unheard,
    ) -> list[IndexChange]:
        """Make or drop the indexes one after the other, on every shard that has the table; what came of each.

        The workload's reading statements are run before and after. What makes them slower, or is of no use to any of
        them, is taken back. Raises `IndexBuildFailed` if a build could not be done; nothing is left of it.
        """
        wanted = [advice] if isinstance(advice, IndexAdvice) else list(advice)
        for each in wanted:
            if each.verdict is Verdict.REJECT:
                raise CallerError(
                    f"{each.name} was rejected: {each.reason}.",
                    fix="Apply what is advised; IndexAdvice.creating(Index(...)) is for one of your own.",
                )
        if self._connections_max < CONNECTIONS_MIN:
            raise CallerError(
                f"connections_max is {self._connections_max}; changing an index takes {CONNECTIONS_MIN}: one holds it,"
                " one runs statements, one looks how far it is.",
                fix="Apply the advice with a Database of its own, for instance by `headrace indexes apply`.",
            )
        await self.recover()
        survey = await self._survey(workload, progress, is_needed=False)
        changes: list[IndexChange] = []
        for each in wanted:
            changes += await self._applied(each, survey, progress)
        return changes

    async def history(self) -> list[IndexChange]:
        """What was done to the indexes of every shard, the latest first."""
        found = await asyncio.gather(*(read_journal(node) for node in self._nodes()))
        return sorted((change for changes in found for change in changes), key=lambda each: -each.begun_at)

    async def recover(self) -> list[IndexChange]:
        """Take back what a process that was killed has left half done; a shard that is down is left out."""
        settled: list[IndexChange] = []
        for node in self._nodes():
            try:
                settled += await self._builder.recover(node)
            except BackendError:
                continue  # it is asked again before the next change
        return settled

    async def tend(self) -> None:
        """What is done while the database is open, now and then: `recover`."""
        while True:
            try:
                await self.recover()
            except StatementFailed:
                return  # a role that may not read the journal may not change an index either
            await self._clock.sleep(_TEND_S)

    # looking

    async def _survey(self, statements: Statements | None, progress: Progress, *, is_needed: bool = True) -> _Survey:
        progress("reading tables and statements")
        nodes = self._nodes()
        schemas = dict(zip((n.name for n in nodes), await asyncio.gather(*map(read_schema, nodes)), strict=True))
        home = max(nodes, key=lambda node: sum(table.size_bytes for table in schemas[node.name].tables.values()))
        workload = (await self._observed(nodes) if statements is None else Workload.of(statements)).heaviest()
        queries, unread = [], []
        for query in workload.queries:
            found = await prepared(home, query, schemas[home.name])
            if isinstance(found, str):
                unread.append(f"left out: {_short(query.text)} ({found})")
            elif found.uses:
                queries.append(found)
        if not queries and is_needed:
            raise CallerError(
                f"There is no statement on a table to go by: {'; '.join(unread[:3]) or workload.source}.",
                fix="Run the application for a while, install pg_stat_statements, or pass workload=[...].",
            )
        evidence = [f"{len(queries)} statements: {workload.source}", *workload.notes, *unread]
        if any(query.guessed for query in queries):
            evidence.append("parameters are typical values from pg_stats")
        return _Survey(schemas, home.name, tuple(queries), tuple(evidence), workload.seconds)

    async def _observed(self, nodes: Sequence[Node]) -> Workload:
        found = await asyncio.gather(*map(read_statistics, nodes))
        known = [each for each in found if each is not None]
        if len(known) == len(nodes):
            return merged(known)
        own = self._seen.workload()
        without = [node.name for node, each in zip(nodes, found, strict=True) if each is None]
        return replace(own, notes=(*own.notes, f"pg_stat_statements is not installed on {', '.join(without)}"))

    # creating

    async def _created(self, survey: _Survey, limits: Limits, progress: Progress) -> list[IndexAdvice]:
        problem = survey.problem()
        home = next(node for node in self._nodes() if node.name == survey.home)
        found = await capability(home)
        if found.schema is None:
            return _unestimated(problem, survey, limits, found)
        search = extend(problem, limits)
        asked = 0
        async with what_if(home, found, survey.queries) as planner:
            # In a thread: a search over many statements thinks for longer than a loop may be held.
            questions, selection = await asyncio.to_thread(_step, search, None)
            while selection is None:
                progress(f"asking the planner of {home.name}: {asked} answers, {len(questions)} more")
                asked += len(questions)
                questions, selection = await asyncio.to_thread(_step, search, await planner.answer(questions))
            unplanned = [
                f"not planned: {_short(survey.queries[n].query.text)} ({why})" for n, why in planner.unplanned.items()
            ]
        evidence = (*survey.evidence, f"costs by HypoPG on {home.name}, {selection.questions} plans", *unplanned)
        if not selection.is_complete:
            evidence += (f"the search ended at {limits.questions_max} plans",)
        if problem.write_share is None:
            evidence += ("writes are not counted: how long the workload took is not known",)
        return [_creating(each, survey, evidence) for each in selection.chosen] + [
            IndexAdvice(
                verdict=Verdict.REJECT,
                name=each.index.path,
                table=each.index.table,
                sql=each.index.sql(),
                reason=each.reason,
                index=each.index,
                size_bytes=each.size_bytes,
                gain=each.saved / selection.cost_before if selection.cost_before else 0.0,
            )
            for each in selection.rejected
        ]

    # applying

    async def _applied(self, advice: IndexAdvice, survey: _Survey, progress: Progress) -> list[IndexChange]:
        holders = [node for node in self._nodes() if advice.table in survey.schemas[node.name].tables]
        if not holders:
            raise CallerError(f"No shard has the table {advice.table}.")
        holders.sort(key=lambda node: -survey.schemas[node.name].tables[advice.table].size_bytes)
        chosen = [n for n, each in enumerate(survey.queries) if advice.table in each.uses]
        chosen.sort(key=lambda n: (-survey.queries[n].query.total_ms, -survey.queries[n].query.calls, n))
        queries = {n: survey.queries[n] for n in sorted(chosen[:QUERIES_MAX])}
        calls = [each.query.calls for each in survey.queries]
        trials = [
            Trial(self._builder, node, advice, queries, calls, self._measure_timeout_s, progress) for node in holders
        ]
        changes: list[IndexChange] = []
        for trial in trials:
            change = await trial.run()
            if change.state is not trial.wished:
                why = f"on {change.shard}: {change.reason}"
                done = zip(trials, changes, strict=False)
                return [await before.revert(earlier, why) for before, earlier in done] + [change]
            changes.append(change)
        return changes


def _step(search: Any, answers: Any) -> tuple[Sequence[Any], Selection | None]:
    """The next questions of a search, or what came of it; StopIteration may not leave a thread."""
    try:
        return search.send(answers), None
    except StopIteration as stop:
        selection: Selection = stop.value
        return (), selection


def _creating(chosen: Chosen, survey: _Survey, evidence: tuple[str, ...]) -> IndexAdvice:
    gains = tuple(
        QueryGain(survey.queries[n].query.text, survey.queries[n].query.calls, before, after)
        for n, before, after in chosen.queries[:_EVIDENCE_QUERIES]
    )
    slower = sum(after > before for _, before, after in chosen.queries)
    told = f"saves {chosen.gain:.1%} of what the workload would cost without it, by estimate"
    if chosen.write_cost:
        told += f", {chosen.write_cost:,.0f} for writes taken off"
    if slower:
        told += f"; {slower} statements get dearer"
    advice = IndexAdvice.creating(chosen.index, reason=told)
    return replace(advice, size_bytes=chosen.size_bytes, gain=chosen.gain, queries=gains, evidence=evidence)


def _unestimated(problem: Problem, survey: _Survey, limits: Limits, found: Capability) -> list[IndexAdvice]:
    """Candidates without a figure, for `apply` to measure: a gain that nobody estimated is not made up."""
    evidence = (*survey.evidence, found.reason, "apply measures it, and drops it again if it is of no use")
    indexes = guessed(problem, [each.query.total_ms or float(each.query.calls) for each in survey.queries], limits)
    return [
        replace(
            IndexAdvice.creating(index, reason="estimate unavailable: the heaviest statements compare or sort by it"),
            size_bytes=problem.size(index),
            evidence=(*evidence, *_scans(index, survey)),
        )
        for index in indexes
    ]


def _scans(index: Index, survey: _Survey) -> tuple[str, ...]:
    scans = sum(each.tables[index.table].scans for each in survey.schemas.values() if index.table in each.tables)
    return (f"{index.table} was read from end to end {scans} times",)


def _dropping(found: Superfluous) -> IndexAdvice:
    return IndexAdvice(
        verdict=Verdict.DROP if found.drop else Verdict.REJECT,
        name=found.name,
        table=found.table,
        sql=f"DROP INDEX CONCURRENTLY {found.name}",
        undo=found.definition.replace("INDEX", "INDEX CONCURRENTLY", 1),
        reason=found.reason,
        size_bytes=found.size_bytes,
        evidence=found.evidence,
    )


def _short(text: str) -> str:
    words = " ".join(text.split())
    return words if len(words) <= 80 else words[:77] + "..."
