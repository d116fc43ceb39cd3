"""Records on disk: whole, signed, ours, bounded; or not there."""

import os
import shutil
import stat
import threading
from pathlib import Path

import pytest

from headrace.agents.code import store as code_store
from headrace.agents.code.keys import SigningKeys
from headrace.agents.code.store import BadRecord, CodeStore
from headrace.clock import SystemClock
from headrace.errors import ConfigError
from headrace.events import CodeStoreRecovered, CodeStoreUnavailable
from headrace.testing import FakeClock

KEYS = SigningKeys.given("k" * 32)
NAMES = [f"{number:064x}" for number in range(1, 200)]
NAME = NAMES[0]


class Events(list):
    """An observer that remembers."""

    def on(self, event):
        self.append(event)


@pytest.fixture
def events():
    return Events()


@pytest.fixture
def make(tmp_path, events):
    stores = []

    def make(**options):
        given = {"keys": KEYS, "bytes_max": 1 << 20, "lock_wait_s": 0.05, "observer": events, "clock": SystemClock()}
        store = CodeStore(options.pop("directory", tmp_path / "code"), **(given | options))
        stores.append(store)
        return store

    yield make
    for store in stores:
        store.close(10)


def test_a_directory_stays_where_it_was_when_it_was_named(make, tmp_path, monkeypatch):
    """A path of the working directory, even that itself, has its key beside it, wherever the process goes."""
    monkeypatch.chdir(tmp_path)
    store = make(directory=Path(), keys=None)
    monkeypatch.chdir("/")

    assert written(store).parent == tmp_path
    assert tmp_path.with_name(f"{tmp_path.name}.key").exists()


def test_a_directory_without_a_name_is_refused(make):
    """The key could not lie beside it."""
    with pytest.raises(ConfigError, match="'/'"):
        make(directory=Path("/"), keys=None)


def written(store, name=NAME, meta=b"{}", body=b"body"):
    """The path of a record that is in its place."""
    lock = store.lock(name)
    assert lock is not None
    store.write(name, meta, body, lock)
    assert store.flush(60)
    return store.directory / f"{name}.code"


