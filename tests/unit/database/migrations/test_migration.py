"""Migrations: named, ordered, applied once, never changed afterwards."""

import pytest

from headrace.database.migrations import Migration, load_migrations, pending
from headrace.errors import BugError

ADD = Migration("0001_add.sql", "CREATE TABLE t ()")
DROP = Migration("0002_drop.sql", "DROP TABLE old")


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    """The number decides."""
    (tmp_path / "0002_drop.sql").write_text("DROP TABLE old")
    (tmp_path / "0001_add.sql").write_text("CREATE TABLE t ()")
    (tmp_path / "README").write_text("not SQL")
    assert load_migrations(tmp_path) == (ADD, DROP)


def test_a_file_without_number_is_refused(tmp_path):
    """A misnamed file would otherwise never run."""
    (tmp_path / "add.sql").write_text("")
    with pytest.raises(BugError, match=r"add\.sql"):
        load_migrations(tmp_path)


def test_whatever_is_there_is_pending():
    """No file waits for a stage that nobody would ever run."""
    assert pending([ADD, DROP], {}) == [ADD, DROP]
    assert pending([ADD, DROP], {ADD.name: ADD.checksum}) == [DROP]


def test_what_was_applied_is_not_pending():
    """A migration runs once."""
    assert pending([ADD], {ADD.name: ADD.checksum}) == []


def test_a_changed_file_is_refused():
    """History that was rewritten would leave shards with different schemas."""
    with pytest.raises(BugError, match="changed after it was applied"):
        pending([ADD], {ADD.name: "another checksum"})
