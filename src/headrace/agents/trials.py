"""Counts what becomes of executions while a version is on trial, and ends the trial when it is surely worse.

Every process counts its own executions and writes its counts down with each beat; the judgement is over all of them,
and any process may make it: the first one that ends the trial is the one that tells of it.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from headrace.agents.execution import Execution, Status
from headrace.agents.rollout import RolloutPolicy, Tally, judge
from headrace.agents.store import AgentStore, Canary
from headrace.agents.versions import Versions
from headrace.errors import AgentNotFound, BackendError

_FAILURES = frozenset({"failed", "timeout"})
_SUCCESSES = frozenset({"completed"})

TrialKey = tuple[str, str, str]
"""Tenant, agent id and trial."""


class _Trial:
    __slots__ = ("canary", "is_ending", "mine", "others")

    def __init__(self, canary: str) -> None:
        self.canary = canary
        self.mine: dict[str, Tally] = {}
        self.others: dict[str, Tally] = {}
        self.is_ending = False

    def tallies(self) -> tuple[Tally, Tally]:
        """Of the canary, and of every other version, which is the one in service."""
        canary, stable = Tally(), Tally()
        for part in (self.mine, self.others):
            for version, tally in part.items():
                if version == self.canary:
                    canary = canary.plus(tally)
                else:
                    stable = stable.plus(tally)
        return canary, stable


class Trials:
    """The trials that executions of this process count for."""

    def __init__(
        self,
        store: AgentStore,
        versions: Versions,
        policy: RolloutPolicy,
        *,
        writer: str,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._store = store
        self._versions = versions
        self._policy = policy
        self._writer = writer
        self._spawn = spawn
        self._trials: dict[TrialKey, _Trial] = {}

    def count(self, execution: Execution, status: Status, canary: Canary) -> None:
        """An attempt that began during a trial has ended so."""
        failed = status in _FAILURES
        if not failed and status not in _SUCCESSES:
            return
        key = (execution.tenant, execution.agent_id, canary.trial)
        trial = self._trials.setdefault(key, _Trial(canary.version))
        tally = trial.mine.setdefault(execution.version, Tally())
        tally.count(failed=failed, run_ms=execution.run_ms)
        if failed and execution.version == canary.version:
            self._judge(key, trial)

    async def exchange(self) -> None:
        """Write down what was counted, learn what others counted, and judge."""
        for key, trial in list(self._trials.items()):
            tenant, agent_id, trial_id = key
            try:
                agent = await self._versions.in_service(tenant, agent_id)
                if agent.canary is None or agent.canary.trial != trial_id:
                    # It ended. Executions that began in it and end now count for nothing; they are dropped again.
                    self._trials.pop(key, None)
                    continue
                trial.others = await self._store.tally(tenant, agent_id, trial_id, trial.mine, writer=self._writer)
            except AgentNotFound:
                self._trials.pop(key, None)
            except BackendError:
                continue  # the shard's own event tells; what was counted is written with the next beat
            except Exception as error:  # noqa: BLE001 - one trial must not end the judging of all others
                loop = asyncio.get_running_loop()
                loop.call_exception_handler({"message": "a trial was not judged", "exception": error})
            else:
                self._judge(key, trial)

    def _judge(self, key: TrialKey, trial: _Trial) -> None:
        verdict = judge(*trial.tallies(), self._policy)
        if verdict.decision == "abort" and not trial.is_ending:
            trial.is_ending = True
            self._spawn(self._end(key, trial, verdict.reason))

    async def _end(self, key: TrialKey, trial: _Trial, reason: str) -> None:
        tenant, agent_id, trial_id = key
        try:
            await self._versions.abort(tenant, agent_id, reason=reason, trial=trial_id, by_itself=True)
        except BackendError:
            trial.is_ending = False  # judged again with the next beat
