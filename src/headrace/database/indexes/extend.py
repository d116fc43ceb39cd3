"""Which indexes to make: the Extend algorithm, with a price for writes and a bound on space. Pure.

Intuition: begin with nothing. In each step look at two kinds of moves: add a small index, or lengthen one that was
already chosen by a column. Take the move that saves most for each byte, and go on while there is space and a move
saves enough. Because a long index grows out of a short one that already paid for itself, the combinations that are
looked at stay few, and how the indexes change each other's worth is counted at every step.

An index that only many columns together make useful cannot be found one column at a time. So what a single statement
would like best stands among the first moves, too (see `candidates.seeds`).

The search asks the planner what a statement would cost under given indexes; it does so by yielding questions, so that
whoever runs it may be a HypoPG session, or a table in a test.

Source: R. Schlosser, J. Kossmann, M. Boissier, Efficient Scalable Multi-Attribute Index Selection Using Recursive
Strategies, ICDE 2019.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from headrace.database.indexes.candidates import Uses, extensions, is_relevant, seeds, where_share
from headrace.database.indexes.index import Index, Schema, index_bytes
from headrace.errors import ConfigError

REJECTED_MAX: Final = 20


class Question(NamedTuple):
    """What would this statement cost if there were these indexes, too?"""

    query: int
    indexes: frozenset[Index]


Answers = Mapping[Question, float]
Search = Generator[Sequence[Question], Answers, "Selection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an advice must keep to."""

    budget_bytes: int | None = None
    """All new indexes together, over all shards; None: as much as the tables themselves."""
    gain_min: float = 0.01
    """Share of what the workload costs with those chosen before it that an index must save."""
    indexes_max: int = 20
    """New indexes."""
    questions_max: int = 20_000
    """Questions to the planner; then the search ends with what it has."""
    write_cost: float = 1.0
    """Of one more entry in an index, in the planner's unit (a page read in sequence). An assumption: a leaf page that
    is in memory, found and changed, and its share of the log."""

    def __post_init__(self) -> None:
        """Refuse what means nothing."""
        if self.budget_bytes is not None and self.budget_bytes < 0:
            raise ConfigError(f"budget_bytes is {self.budget_bytes}; it must be 0 or more.")
        if not 0 <= self.gain_min < 1:
            raise ConfigError(f"gain_min is {self.gain_min}; it must be from 0 to below 1.")


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be made faster."""

    weights: Sequence[float]
    """How often each statement runs."""
    uses: Sequence[Uses]
    """What each does with its tables."""
    schema: Schema
    """The shard that is asked."""
    scale: Mapping[str, float] = field(default_factory=dict)
    """Of each table: its rows on all shards by those on the one that is asked."""
    write_share: float | None = None
    """The workload's time by that of the counters of writes; None: not known, so writes are not counted."""

    def size(self, index: Index) -> int:
        """Bytes over all shards."""
        table = self.schema.tables[index.table]
        return round(index_bytes(index, table, share=where_share(index, table)) * self.scale.get(index.table, 1.0))

    def writes(self, index: Index) -> float:
        """Entries that it would have taken in the time of the workload. Vacuum takes one out of it for each delete, in
        bulk: half as much work."""
        if self.write_share is None:
            return 0.0
        table = self.schema.tables[index.table]
        entries = table.inserts + table.updates + table.deletes / 2
        return entries * self.write_share * where_share(index, table)

    def standing(self, index: Index) -> str | None:
        """An index that is there and does all that this one would."""
        for each in self.schema.indexes:
            known = each.as_index()
            if known is not None and known.serves(index):
                return each.name
        return None

    def touched(self, index: Index) -> frozenset[int]:
        """The statements whose plan it can change."""
        return frozenset(query for query, uses in enumerate(self.uses) if is_relevant(index, uses.get(index.table)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """An index to make."""

    index: Index
    size_bytes: int
    saved: float
    """Cost of the whole workload that is saved by it beside the other chosen ones, its writes taken off."""
    gain: float
    """The same as a share of what the workload would cost without it, and with the others."""
    write_cost: float
    queries: tuple[tuple[int, float, float], ...]
    """Statements, with their cost without it and with it, the most saving first."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """An index that was looked at and is not to be made."""

    index: Index
    size_bytes: int
    saved: float
    reason: str


@dataclass(frozen=True, slots=True)
class Selection:
    """What came of the search."""

    chosen: tuple[Chosen, ...]
    rejected: tuple[Rejected, ...]
    cost_before: float
    cost_after: float
    """Writes not counted."""
    questions: int
    is_complete: bool
    """False: `questions_max` ended it early."""
    costs: Mapping[int, tuple[float, float]]
    """Of each statement that could be planned: one call before and after."""


class _Move(NamedTuple):
    after: frozenset[Index]
    """What is chosen then."""
    added: Index


class _Search:
    """One search: what is chosen, what everything costs."""

    def __init__(self, problem: Problem, limits: Limits) -> None:
        self.problem = problem
        self.limits = limits
        self.known: dict[Question, float] = {}
        self.chosen: frozenset[Index] = frozenset()
        self.rejected: dict[Index, Rejected] = {}
        self._touched: dict[Index, frozenset[int]] = {}
        tables = problem.schema.tables.values()
        whole = sum(table.size_bytes * problem.scale.get(table.name, 1.0) for table in tables)
        self.budget = limits.budget_bytes if limits.budget_bytes is not None else round(whole)

    def run(self) -> Search:
        """The generator."""
        everything = range(len(self.problem.weights))
        yield from self._ask(Question(query, frozenset()) for query in everything)
        before = self.cost(frozenset())
        is_complete = True
        first = list(self._first())
        while len(self.chosen) < self.limits.indexes_max:
            moves = list(self._moves(first))
            yield from self._ask(self._questions(moves))
            best = self._best(moves)
            if best is None:
                break
            self.chosen = best.after
            if len(self.known) >= self.limits.questions_max:
                is_complete = False
                break
        yield from self._ask(self._without_each())
        yield from self._prune()
        return Selection(
            chosen=self._explained(),
            rejected=self._reported(),
            cost_before=before,
            cost_after=self.cost(self.chosen),
            questions=len(self.known),
            is_complete=is_complete,
            costs={
                query: (self.of(query, frozenset()), self.of(query, self.chosen))
                for query in everything
                if math.isfinite(self.of(query, frozenset()))
            },
        )

    def _ask(self, questions: Iterable[Question]) -> Generator[Sequence[Question], Answers, None]:
        new = [each for each in dict.fromkeys(questions) if each not in self.known]
        if new:
            self.known |= yield new

    def of(self, query: int, indexes: frozenset[Index]) -> float:
        """What one call costs; infinite for a statement that cannot be planned."""
        return self.known[Question(query, self.relevant(query, indexes))]

    def cost(self, indexes: frozenset[Index]) -> float:
        """What the workload costs, writes not counted."""
        costs = ((weight, self.of(query, indexes)) for query, weight in enumerate(self.problem.weights))
        return sum(weight * cost for weight, cost in costs if math.isfinite(cost))

    def price(self, index: Index) -> float:
        return self.problem.writes(index) * self.limits.write_cost

    def _first(self) -> Iterator[Index]:
        for index in seeds(self.problem.uses, self.problem.schema):
            standing = self.problem.standing(index)
            if standing is None:
                yield index
            elif len(index.columns) > 1 or len(self.rejected) < REJECTED_MAX:
                self._reject(index, 0.0, f"{standing} does all that it would")

    def _moves(self, first: Sequence[Index]) -> Iterator[_Move]:
        for index in first:
            if not any(each.serves(index) for each in self.chosen):
                served = frozenset(each for each in self.chosen if index.serves(each))
                yield _Move(self.chosen - served | {index}, index)
        for before in self.chosen:
            table = self.problem.schema.tables[before.table]
            for index in dict.fromkeys(extensions(before, self.problem.uses, table)):
                if index not in self.chosen and self.problem.standing(index) is None:
                    yield _Move(self.chosen - {before} | {index}, index)

    def _questions(self, moves: Iterable[_Move]) -> Iterator[Question]:
        for move in moves:
            yield from self._changed(self.chosen, move.after)

    def _without_each(self) -> Iterator[Question]:
        for index in self.chosen:
            yield from self._changed(self.chosen, self.chosen - {index})

    def _changed(self, before: frozenset[Index], after: frozenset[Index]) -> Iterator[Question]:
        """What has to be known to compare two selections: nothing of statements that cannot tell them apart."""
        for query in frozenset[int]().union(*map(self.touched, before ^ after)):
            yield Question(query, self.relevant(query, after))

    def touched(self, index: Index) -> frozenset[int]:
        """The statements whose plan it can change."""
        found = self._touched.get(index)
        if found is None:
            found = self._touched[index] = self.problem.touched(index)
        return found

    def relevant(self, query: int, indexes: Iterable[Index]) -> frozenset[Index]:
        """Those that can change the plan of a statement."""
        return frozenset(each for each in indexes if query in self.touched(each))

    def _best(self, moves: Iterable[_Move]) -> _Move | None:
        now = self.cost(self.chosen)
        space = self.budget - sum(self.problem.size(each) for each in self.chosen)
        best: tuple[float, _Move] | None = None
        for move in moves:
            freed = self.chosen - move.after
            more = self.problem.size(move.added) - sum(self.problem.size(each) for each in freed)
            dearer = self.price(move.added) - sum(self.price(each) for each in freed)
            read = self._less(self.chosen, move.after)
            saved = read - dearer
            if saved < self.limits.gain_min * now or saved <= 0:
                self._reject(move.added, saved, self._too_little(read, dearer, now))
            elif more > space:
                self._reject(
                    move.added, saved, f"does not fit: it takes {_mib(more)}, of the budget {_mib(space)} are left"
                )
            else:
                self._reject(move.added, saved, f"it would save {saved / now:.1%} of the workload's cost")
                if best is None or saved / max(more, 1) > best[0]:
                    best = saved / max(more, 1), move
        return best[1] if best is not None else None

    def _less(self, before: frozenset[Index], after: frozenset[Index]) -> float:
        """How much less the workload costs under other indexes."""
        weights, saved = self.problem.weights, 0.0
        for query in frozenset[int]().union(*map(self.touched, before ^ after)):
            cost = self.of(query, before)
            if math.isfinite(cost):
                saved += weights[query] * (cost - self.of(query, after))
        return saved

    def _too_little(self, read: float, dearer: float, now: float) -> str:
        if read <= 0:
            return "no statement would get cheaper"
        if dearer >= read:
            return f"its writes would cost {dearer:,.0f}, more than the {read:,.0f} that it saves"
        return f"saves {(read - dearer) / now:.2%} of the workload's cost, less than {self.limits.gain_min:.2%}"

    def _prune(self) -> Generator[Sequence[Question], Answers, None]:
        """Give up what later choices have made superfluous, the least useful first."""
        while self.chosen:
            worth, index = min((self._worth(each), each) for each in self.chosen)
            if worth >= self.limits.gain_min * self.cost(self.chosen) and worth > 0:
                return
            self.chosen -= {index}
            self._reject(index, worth, "what was chosen after it does its work")
            yield from self._ask(self._without_each())

    def _worth(self, index: Index) -> float:
        return self._less(self.chosen - {index}, self.chosen) - self.price(index)

    def _explained(self) -> tuple[Chosen, ...]:
        found = []
        for index in self.chosen:
            changed = []
            for query, weight in enumerate(self.problem.weights):
                without, beside = self.of(query, self.chosen - {index}), self.of(query, self.chosen)
                if without != beside:
                    changed.append((weight * (without - beside), (query, without, beside)))
            changed.sort(key=lambda each: -each[0])
            saved, without = self._worth(index), self.cost(self.chosen - {index})
            found.append(
                Chosen(
                    index,
                    self.problem.size(index),
                    saved,
                    saved / without,
                    self.price(index),
                    tuple(each for _, each in changed),
                )
            )
        return tuple(sorted(found, key=lambda each: -each.saved))

    def _reject(self, index: Index, saved: float, reason: str) -> None:
        before = self.rejected.get(index)
        if before is not None and before.saved > max(saved, 0.0):
            # It was worth something, until others were chosen that do the same work.
            own = before.reason.partition("; ")[0]
            saved, reason = before.saved, f"{own}; beside the chosen ones {reason}"
        self.rejected[index] = Rejected(index, self.problem.size(index), saved, reason)

    def _reported(self) -> tuple[Rejected, ...]:
        left = [each for each in self.rejected.values() if each.index not in self.chosen]
        # An index that one of the chosen contains was not turned down: it grew.
        left = [each for each in left if not any(chosen.serves(each.index) for chosen in self.chosen)]
        return tuple(sorted(left, key=lambda each: -each.saved)[:REJECTED_MAX])


def extend(problem: Problem, limits: Limits) -> Search:
    """The search: yields questions, is sent their answers, returns what to make and what not."""
    return _Search(problem, limits).run()


def guessed(problem: Problem, total_ms: Sequence[float], limits: Limits) -> tuple[Index, ...]:
    """Without a planner to ask: what each statement would like best, those of the longest-running statements first.

    Says nothing of what they would save. Only measuring can.
    """
    search = _Search(problem, limits)
    space, found = search.budget, list[Index]()
    for query in sorted(range(len(total_ms)), key=lambda each: (-total_ms[each], each)):
        for table in problem.uses[query]:
            wished = [each for each in seeds([problem.uses[query]], problem.schema) if each.table == table]
            wished = [each for each in wished if not each.include and each.where is None]
            if not wished:
                continue
            index = max(wished, key=lambda each: len(each.columns))
            size = problem.size(index)
            is_new = problem.standing(index) is None and not any(each.serves(index) for each in found)
            if is_new and size <= space and len(found) < limits.indexes_max:
                space -= size
                found.append(index)
    return tuple(found)


def _mib(size_bytes: float) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"
