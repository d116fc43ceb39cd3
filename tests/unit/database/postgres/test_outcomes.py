"""Finding out what became of a commit: asked until the transaction is over, and then whether it was kept."""

import asyncio

import pytest

from headrace.database.postgres.outcomes import Marker, find_out
from headrace.errors import DatabaseUnavailable, NotOpen, Overloaded, StatementFailed, StatementTimeout
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


@pytest.mark.parametrize("error", [StatementFailed("denied", sqlstate="42501"), NotOpen("closed")])
async def test_another_error_is_not_an_answer(error):
    """Of a role that may not ask, or when the database is closed meanwhile, nothing is concluded."""
    assert await ask(error) is None


@pytest.mark.parametrize("error", [Overloaded("busy"), StatementTimeout("slow")])
async def test_a_server_that_is_busy_is_asked_again(error):
    """Its answer says nothing of the write; who took it for the write's own would repeat that."""
    assert await ask(error, OVER, True) is True


def test_marks_of_one_connection_rise():
    """So that the row says of every transaction before the last one that it was followed by another."""
    marker = Marker()
    assert [marker.next()[1] for _ in range(3)] == [1, 2, 3]
    assert marker.mark([("7",)]).number == 3
