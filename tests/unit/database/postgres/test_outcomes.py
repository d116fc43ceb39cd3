"""Finding out what became of a commit: asked until the transaction is over, and then whether it was kept."""

import asyncio

import pytest

from headrace.database.postgres.outcomes import Marker, find_out
from headrace.errors import DatabaseUnavailable, StatementFailed
from headrace.testing import FakeClock


class Server:
    """Answers one after the other: an error is raised, anything else is the only value of the only row."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def __call__(self, sql, params):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [] if answer == "no row" else [(answer,)]


DOWN = DatabaseUnavailable("down")
NEVER_HEARD_OF = StatementFailed("in the future", sqlstate="22023")
RUNNING, OVER = True, False


def mark():
    marker = Marker()
    marker.next()
    return marker.mark([("7",)])


async def ask(*answers):
    clock = FakeClock()
    asking = asyncio.ensure_future(find_out(Server(*answers), mark(), clock=clock, wait_s=10.0))
    await clock.run_for(11.0)
    return await asking


@pytest.mark.parametrize(
    ("answers", "is_kept"),
    [
        ([OVER, True], True),
        ([OVER, False], False),
        ([OVER, "no row"], False),
        ([NEVER_HEARD_OF, "no row"], False),
        ([RUNNING, RUNNING, OVER, True], True),
        ([DOWN, OVER, DOWN, OVER, True], True),
        ([RUNNING] * 500, None),
        ([DOWN] * 500, None),
    ],
)
async def test_it_is_asked_until_it_is_known(answers, is_kept):
    """A session that still runs may commit, and a server that is down may come back; not for ever."""
    assert await ask(*answers) is is_kept


async def test_another_error_is_not_an_answer():
    """Of a role that may not ask nothing is concluded."""
    with pytest.raises(StatementFailed):
        await ask(StatementFailed("denied", sqlstate="42501"))


def test_marks_of_one_connection_rise():
    """So that the row says of every transaction before the last one that it was followed by another."""
    marker = Marker()
    assert [marker.next()[1] for _ in range(3)] == [1, 2, 3]
    assert marker.mark([("7",)]).number == 3
