"""Results are kept by the time that they save a byte."""

import random
from collections import OrderedDict

from headrace.database.query_cache.worth import ENTRY_BYTES, SHARE, Worth, lifetime_s


def test_what_saves_the_least_time_a_byte_goes_first():
    """A dear small result stays, a cheap large one goes, whichever came last."""
    worth = Worth(3 * (ENTRY_BYTES + 1000))
    worth.add("dear", cost_s=1.0, size=1000)
    worth.add("cheap", cost_s=0.001, size=1000)
    worth.add("middling", cost_s=0.1, size=1000)

    assert worth.add("new", cost_s=0.1, size=1000) == ["cheap"]


def test_what_is_asked_for_stays():
    """Of equal ones the one that was used goes last."""
    worth = Worth(2 * (ENTRY_BYTES + 10))
    worth.add("used", cost_s=0.1, size=10)
    worth.add("unused", cost_s=0.1, size=10)
    worth.use("used")

    assert worth.add("new", cost_s=0.15, size=10) == ["unused"]


def test_what_was_dear_and_is_not_asked_for_goes_in_its_turn():
    """The clock rises with every eviction, so no result stays for ever for what it once cost."""
    worth = Worth(4 * ENTRY_BYTES)
    worth.add("once dear", cost_s=1.0, size=0)

    gone = [name for number in range(200) for name in worth.add(f"n{number}", cost_s=0.1, size=0)]

    assert "once dear" in gone


def test_the_budget_holds_at_every_moment():
    """Whatever comes, changes its size, is used or removed."""
    rng, worth = random.Random(1), Worth(50_000)
    for _ in range(5000):
        name = f"n{rng.randrange(200)}"
        match rng.randrange(4):
            case 0:
                worth.remove(name)
            case 1:
                worth.use(name)
            case _:
                worth.add(name, cost_s=rng.random(), size=rng.randrange(20_000))
        assert worth.bytes <= 50_000
        assert (worth.bytes == 0) == (len(worth) == 0)


def test_a_result_larger_than_the_budget_is_not_let_in():
    """It goes itself, at once."""
    worth = Worth(10_000)

    assert worth.add("huge", cost_s=9.0, size=20_000) == ["huge"]
    assert "huge" not in worth


def test_it_saves_more_than_lru_where_costs_differ():
    """Zipf popularity, costs and sizes over three orders of magnitude: the time saved is clearly greater."""
    rng = random.Random(7)
    queries = [(10 ** rng.uniform(-4, -1), int(10 ** rng.uniform(2, 5))) for _ in range(2000)]
    asked = rng.choices(range(2000), weights=[1 / (rank + 1) for rank in range(2000)], k=30_000)
    budget = 2_000_000
    worth, saved_by_worth = Worth(budget), 0.0
    lru, held, saved_by_lru = OrderedDict(), 0, 0.0
    for query in asked:
        cost_s, size = queries[query]
        if str(query) in worth:
            saved_by_worth += cost_s
            worth.use(str(query))
        else:
            worth.add(str(query), cost_s=cost_s, size=size)
        if query in lru:
            saved_by_lru += cost_s
            lru.move_to_end(query)
        else:
            lru[query] = size + ENTRY_BYTES
            held += size + ENTRY_BYTES
            while held > budget:
                held -= lru.popitem(last=False)[1]

    assert saved_by_worth > 1.05 * saved_by_lru


def test_lives_grow_with_what_a_result_costs():
    """Reloads take a fixed share of a connection; more parts live longer, the cheapest for a second at least."""
    assert lifetime_s(0.001, 1, longest_s=3600) == 0.001 / SHARE
    assert lifetime_s(0.001, 3, longest_s=3600) == 3 * lifetime_s(0.001, 1, longest_s=3600)
    assert lifetime_s(10.0, 1, longest_s=3600) == 3600
    assert lifetime_s(0.0, 1, longest_s=3600) == 1.0
    assert lifetime_s(10.0, 1, longest_s=0.5) == 0.5
