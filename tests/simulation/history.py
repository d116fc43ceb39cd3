"""What agents did and what clients were told, kept outside of all nodes, and what must hold in it.

- Of an attempt there is one beginning; of an agent that is not idempotent, one in all.
- While a beginning's node has its lease, no other one begins beside it, though its execution be over. A node whose
  lease is over may go on for a while with what it had: it is found out at its next beat, and whatever it writes
  changes nothing.
- What is on record as completed is what a body of that attempt returned.
- Nobody is told of two ends of one execution, and what was told is on record.
- What somebody was told is cancelled does not begin afterwards, and after a cancel no further attempt does.
- Every execution that somebody was promised has an end, and nothing stays queued or running.
"""

import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from headrace.agents.execution import FINISHED, Execution

ATTEMPTS = {"plain": 1, "threaded": 3, "again": 3, "counter": 3}
"""The agents and how often each may be tried."""
PLANNED = "planned"
"""What an agent raises that is to fail."""


@dataclass(slots=True, kw_only=True)
class Beginning:
    """One life of a body."""

    id: str
    attempt: int
    node: Any
    owner: str | None
    is_leased: bool
    token: str
    ended: bool = False
    returned: Any = None

    @property
    def goes_on(self) -> bool:
        return not (self.ended or self.node.is_dead)


class History:
    """Notes and checks. `is_leased` says whether a node of a name has its lease now."""

    def __init__(self) -> None:
        self.beginnings: dict[str, list[Beginning]] = defaultdict(list)
        self.ends: dict[str, tuple[str, bytes | None]] = {}
        self.promised: set[str] = set()
        self.cancels: set[str] = set()
        """Of these somebody asked for a cancel."""
        self.last_attempt: dict[str, int] = {}
        """After an answered cancel: the attempt that may be under way."""
        self.violations: list[str] = []

    def begin(self, agent_id: str, beginning: Beginning, *, is_leased: Any) -> None:
        """A body begins, in the turn of the loop in which it is called."""
        id, earlier = beginning.id, self.beginnings[beginning.id]
        if ATTEMPTS[agent_id] == 1 and earlier:
            self._complain(f"{id} began twice, on {earlier[0].node} and {beginning.node}, and is not idempotent")
        if beginning.attempt in {one.attempt for one in earlier}:
            self._complain(f"attempt {beginning.attempt} of {id} began twice")
        if beginning.attempt > ATTEMPTS[agent_id]:
            self._complain(f"attempt {beginning.attempt} of {id} began, of at most {ATTEMPTS[agent_id]}")
        if beginning.is_leased:
            self._check_lawful(beginning, earlier, is_leased)
        earlier.append(beginning)

    def _check_lawful(self, beginning: Beginning, earlier: list[Beginning], is_leased: Any) -> None:
        id = beginning.id
        for one in earlier:
            if one.goes_on and is_leased(one.owner):
                self._complain(f"attempt {beginning.attempt} of {id} began beside {one.attempt}, which has its lease")
        if self.ends.get(id, ("",))[0] == "cancelled":
            self._complain(f"{id} began after somebody was told that it is cancelled")
        if beginning.attempt > self.last_attempt.get(id, beginning.attempt):
            self._complain(f"attempt {beginning.attempt} of {id} began after a cancel was answered")

    def tell(self, execution: Execution) -> None:
        """Somebody is told this."""
        if execution.status not in FINISHED:
            return
        end = execution.status, execution.output_json
        first = self.ends.setdefault(execution.id, end)
        if first != end:
            self._complain(f"{execution.id} was told as {first} and as {end}")

    def tell_cancel(self, execution: Execution) -> None:
        """Somebody who asked for a cancel is told this."""
        self.tell(execution)
        if execution.status not in {"queued", "running"}:  # it came before the submission, and says so
            self.last_attempt.setdefault(execution.id, execution.attempt)

    def check_record(self, record: Any) -> None:
        """What is on record when everything has settled."""
        id, output = record.execution_id, record.output
        if record.status not in FINISHED:
            self._complain(f"{id} stays {record.status} ({record.owner=}, {record.attempt=})")
        told = self.ends.get(id)
        if told is not None and told != (record.status, None if output is None else output.encode()):
            self._complain(f"{id} was told as {told} and is on record as {record.status} {output}")
        if record.status == "completed":
            returned = [one.returned for one in self.beginnings[id] if one.attempt == record.attempt]
            if json.loads(output) not in returned:
                self._complain(f"{id} is completed with {output}, its attempt {record.attempt} returned {returned}")
        if record.status == "cancelled" and id not in self.cancels:
            self._complain(f"{id} is cancelled and nobody asked for it")
        if record.status == "failed" and PLANNED not in record.error and "changed elsewhere" not in record.error:
            self._complain(f"{id} failed: {record.error}")

    def check_promises(self, on_record: set[str]) -> None:
        """Nothing that somebody was promised, or told the end of, is missing."""
        for id in sorted((self.promised | self.ends.keys()) - on_record):
            self._complain(f"{id} was promised and is not on record")

    def _complain(self, what: str) -> None:
        self.violations.append(what)