def names(directory):
    """What is in it besides the lock file."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def test_a_record_is_read_as_it_was_written(make):
    """By this store and by another one on the directory."""
    written(make(), meta=b"m" * 10, body=b"b" * 100_000)

    assert make().read(NAME) == (b"m" * 10, b"b" * 100_000)
    assert make().read(NAMES[1]) is None


def test_everything_belongs_to_the_owner_alone(make):
    """The directory, the record and the quarantine."""
    store = make()
    path = written(store)
    written(store, NAMES[1])
    store.quarantine(NAMES[1])

    assert store.directory.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert (store.directory / "quarantine").stat().st_mode & 0o777 == 0o700
    assert names(store.directory) == [path.name, "quarantine"]


def test_an_open_directory_is_closed_to_others(make):
    """It may have been made by hand."""
    store = make()
    store.directory.mkdir(mode=0o755)

    store.read(NAME)

    assert store.directory.stat().st_mode & 0o777 == 0o700


def test_an_open_directory_of_somebody_is_left_as_it_is(make, events):
    """Who names /var/www by mistake does not lock everybody out of it."""
    store = make()
    store.directory.mkdir(mode=0o755)
    (store.directory / "index.html").write_text("hello")

    assert store.read(NAME) is None

    assert store.directory.stat().st_mode & 0o777 == 0o755
    assert names(store.directory) == ["index.html"]
    assert "'index.html' in it is not ours" in events[-1].reason


@pytest.mark.parametrize("kind", ["link", "file", "foreign"])
def test_a_directory_that_is_not_ours_is_not_used(make, events, tmp_path, monkeypatch, kind):
    """Somebody could swap what is behind a link, and owns what is his."""
    directory = tmp_path / "code"
    if kind == "link":
        (tmp_path / "elsewhere").mkdir()
        directory.symlink_to(tmp_path / "elsewhere")
    elif kind == "file":
        directory.write_text("")
    else:
        directory.mkdir()
        monkeypatch.setattr(code_store.os, "geteuid", lambda: os.getuid() + 1)
    store = make()

    assert store.read(NAME) is None
    assert store.lock(NAME) is None

    assert [(type(event), event.operation) for event in events] == [
        (CodeStoreUnavailable, "read"),
        (CodeStoreUnavailable, "write"),
    ]
    assert kind != "link" or names(tmp_path / "elsewhere") == []


def test_trouble_is_told_once_and_so_is_its_end(make, events, tmp_path):
    """Not at every look-up."""
    store = make()
    store.directory.write_text("in the way")
    for _ in range(3):
        store.read(NAME)
    store.directory.unlink()

    written(store)
    for _ in range(3):
        store.read(NAME)

    assert [type(event) for event in events] == [CodeStoreUnavailable, CodeStoreRecovered]
    assert str(store.directory) in {event.directory for event in events}


def test_a_directory_that_goes_away_comes_back(make, tmp_path):
    """An administrator may clear it at any time."""
    store = make()
    written(store)
    shutil.rmtree(store.directory)
    assert store.read(NAME) is None

    written(store)

    assert store.read(NAME) == (b"{}", b"body")


def test_a_record_is_replaced_whole(make):
    """No other file is left beside it."""
    store = make()
    written(store)

    path = written(store, body=b"other")

    assert store.read(NAME) == (b"{}", b"other")
    assert names(store.directory) == [path.name]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data[:50], "no record's length"),
        (lambda data: data[:-1], "signature"),
        (lambda data: data + b"x", "signature"),
        (lambda data: b"X" + data[1:], "not a record of this format"),
        (lambda data: data[:8] + bytes([data[8] ^ 1]) + data[9:], "a key that is not here"),
        (lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "signature"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "signature"),
        (lambda data: b"", "no record's length"),
    ],
)
def test_what_was_changed_is_refused_with_the_reason(make, change, reason):
    """Whatever it is that was changed."""
    store = make()
    path = written(store, body=b"b" * 100)
    path.write_bytes(change(path.read_bytes()))

    with pytest.raises(BadRecord, match=reason):
        store.read(NAME)


def test_lengths_count_only_when_signed(make):
    """A record of ours whose parts do not add up to it is refused, too."""
    store = make()
    path = written(store)
    signed = code_store._HEAD.pack(code_store.MAGIC, KEYS.current, 1_000, 1_000) + b"short"
    path.write_bytes(signed + KEYS.sign(signed))

    with pytest.raises(BadRecord, match="lengths"):
        store.read(NAME)


def test_a_huge_file_is_not_read(make):
    """Its length alone refuses it."""
    store = make()
    path = written(store)
    os.truncate(path, code_store.RECORD_BYTES_MAX + 1)

    with pytest.raises(BadRecord, match="no record's length"):
        store.read(NAME)


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_only_files_are_records(make, tmp_path, kind):
    """Nothing is followed, and nothing is waited for."""
    store = make()
    path = written(store)
    data = path.read_bytes()
    path.unlink()
    if kind == "link":
        (tmp_path / "elsewhere").write_bytes(data)
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()

    with pytest.raises(BadRecord):
        store.read(NAME)
    store.quarantine(NAME)

    assert store.read(NAME) is None
    assert kind != "link" or (tmp_path / "elsewhere").read_bytes() == data


def test_a_foreign_file_is_not_read(make, monkeypatch):
    """Who owns it could change it between two looks."""
    store = make()
    path = written(store)
    real = os.fstat
    foreign = path.stat().st_ino

    def fstat(descriptor):
        status = real(descriptor)
        if status.st_ino != foreign:
            return status
        return os.stat_result((*status[:4], status.st_uid + 1, *status[5:]))

    monkeypatch.setattr(code_store.os, "fstat", fstat)

    with pytest.raises(BadRecord, match="belongs to user"):
        store.read(NAME)


def test_a_rotated_key_reads_what_the_old_one_signed(make):
    """Until the old one is removed."""
    written(make(keys=SigningKeys.given("o" * 32)))

    assert make(keys=SigningKeys.given(["n" * 32, "o" * 32])).read(NAME) == (b"{}", b"body")
    with pytest.raises(BadRecord, match="a key that is not here"):
        make(keys=SigningKeys.given("n" * 32)).read(NAME)


def test_without_a_key_the_directorys_own_is_used(make, tmp_path):
    """It lies beside the directory, so that a copy of the directory does not hold it."""
    written(make(keys=None))

    assert make(keys=None).read(NAME) == (b"{}", b"body")
    assert (tmp_path / "code.key").stat().st_mode & 0o777 == 0o600
    assert names(tmp_path / "code") == [f"{NAME}.code"]


def test_a_key_that_others_know_is_not_used(make, events, tmp_path):
    """Nothing is read or written with it, and somebody is told."""
    written(make(keys=None))
    (tmp_path / "code.key").chmod(0o644)
    store = make(keys=None)

    assert store.read(NAME) is None
    lock = store.lock(NAME)
    store.write(NAME, b"{}", b"other", lock)
    store.flush(60)

    assert store.unwritten == 1
    again = make().lock(NAME)
    assert again is not None
    again.release()
    assert [event.operation for event in events] == ["read", "write"]
    assert "mode 0600" in events[0].reason


def test_the_bound_is_kept_and_the_longest_unused_goes_first(make):
    """To be read is to be used."""
    store = make(bytes_max=20_000)
    for age, name in enumerate(NAMES[:16]):
        path = written(store, name, body=b"b" * 1_000)
        os.utime(path, (1_000 + age, 1_000 + age))
    assert store.read(NAMES[0]) is not None

    for name in NAMES[16:20]:
        written(store, name, body=b"b" * 1_000)

    left = {name.removesuffix(".code") for name in names(store.directory)}
    assert sum(path.stat().st_size for path in store.directory.iterdir()) <= 20_000
    assert {NAMES[0], *NAMES[16:20]} <= left
    assert NAMES[1] not in left
    assert store.evictions == 20 - len(left)


def test_others_writes_count_too(make):
    """Each process looks at the files themselves now and then."""
    one, other = make(bytes_max=30_000), make(bytes_max=30_000)
    written(one, NAMES[0])
    for name in NAMES[1:26]:
        written(other, name, body=b"b" * 1_000)
    for name in NAMES[100:140]:
        written(one, name, body=b"b" * 100)

    assert sum(path.stat().st_size for path in one.directory.iterdir()) <= 30_000


def test_a_record_beyond_the_bound_is_not_written(make):
    """It would push everything else out."""
    store = make(bytes_max=1_000)

    path = written(store, body=b"b" * 1_000)

    assert not path.exists()
    assert store.unwritten == 1


def test_what_dead_processes_left_is_cleared(make):
    """Files half written, when nobody can be at work on them any more."""
    clock = FakeClock(wall=4e9)
    store = make(clock=clock)
    store.directory.mkdir(mode=0o700)
    (store.directory / ".0123.new").write_bytes(b"half")

    path = written(store)

    assert names(store.directory) == [path.name]


def test_what_is_new_is_not_cleared(make):
    """Another process may be writing it."""
    store = make()
    store.directory.mkdir(mode=0o700)
    (store.directory / ".0123.new").write_bytes(b"half")

    path = written(store)

    assert names(store.directory) == [".0123.new", path.name]


def test_one_holder_a_lock(make):
    """In this process and, since it is the kernel's, in all; another record has another one."""
    store, other = make(), make()
    lock = store.lock(NAME)

    assert other.lock(NAME) is None
    assert other.lock(NAMES[1]) is not None
    lock.release()
    lock.release()
    again = other.lock(NAME)
    assert again is not None
    again.release()


