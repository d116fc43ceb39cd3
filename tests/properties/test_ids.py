"""Ids are unique whatever the clocks do, whoever pauses, and however leases change hands."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from headrace.database.ids import EPOCH_MS, IdSequence, Lease, parts_of

LEASE_MS = 3000
NODES = 2


class Leases(RuleBasedStateMachine):
    """Processes with clocks of their own and two node numbers to share; the home shard's clock may jump.

    The table of leases does what the SQL does: a number whose limit is past is free, a limit never goes back while
    its holder lives.
    """

    processes = Bundle("processes")

    def __init__(self):
        super().__init__()
        self.server_ms = EPOCH_MS + 10**6
        self.monotonic = 0.0
        self.table = {}
        self.made = []
        self.owners = 0

    @rule(target=processes, skew=st.sampled_from([0.0, 0.5, 1.0, 3.0]))
    def start(self, skew):
        """A process whose monotonic clock runs at another speed: paused for ever, slow, right, fast."""
        return {"skew": skew, "born": self.monotonic, "ids": None, "owner": None}

    def now(self, process):
        """The process's monotonic time."""
        return (self.monotonic - process["born"]) * process["skew"]

    @rule(process=processes)
    def acquire(self, process):
        """Take a free number, as the SQL does."""
        for node in range(NODES):
            if node not in self.table or self.table[node][1] <= self.server_ms:
                self.owners += 1
                process["owner"] = self.owners
                self.table[node] = (self.owners, self.server_ms + LEASE_MS)
                lease = Lease(node, self.server_ms, self.server_ms + LEASE_MS, self.now(process))
                after = process["ids"].last_ms if process["ids"] else 0
                process["ids"] = IdSequence(lease, ahead_ms_max=1000, after_ms=after)
                return

    @precondition(lambda self: self.table)
    @rule(process=processes, told=st.booleans())
    def renew(self, process, told):
        """Ask for more time; the answer may be lost after it was granted."""
        ids = process["ids"]
        if ids is None or self.table[ids.lease.node][0] != process["owner"]:
            return
        asked_at = self.now(process)
        limit = max(self.table[ids.lease.node][1], self.server_ms + LEASE_MS)
        self.table[ids.lease.node] = (process["owner"], limit)
        if told:
            ids.renewed(Lease(ids.lease.node, self.server_ms, limit, asked_at))

    @rule(process=processes)
    def release(self, process):
        """Give the number back."""
        ids, process["ids"] = process["ids"], None
        if ids is not None and self.table[ids.lease.node][0] == process["owner"]:
            self.table[ids.lease.node] = (process["owner"], min(self.table[ids.lease.node][1], ids.last_ms + 1))

    @rule(process=processes, count=st.sampled_from([1, 2, 5000]))
    def make(self, process, count):
        """Make ids, whether the lease is still ours or not."""
        ids = process["ids"]
        taken = [ids.take(self.now(process)) for _ in range(count)] if ids else []
        made = [each for each in taken if isinstance(each, int)]
        assert made == sorted(made)
        self.made += made

    @rule(ms=st.sampled_from([0, 1, 1000, LEASE_MS, 10 * LEASE_MS]), jump=st.sampled_from([0, 0, -500, -5000, 5000]))
    def pass_time(self, ms, jump):
        """Time passes, and the home shard's clock may be set while it does."""
        self.server_ms += ms + jump
        self.monotonic += ms / 1000

    @invariant()
    def nothing_is_made_twice(self):
        """Of all ids of all processes."""
        assert len(self.made) == len(set(self.made))
        assert all(0 <= parts_of(each).node < NODES for each in self.made[-3:])


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=40)
