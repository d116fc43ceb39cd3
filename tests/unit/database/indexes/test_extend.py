"""The search for indexes, with a table of costs for a planner."""

from collections.abc import Callable, Mapping

import pytest

from headrace.database.indexes.candidates import uses_of
from headrace.database.indexes.extend import Limits, Problem, Question, Selection, extend, guessed
from headrace.database.indexes.index import ColumnFacts, Index, Schema, StandingIndex, TableFacts
from headrace.errors import ConfigError

COLUMNS = {name: ColumnFacts(name, "integer", distinct=1000) for name in ("a", "b", "c", "d")}
TABLE = TableFacts("t", 100_000, 10_000_000, COLUMNS, inserts=1000.0)
A, B = Index("t", ("a",)), Index("t", ("b",))
Cost = Callable[[int, frozenset[Index]], float]


def problem(*queries: str, weights: Mapping[int, float] = {}, indexes=(), write_share: float | None = None) -> Problem:
    schema = Schema({"t": TABLE}, {("", "t"): "t"}, tuple(indexes))
    return Problem(
        weights=[weights.get(number, 1.0) for number in range(len(queries))],
        uses=[uses_of(sql, schema) for sql in queries],
        schema=schema,
        write_share=write_share,
    )


def select(given: Problem, cost: Cost, **limits: float) -> Selection:
    search = extend(given, Limits(**limits))
    answers: dict[Question, float] | None = None
    while True:
        try:
            questions = search.send(answers)
        except StopIteration as stop:
            return stop.value
        answers = {question: cost(question.query, question.indexes) for question in questions}


def by_prefix(*wanted: str) -> Cost:
    """A statement costs 100, and a third with every column of its wish at the head of an index."""

    def cost(query: int, indexes: frozenset[Index]) -> float:
        def matched(index: Index) -> int:
            return next(
                (n for n, (x, y) in enumerate(zip(index.columns, wanted[query], strict=False)) if x != y), None
            ) or (min(len(index.columns), len(wanted[query])) if index.columns[0] == wanted[query][0] else 0)

        return 100.0 / 3 ** max((matched(index) for index in indexes), default=0)

    return cost


def test_an_index_grows_column_by_column():
    """From one that pays for itself to one that pays more; the shorter one is not kept beside it."""
    found = select(problem("SELECT 1 FROM t WHERE a = 1 AND b = 2 AND c = 3"), by_prefix("abc"))

    assert [each.index for each in found.chosen] == [Index("t", ("a", "b", "c"))]
    assert found.cost_after == pytest.approx(100 / 27)


def test_the_best_for_its_bytes_comes_first():
    """Within the budget the statement that runs more often gets its index."""
    given = problem("SELECT 1 FROM t WHERE a = 1", "SELECT 1 FROM t WHERE b = 1", weights={1: 5.0})
    room = given.size(A) + 1000

    found = select(given, by_prefix("a", "b"), budget_bytes=room)

    assert [each.index for each in found.chosen] == [B]
    assert sum(each.size_bytes for each in found.chosen) <= room
    assert next(each for each in found.rejected if each.index == A).reason.endswith("MiB are left")


def test_a_budget_of_nothing_buys_nothing():
    """And says so of each."""
    found = select(problem("SELECT 1 FROM t WHERE a = 1"), by_prefix("a"), budget_bytes=0)

    assert not found.chosen
    assert "does not fit" in found.rejected[0].reason


def test_an_index_must_save_enough():
    """Less than `gain_min` of the workload is not worth an index."""
    given = problem("SELECT 1 FROM t WHERE a = 1", "SELECT 1 FROM t WHERE b = 1", weights={1: 1000.0})

    found = select(given, by_prefix("a", "b"), gain_min=0.01)

    assert [each.index for each in found.chosen] == [B]
    assert "less than 1.00%" in next(each for each in found.rejected if each.index == A).reason


def test_writes_are_set_against_reads():
    """A thousand entries at a unit each cost more than a read saves."""
    given = problem("SELECT 1 FROM t WHERE a = 1", write_share=1.0)

    found = select(given, by_prefix("a"))

    assert not found.chosen
    assert "its writes would cost 1,000" in found.rejected[0].reason
    assert [each.index for each in select(given, by_prefix("a"), write_cost=0.001).chosen] == [A]


def test_what_is_there_is_not_made_again():
    """An index that begins with the same columns does the work."""
    standing = StandingIndex(name="mine", table="t", definition="", key=("a", "d"))

    found = select(problem("SELECT 1 FROM t WHERE a = 1", indexes=[standing]), by_prefix("a"))

    assert not found.chosen
    assert found.rejected[0].reason == "mine does all that it would"


def test_an_index_that_makes_statements_dearer_is_not_chosen():
    """However many it makes a little cheaper."""

    def cost(query: int, indexes: frozenset[Index]) -> float:
        return 100.0 if A not in indexes else (95.0 if query else 500.0)

    found = select(problem("SELECT 1 FROM t WHERE a = 1", "SELECT 1 FROM t WHERE a = 2"), cost)

    assert A not in [each.index for each in found.chosen]


def test_what_later_ones_make_superfluous_is_given_up():
    """A greedy step that lost its use does not stay."""

    def cost(query: int, indexes: frozenset[Index]) -> float:
        heads = {index.columns[0] for index in indexes}
        return 100.0 - 40.0 * ("a" in heads) - 90.0 * ("b" in heads) + 40.0 * ({"a", "b"} <= heads)

    big = Index("t", ("b",), ("c", "d"))
    given = problem("SELECT c, d FROM t WHERE a = 1 AND b = 1")

    found = select(given, cost, gain_min=0.05)

    assert {each.index.columns[0] for each in found.chosen} == {"b"}
    assert big not in [each.index for each in found.chosen]


def test_a_statement_that_cannot_be_planned_does_not_stop_the_others():
    """Its cost is infinite, and counts for nothing."""
    given = problem("SELECT 1 FROM t WHERE a = 1", "SELECT 1 FROM t WHERE b = 1")

    found = select(given, lambda query, indexes: by_prefix("a", "b")(query, indexes) if query else float("inf"))

    assert [each.index for each in found.chosen] == [B]
    assert set(found.costs) == {1}


def test_the_search_ends_at_its_limit():
    """With what it has, and says that it is not complete."""
    found = select(problem("SELECT 1 FROM t WHERE a = 1 AND b = 2"), by_prefix("ab"), questions_max=1)

    assert not found.is_complete
    assert len(found.chosen) == 1


def test_shards_share_the_budget():
    """A table on four shards has four indexes."""
    given = problem("SELECT 1 FROM t WHERE a = 1")
    four = Problem(weights=given.weights, uses=given.uses, schema=given.schema, scale={"t": 4.0})

    assert four.size(A) == 4 * given.size(A)


def test_without_a_planner_only_wishes_are_named():
    """Those of the statement that took longest first, as far as the budget goes."""
    given = problem("SELECT 1 FROM t WHERE a = 1 AND b > 2", "SELECT 1 FROM t WHERE c = 1")

    found = guessed(given, [10.0, 500.0], Limits())

    assert found == (Index("t", ("c",)), Index("t", ("a", "b")))
    assert guessed(given, [10.0, 500.0], Limits(budget_bytes=given.size(found[0]))) == (Index("t", ("c",)),)


@pytest.mark.parametrize("limits", [{"budget_bytes": -1}, {"gain_min": 1.0}, {"gain_min": -0.1}])
def test_limits_that_mean_nothing_are_refused(limits):
    """When they are made."""
    with pytest.raises(ConfigError):
        Limits(**limits)