def test_a_lock_that_was_not_had_leaves_nothing_open(make):
    """Else a busy record would use up the process's descriptors."""
    store = make(lock_wait_s=0.0)
    lock = store.lock(NAME)
    before = len(list(Path("/proc/self/fd").iterdir()))

    for _ in range(20):
        assert store.lock(NAME) is None

    assert len(list(Path("/proc/self/fd").iterdir())) < before + 10
    lock.release()


def test_a_lock_is_waited_for(make):
    """By many threads, one after the other."""
    store = make(lock_wait_s=60.0)
    inside, most, rounds = [0], [0], []

    def work():
        for _ in range(20):
            lock = store.lock(NAME)
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
            rounds.append(lock is not None)
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert rounds == [True] * 80
    assert most == [1]


def test_without_byte_locks_there_is_one_lock(make, monkeypatch):
    """Slower where several compile, and as right."""
    monkeypatch.setattr(code_store.sys, "platform", "other")
    store = make()
    lock = store.lock(NAME)

    assert store.lock(NAMES[1]) is None
    lock.release()
    store.lock(NAMES[1]).release()


def test_the_lock_is_held_until_the_record_is_in_its_place(make):
    """Who gets it then finds the record."""
    store, other = make(), make(lock_wait_s=60.0)
    store.write(NAME, b"{}", b"body", store.lock(NAME))

    lock = other.lock(NAME)

    assert other.read(NAME) == (b"{}", b"body")
    lock.release()


def test_a_full_queue_drops_and_counts(make, monkeypatch):
    """A cache that cannot keep up writes less; nobody waits for it."""
    store, gate = make(), threading.Event()
    real = code_store._place
    monkeypatch.setattr(code_store, "_place", lambda *of: (gate.wait(60), real(*of)))
    for name in NAMES[: code_store.WRITES_MAX + 10]:
        store.write(name, b"{}", b"body", store.lock(name))
    gate.set()

    assert store.flush(60)

    assert 8 <= store.unwritten <= 10
    assert store.written + store.unwritten == code_store.WRITES_MAX + 10
    for name in NAMES[: code_store.WRITES_MAX + 10]:
        store.lock(name).release()


def test_a_quarantine_is_bounded(make):
    """In number and in bytes; the newest are kept, and what is too large for it goes."""
    store = make(bytes_max=80_000)
    for name in NAMES[:30]:
        written(store, name)
        store.quarantine(name)
    large = written(store, NAMES[40])
    os.truncate(large, 20_000)
    store.quarantine(NAMES[40])

    kept = names(store.directory / "quarantine")

    assert len(kept) <= code_store.QUARANTINE_MAX
    assert not large.exists()
    assert sum(path.stat().st_size for path in (store.directory / "quarantine").iterdir()) <= 10_000


def test_a_closed_store_ends_its_thread_and_can_be_used_again(make):
    """What was handed over before is on disk."""
    store = make()
    store.write(NAME, b"{}", b"body", store.lock(NAME))

    store.close(10)

    assert store.read(NAME) == (b"{}", b"body")
    assert not [thread for thread in threading.enumerate() if thread.name == "headrace-code-writer"]
    written(store, NAMES[1])
    assert stat.S_ISREG((store.directory / f"{NAMES[1]}.code").stat().st_mode)
