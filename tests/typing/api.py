"""What a type checker says about the public doors. It is read by mypy, in `make check` and test_api.py, and never run.

Each function is one door; `assert_type` states what a user's editor shows.
"""

from typing import assert_type

from headrace.clock import Clock, SystemClock
from headrace.errors import BackendError, CallerError, HeadraceError, NotOpen


def an_error_says_whose_fault_it_is_and_what_to_do() -> None:
    error = NotOpen("The cache is closed.", fix="Open it with `async with`.")
    assert_type(error.code, str)
    assert_type(error.fix, str)
    assert_type(error.message, str)
    fault: CallerError = error
    assert_type(fault, CallerError)


def one_clause_catches_what_may_be_retried() -> None:
    try:
        raise BackendError("The shard is down.")
    except HeadraceError as error:
        assert_type(error, HeadraceError)


async def the_system_clock_is_a_clock() -> None:
    system = SystemClock()
    clock: Clock = system
    assert_type(clock.monotonic(), float)
    assert_type(clock.wall(), float)
    assert_type(system.monotonic(), float)
    assert_type(await clock.sleep(0.1), None)
