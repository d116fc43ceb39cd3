"""The laws of the search for indexes, whatever the planner says."""

import math
import zlib

from hypothesis import given
from hypothesis import strategies as st

from headrace.database.indexes.candidates import uses_of
from headrace.database.indexes.extend import Limits, Problem, Question, Selection, extend
from headrace.database.indexes.index import ColumnFacts, Schema, TableFacts

COLUMNS = {name: ColumnFacts(name, "integer", distinct=100.0) for name in "abcd"}
SCHEMA = Schema({"t": TableFacts("t", 10_000, 1_000_000, COLUMNS, inserts=50.0)}, {("", "t"): "t"})
CONDITIONS = st.lists(st.sampled_from(["a = 1", "b = 2", "c > 3", "d < 4"]), min_size=1, max_size=3, unique=True)
QUERIES = st.lists(CONDITIONS, min_size=1, max_size=4)


def whim(question: Question, seed: int) -> float:
    """A cost that follows from the question alone, and from nothing that a planner would think of."""
    spelled = f"{seed} {question.query} {sorted(each.sql() for each in question.indexes)}"
    return 10.0 + zlib.crc32(spelled.encode()) % 1000


def search(problem: Problem, limits: Limits, seed: int) -> Selection:
    """Run it against the whims; no question may come twice."""
    running, answers, asked = extend(problem, limits), None, set[Question]()
    while True:
        try:
            questions = running.send(answers)
        except StopIteration as stop:
            return stop.value
        assert questions
        assert asked.isdisjoint(questions)
        asked |= set(questions)
        answers = {question: whim(question, seed) for question in questions}


@given(
    queries=QUERIES,
    budget_bytes=st.integers(0, 2_000_000),
    gain_min=st.floats(0, 0.3),
    writes=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_search_keeps_its_promises(queries, budget_bytes, gain_min, writes, seed):
    """Within the budget, each of use beside the others, none that another one contains, and never a loss."""
    sqls = [f"SELECT a FROM t WHERE {' AND '.join(conditions)}" for conditions in queries]
    problem = Problem(
        weights=[1.0] * len(sqls),
        uses=[uses_of(sql, SCHEMA) for sql in sqls],
        schema=SCHEMA,
        write_share=1.0 if writes else None,
    )

    found = search(problem, Limits(budget_bytes=budget_bytes, gain_min=gain_min), seed)

    indexes = [each.index for each in found.chosen]
    assert sum(each.size_bytes for each in found.chosen) <= budget_bytes
    assert all(each.saved > 0 and each.saved >= gain_min * found.cost_after for each in found.chosen)
    assert not any(one != other and one.serves(other) for one in indexes for other in indexes)
    assert not {each.index for each in found.rejected} & set(indexes)
    assert math.isclose(sum(before for before, _ in found.costs.values()), found.cost_before)
    if not writes:
        assert found.cost_after <= found.cost_before
