"""The ledger against a model of Postgres: no result that lacks a change that was told is ever called good."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.database.query_cache.ledger import REMEMBERED, Ledger, Snapshot, Verdict

TABLES = range(3)
NOW = 1000.0


class Model:
    """Transactions that reach the log, the stream and the eyes of others, each at its own moment."""

    def __init__(self, rng, first_xid):
        self.rng = rng
        self.next_xid = first_xid
        self.running = {}
        self.unlogged = []
        self.logged = []
        self.told = {}
        self.results = []
        self.ledger = Ledger()

    def begin(self):
        tables = {self.rng.choice(TABLES) for _ in range(self.rng.randrange(1, 3))}
        self.running[self.next_xid] = tables
        self.unlogged.append(self.next_xid)
        self.next_xid += 1

    def end_untold(self):
        """Over before the stream begins."""
        while self.unlogged:
            self.running.pop(self.unlogged.pop())

    def log(self):
        if self.unlogged:
            self.logged.append(self.unlogged.pop(self.rng.randrange(len(self.unlogged))))

    def tell(self):
        """In the order of the log, seen by others or not."""
        if self.logged:
            xid = self.logged.pop(0)
            self.told[xid] = self.running[xid]
            self.ledger.note(xid % 2**32, self.running[xid])

    def show(self):
        """What is told becomes visible to others."""
        if shown := [xid for xid in self.told if xid in self.running]:
            self.running.pop(self.rng.choice(shown))

    def read(self):
        xmin = min(self.running, default=self.next_xid)
        text = f"{xmin}:{self.next_xid}:{','.join(map(str, sorted(self.running)))}"
        tables = {self.rng.choice(TABLES)}
        self.results.append((Snapshot.read(text), tables, set(self.running), self.next_xid))

    def check(self):
        for snapshot, tables, running, next_xid in self.results:
            lacked = [
                xid for xid, changed in self.told.items() if changed & tables and (xid >= next_xid or xid in running)
            ]
            verdict = self.ledger.judge("1/1", snapshot, tables, read_at=NOW)
            assert (verdict is Verdict.STALE) == bool(lacked)


@settings(max_examples=300)
@given(st.integers(0, 2**32), st.sampled_from([1, 2**31 - 40, 2**32 - 40, 2**33 + 2**31]))
def test_a_result_is_stale_exactly_if_it_lacks_what_was_told(seed, first_xid):
    """Commits reach the log, the stream and other snapshots in any order; the ledger sees through all of them."""
    model = Model(random.Random(seed), first_xid)
    model.begin()
    model.read()
    model.end_untold()
    model.ledger.begin(lineage="1/1", base=model.next_xid, since=0.0, published=frozenset(TABLES))
    assert model.ledger.judge("1/1", *model.results[0][:2], read_at=NOW) is Verdict.UNKNOWN
    model.results.clear()

    for _ in range(80):
        model.rng.choice([model.begin, model.log, model.tell, model.show, model.read])()
        model.check()


def test_a_load_that_began_after_the_telling_may_still_lack_the_change():
    """The committer stands between the log and being visible: the snapshot shows that, a version number would not."""
    ledger = Ledger()
    ledger.begin(lineage="1/1", base=100, since=0.0, published=None)
    ledger.note(105, [7])

    assert ledger.judge("1/1", Snapshot.read("105:110:105,108"), [7], read_at=NOW) is Verdict.STALE
    assert ledger.judge("1/1", Snapshot.read("108:110:108"), [7], read_at=NOW) is Verdict.GOOD
    assert ledger.judge("1/1", Snapshot.read("105:110:105,108"), [8], read_at=NOW) is Verdict.GOOD


def test_what_was_read_before_the_stream_began_is_not_vouched_for():
    """Nobody told of what ended before; a snapshot that does not see all of it may lack a change."""
    ledger = Ledger()
    ledger.begin(lineage="1/1", base=100, since=0.0, published=None)

    assert ledger.judge("1/1", Snapshot.read("99:101:99"), [7], read_at=NOW) is Verdict.UNKNOWN
    assert ledger.judge("1/1", Snapshot.read("100:100:"), [7], read_at=NOW) is Verdict.GOOD


def test_another_server_or_timeline_is_never_good():
    """After a failover the same ids mean other transactions."""
    ledger = Ledger()
    ledger.begin(lineage="1/00000002", base=100, since=0.0, published=None)

    assert ledger.judge("1/00000001", Snapshot.read("500:500:"), [7], read_at=NOW) is Verdict.UNKNOWN
    ledger.end()
    assert ledger.judge("1/00000002", Snapshot.read("500:500:"), [7], read_at=NOW) is Verdict.UNKNOWN


def test_a_table_that_is_not_told_of_is_never_good():
    """Only what is published comes through the stream."""
    ledger = Ledger()
    ledger.begin(lineage="1/1", base=100, since=0.0, published=frozenset({7}))

    assert ledger.judge("1/1", Snapshot.read("500:500:"), [7, 8], read_at=NOW) is Verdict.UNKNOWN


def test_an_altered_structure_leaves_nothing_good_that_was_read_before():
    """DDL is not streamed: what is older than its discovery is not vouched for any more."""
    ledger = Ledger()
    ledger.begin(lineage="1/1", base=100, since=0.0, published=None)
    ledger.restructure(NOW)

    assert ledger.judge("1/1", Snapshot.read("150:150:"), [7], read_at=NOW) is Verdict.UNKNOWN
    assert ledger.judge("1/1", Snapshot.read("150:150:"), [7], read_at=NOW + 0.1) is Verdict.GOOD


def test_what_was_read_before_the_stream_is_not_known_by_its_ids():
    """A server that crashed gives ids out again: an old snapshot may seem to see transactions that are yet to come."""
    ledger = Ledger()
    ledger.begin(lineage="1/1", base=100, since=NOW, published=None)

    assert ledger.judge("1/1", Snapshot.read("150:150:"), [7], read_at=NOW - 1) is Verdict.UNKNOWN
    assert ledger.judge("1/1", Snapshot.read("100:100:"), [7], read_at=NOW + 1) is Verdict.GOOD


def test_no_two_ledgers_have_the_same_version():
    """A verdict that is remembered with a version is that of one ledger, however many there are in the process."""
    ledgers = [Ledger() for _ in range(3)]
    seen = [ledger.version for ledger in ledgers]
    for ledger in ledgers:
        ledger.begin(lineage="1/1", base=100, since=0.0, published=None)
        seen.append(ledger.version)
        ledger.note(105, [7])
        seen.append(ledger.version)

    assert len(set(seen)) == len(seen)


def test_forgotten_ids_stay_forbidden():
    """Of more changes than are remembered one by one, the highest id still stands for them."""
    ledger = Ledger()
    ledger.begin(lineage="1/1", base=1, since=0.0, published=None)
    for xid in range(10, 10 + 2 * REMEMBERED):
        ledger.note(xid, [7])

    assert ledger.judge("1/1", Snapshot.read("10:1000:10"), [7], read_at=NOW) is Verdict.UNKNOWN
    assert ledger.judge("1/1", Snapshot.read("1000:1000:"), [7], read_at=NOW) is Verdict.GOOD
