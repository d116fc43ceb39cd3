"""Every error has a status and a problem+json."""

import pytest

from headrace import errors
from headrace.server.exchange import problem_answer
from headrace.server.problems import problem, status_of


def every_error(kind=errors.HeadraceError):
    """All classes of the tree."""
    yield kind
    for child in kind.__subclasses__():
        yield from every_error(child)


@pytest.mark.parametrize("kind", list(every_error()), ids=lambda kind: kind.__name__)
def test_the_status_says_whose_fault_it_is(kind):
    """4xx for the caller's, 5xx for ours and for what we depend on; a tenant's own limit is told by 429."""
    status = status_of(kind("x"))
    # What is used after it was closed is the caller's fault in a program; over HTTP the process is stopping.
    is_callers = issubclass(kind, errors.CallerError | errors.RateLimited) and kind is not errors.NotOpen
    assert (400 <= status < 500) == is_callers
    assert (status == 429) == issubclass(kind, errors.RateLimited)


def test_a_problem_tells_the_case_and_the_fix():
    """The detail is the message, the code stays the same for ever."""
    found = problem(errors.PortTaken("Port 80 is taken.", fix="Take another."))
    assert (found.code, found.detail, found.fix) == ("port-taken", "Port 80 is taken.", "Take another.")
    assert found.type == "urn:headrace:problem:port-taken"


def test_whoever_should_come_back_is_told_when():
    """503 and 504 carry Retry-After, 401 names the scheme."""
    assert dict(problem_answer(errors.Overloaded("full")).headers)[b"retry-after"] == b"1"
    assert dict(problem_answer(errors.Unauthorized("who?")).headers)[b"www-authenticate"] == b"Bearer"
    assert dict(problem_answer(errors.NotOpen("The journal is closed.")).headers)[b"retry-after"] == b"1"
    assert b"retry-after" not in dict(problem_answer(errors.AgentNotFound("x")).headers)
