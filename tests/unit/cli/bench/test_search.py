import pytest

from headrace.cli.bench.search import RATE_MIN, RateSearch


def search(limit: float, **options: float) -> RateSearch:
    """A search against a server that holds exactly the rates up to `limit`."""
    search = RateSearch(**options)
    while (rate := search.proposal()) is not None:
        search.report(rate, held=rate <= limit)
    return search


@pytest.mark.parametrize("limit", [150.0, 1_999.0, 2_000.0, 2_001.0, 9_800.0, 33_000.0])
def test_the_answer_is_within_the_precision_below_the_limit(limit):
    """Wherever the limit is, the highest rate that held is at most the precision below it."""
    found = search(limit)

    assert found.held <= limit < found.failed
    assert found.failed / found.held <= found.precision


def test_a_server_that_holds_nothing_gets_zero():
    """The search goes down to its lowest rate and gives up."""
    found = search(1.0)

    assert found.held == 0.0
    assert found.failed == RATE_MIN


def test_a_server_that_holds_everything_gets_the_highest_rate():
    """The search stops where the generator's own ability ends."""
    assert search(1e9, rate_max=20_000.0).held == 20_000.0


def test_a_server_that_contradicts_itself_cannot_keep_the_search_going():
    """Near its limit a server holds a rate once and fails it once: the number of probes is limited all the same."""
    search = RateSearch(precision=1.0)
    answers = 0

    while (rate := search.proposal()) is not None:
        search.report(rate, held=answers % 2 == 0)
        answers += 1

    assert answers == search.probes_max
