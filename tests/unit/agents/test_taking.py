"""One node's side of the durable queue."""

import asyncio
from types import SimpleNamespace

from headrace.agents import AgentsConfig
from headrace.agents.admission import Admission
from headrace.agents.execution import Execution
from headrace.agents.places import Places
from headrace.agents.queue import Queue
from headrace.agents.store import Submission
from headrace.agents.threads import DaemonThreads


class QueuedAgain:
    """A store whose only submission comes again: it was given back by what this node never heard the end of."""

    shards = ("shard-0",)

    def __init__(self) -> None:
        execution = Execution(id="e", agent_id="a", version="1.0.0", status="queued")
        self.left = 2
        self.submission = Submission(execution=execution, claim="c", timeout_s=60.0)
        self.known: list[object] = []

    async def take(self, shard: str, *, threaded: bool, **_: object) -> list[Submission]:
        if threaded or not self.left:
            return []
        self.left -= 1
        return [self.submission]

    async def give_back_unknown(self, shard: str, *, threaded: bool, known: list[object], **_: object) -> None:
        self.known.append(known)


async def test_what_is_taken_twice_ends_twice():
    """A submission that is taken again before its first taking has begun does not hide that one from `close`."""
    store, ended = QueuedAgain(), []

    async def start(submission: Submission) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(submission.key)

    config = AgentsConfig(cancel_grace_s=0.01)
    queue = Queue(
        store,
        config,
        places=Places(config, DaemonThreads(1, name="test")),
        admission=Admission(lambda tenant: None, queued_max=10),
        membership=SimpleNamespace(is_member=lambda shard: True, owner=lambda shard: "me"),
        start=start,
    )
    await queue.open()
    async with asyncio.timeout(60):
        while len(queue.starting()) < 2:
            await asyncio.sleep(0)

    await queue.close()

    assert ended == [store.submission.key] * 2
    assert store.known == [[], []]
