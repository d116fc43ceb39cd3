"""What the words of a statement say of how it may be sent."""

import pytest

from headrace.database.postgres.texts import Trace, check_groupable, is_copy, is_write, trace_of
from headrace.errors import CallerError


@pytest.mark.parametrize(
    "sql",
    [
        "SET search_path = a",
        "  /* x */ -- y\n set role b",
        "SELECT 1; SET x.y = 'z'",
        "RESET ALL",
        "LISTEN news",
        "LOAD 'auto_explain'",
        "PREPARE p AS SELECT 1",
        "DECLARE c CURSOR WITH HOLD FOR SELECT 1",
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_try_advisory_lock_shared (1)",
        "SELECT set_config('a.b', $1, false)",
        "SELECT set_config('a.b', current_setting('c.d'), true), 1",
        "CREATE TEMP TABLE t (k int)",
        "create local temporary table t (k int) on commit delete rows",
        "SELECT * INTO TEMP t FROM u",
    ],
)
def test_what_outlives_the_transaction_is_known(sql):
    """Settings, locks and tables of the session; where the words leave it open, too."""
    assert trace_of(sql) is Trace.SESSION


@pytest.mark.parametrize(
    "sql",
    [
        "SET LOCAL search_path = a",
        "SET TRANSACTION READ ONLY",
        "SELECT set_config('a.b', $1, true)",
        "WITH s AS (SELECT set_config('a.b', $1, TRUE)) INSERT INTO t SELECT 1 FROM s",
        "SELECT pg_advisory_xact_lock(1)",
    ],
)
def test_what_ends_with_the_transaction_is_known(sql):
    """It would act on those that share it."""
    assert trace_of(sql) is Trace.TRANSACTION


@pytest.mark.parametrize(
    "sql",
    [
        "SELECT 1",
        "UPDATE t SET v = 1",
        "INSERT INTO t VALUES (1) ON CONFLICT (k) DO UPDATE SET v = 2",
        "SELECT * FROM settings OFFSET 2",
        "SELECT temperature FROM listeners WHERE declared",
        "CREATE TEMP TABLE t ON COMMIT DROP AS SELECT 1",
        "PREPARE TRANSACTION 'x'",
        "",
    ],
)
def test_what_leaves_nothing_is_known(sql):
    """Words that only look like it do not count."""
    assert trace_of(sql) is Trace.NONE


def test_a_long_row_of_comments_is_read_at_once():
    """However many there are, each is read in one way only."""
    assert trace_of("/* a */" * 5000 + "; temp") is Trace.NONE
    assert not is_copy("/* a */" * 5000)


@pytest.mark.parametrize(
    "sql", ["COPY t TO STDOUT", "; ; copy t FROM STDIN", "--x\n/* y */ Copy (SELECT 1) TO STDOUT"]
)
def test_copy_is_recognized(sql):
    """Also behind comments and empty statements, which the server skips."""
    assert is_copy(sql)


def test_only_writes_that_leave_nothing_are_grouped():
    """What one sets for the transaction would be set for the rows of all."""
    assert is_write("INSERT INTO t VALUES (1)")
    check_groupable("INSERT INTO t VALUES (1)")
    for sql in ("SELECT 1", "WITH s AS (SELECT set_config('a.b', 'c', true)) INSERT INTO t SELECT 1 FROM s"):
        with pytest.raises(CallerError, match="can be grouped"):
            check_groupable(sql)
