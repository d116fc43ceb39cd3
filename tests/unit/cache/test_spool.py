"""The file behind queued writes: what is read back after a cut, damage, a full disk, and by whom."""

import errno
import fcntl
import os
import zlib
from pathlib import Path

import pytest

from headrace.cache.spool import Record, Spool, read
from headrace.errors import DirectoryUnusable


def record(key: str, data: bytes | None = b"data", kind: str = "write") -> Record:
    return Record(key, data, None, b"g", kind)


def test_a_cut_spool_is_good_up_to_the_cut(tmp_path: Path):
    """Whatever byte a file ends at, the complete records before it are read, in order; that is no damage."""
    spool = Spool(tmp_path, sync=False)
    spool.open()
    records = [record(f"k{number}") for number in range(5)]
    spool.append(records)
    data = next(tmp_path.glob("*.spool")).read_bytes()
    spool.close(done=True)
    size = len(data) // 5
    for end in range(len(data)):
        assert read(data[:end]) == (records[: end // size], True)


def test_damage_is_not_a_cut():
    """A flipped bit ends what is read, and is told apart from a missing end."""
    payload = b"\x95\xa1k\xc4\x01d\xc0\xc4\x01g\xa5write"
    good = len(payload).to_bytes(4, "little") + zlib.crc32(payload).to_bytes(4, "little") + payload
    assert read(good * 3) == ([record("k", b"d")] * 3, True)
    for at in range(4, len(good)):
        damaged = bytearray(good * 3)
        damaged[len(good) + at] ^= 1
        assert read(bytes(damaged)) == ([record("k", b"d")], False)
    assert read(good + b"\xff" * 20) == ([record("k", b"d")], False)
    assert read(good + b"\0" * 20) == ([record("k", b"d")], False)


def test_a_record_of_four_parts_is_a_write():
    """What was written before there were kinds is read as what it was."""
    payload = b"\x94\xa1k\xc4\x01d\xc0\xc4\x01g"
    crc = zlib.crc32(payload)
    data = len(payload).to_bytes(4, "little") + crc.to_bytes(4, "little") + payload
    assert read(data) == ([record("k", b"d")], True)


def test_a_living_process_keeps_its_spool(tmp_path: Path):
    """Only files that nobody holds are adopted."""
    one, two = Spool(tmp_path, sync=True), Spool(tmp_path, sync=False)
    assert one.open() == []
    one.append([record("k", b"1"), record("l", b"2"), record("l", None)])
    assert two.open() == []
    one.close(done=False)
    three = Spool(tmp_path, sync=False)
    assert three.open() == [record("k", b"1")]
    for spool in (two, three):
        spool.close(done=True)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_begun_anew_is_not_adopted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A process that opened the old file of a living one, just before that began another, leaves both alone."""
    one, two = Spool(tmp_path, sync=False), Spool(tmp_path, sync=False)
    one.open()
    one.append([record("k")])
    lock = fcntl.flock

    def lock_late(file: int, how: int) -> None:
        monkeypatch.setattr("headrace.cache.spool.fcntl.flock", lock)
        one.restart([record("k")])
        lock(file, how)

    monkeypatch.setattr("headrace.cache.spool.fcntl.flock", lock_late)
    assert two.open() == []
    two.close(done=True)
    one.close(done=False)
    three = Spool(tmp_path, sync=False)
    assert three.open() == [record("k")]
    three.close(done=True)


def test_writes_and_invalidations_of_one_name_are_two_things(tmp_path: Path):
    """A key's write, a tag and a pattern of the same name do not cross each other out."""
    one = Spool(tmp_path, sync=False)
    one.open()
    kinds = ["write", "key", "tag", "pattern"]
    one.append([*(record("k", b"", kind) for kind in kinds), record("k", None, "tag")])
    one.close(done=False)
    two = Spool(tmp_path, sync=False)
    assert [each.kind for each in two.open()] == ["write", "key", "pattern"]
    two.close(done=True)


def test_namespaces_do_not_adopt_each_others_files(tmp_path: Path):
    """Processes of several applications may share a directory."""
    one, two = Spool(tmp_path, sync=False, namespace="shop"), Spool(tmp_path, sync=False, namespace="blog")
    one.open()
    one.append([record("k")])
    one.close(done=False)
    assert two.open() == []
    two.close(done=True)
    heir = Spool(tmp_path, sync=False, namespace="shop")
    assert heir.open() == [record("k")]
    heir.close(done=True)


@pytest.mark.parametrize("how", ["append", "restart"])
def test_a_disk_that_fills_in_the_middle_of_a_record_spoils_nothing(tmp_path: Path, monkeypatch, how):
    """What was written before a failed write, and what is written after it, is read again."""
    spool = Spool(tmp_path, sync=False)
    spool.open()
    spool.append([record("before")])
    write, left = os.write, [20]

    def write_some(file: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        size, left[0] = min(left[0], len(data)), 0
        return write(file, data[:size])

    with monkeypatch.context() as patch:
        patch.setattr("headrace.cache.spool.os.write", write_some)
        with pytest.raises(OSError, match="No space"):
            (spool.append if how == "append" else spool.restart)([record("lost")])
    spool.append([record("after")])
    spool.close(done=False)
    heir = Spool(tmp_path, sync=False)
    assert [each.key for each in heir.open()] == ["before", "after"]
    heir.close(done=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_spool_directory_is_an_error_with_a_fix(tmp_path: Path):
    """A file where the directory should be is told at open."""
    (tmp_path / "file").write_text("")
    with pytest.raises(DirectoryUnusable, match="spool"):
        Spool(tmp_path / "file", sync=False).open()


def test_the_largest_value_that_can_be_written_can_be_read_again(tmp_path: Path):
    """No record is too large for its reader, which would lose it and all that follow it."""
    spool = Spool(tmp_path, sync=False)
    spool.open()
    large = record("large", bytes(70 * 1024 * 1024))
    spool.append([large, record("small")])
    spool.close(done=False)
    heir = Spool(tmp_path, sync=False)
    found = heir.open()
    heir.close(done=True)
    assert [one.key for one in found] == ["large", "small"]
    assert heir.damaged == []
