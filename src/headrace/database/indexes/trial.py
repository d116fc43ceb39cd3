"""One change of an index on one shard: made, measured, and taken back where the workload is worse off."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from headrace.database.indexes.advice import IndexAdvice, IndexChange, State, Verdict
from headrace.database.indexes.building import Builder, Hold, Progress
from headrace.database.indexes.costs import Prepared
from headrace.database.indexes.index import bare_name
from headrace.database.indexes.journal import begin, make_journal, note
from headrace.database.indexes.measuring import Judgement, Measurement, fastest, judge, measure
from headrace.database.postgres.nodes import Node
from headrace.errors import IndexBuildFailed


@dataclass(frozen=True, slots=True)
class Trial:
    """One change on one shard, measured."""

    builder: Builder
    node: Node
    advice: IndexAdvice
    queries: Mapping[int, Prepared]
    calls: Sequence[int]
    timeout_s: float
    progress: Progress

    @property
    def wished(self) -> State:
        """What it comes to if all goes well."""
        return State.KEPT if self.advice.verdict is Verdict.CREATE else State.DROPPED

    async def run(self) -> IndexChange:
        """Change, measure, and take it back if that is better."""
        advice, creates = self.advice, self.advice.verdict is Verdict.CREATE
        await make_journal(self.node)
        async with self.builder.holding(self.node, advice.name) as hold:
            if creates and (size := await self.builder.size(hold)) is not None:
                there = Judgement(keep=True, reason="it was there already")
                return self._change(0, State.KEPT, there, {}, {}, size, None)
            before = await self._measure("before")
            number = await begin(
                self.node,
                name=advice.name,
                table=advice.table,
                sql=advice.sql,
                state=State.BUILDING if creates else State.DROPPING,
                reason=advice.reason,
                gain=advice.gain,
            )
            size, seconds = None, None
            try:
                if creates:
                    size, seconds = await self.builder.build(hold, advice.sql, self.progress)
                    await note(self.node, number, State.BUILT, "", size_bytes=size, seconds=seconds)
                else:
                    await self.builder.drop(hold, advice.reason)
            except IndexBuildFailed as error:
                # Where something is left the journal says what was begun, so that `recover` goes on with it.
                begun = State.BUILDING if creates else State.DROPPING
                is_settled = await self.builder.is_settled(hold)
                await note(self.node, number, State.FAILED if is_settled else begun, error.message)
                raise
            after, judgement = await self._judged(before)
            state = await self._settle(hold, judgement)
            await note(
                self.node, number, state, judgement.reason, before_ms=judgement.before_ms, after_ms=judgement.after_ms
            )
        return self._change(number, state, judgement, before, after, size, seconds)

    async def revert(self, earlier: IndexChange, why: str) -> IndexChange:
        """Take back what was kept here, because another shard is worse off."""
        if not earlier.id:
            return earlier
        judgement = Judgement(keep=False, reason=why)
        async with self.builder.holding(self.node, self.advice.name) as hold:
            state = await self._settle(hold, judgement)
            await note(self.node, earlier.id, state, why)
        return replace(earlier, state=state, reason=why)

    async def _judged(self, before: Measurement) -> tuple[Measurement, Judgement]:
        name = bare_name(self.advice.name)
        creates = self.advice.verdict is Verdict.CREATE
        after = await self._measure("after")
        judgement = judge(before, after, self.calls, name, creates=creates)
        if not judgement.keep:
            # Somebody else may have used the machine: it is condemned only if it is slow twice.
            after = fastest(after, await self._measure("after, again"))
            judgement = judge(before, after, self.calls, name, creates=creates)
        return after, judgement

    async def _settle(self, hold: Hold, judgement: Judgement) -> State:
        creates = self.advice.verdict is Verdict.CREATE
        if judgement.keep:
            return State.KEPT if creates else State.DROPPED
        self.progress(f"{self.node.name}: {judgement.reason}")
        if creates:
            await self.builder.drop(hold, judgement.reason)
            return State.DROPPED
        await self.builder.build(hold, self.advice.undo, self.progress)
        return State.RESTORED

    async def _measure(self, when: str) -> Measurement:
        self.progress(f"{self.node.name}: running {len(self.queries)} statements {when}")
        return await measure(self.node, self.queries, timeout_s=self.timeout_s)

    def _change(
        self,
        number: int,
        state: State,
        judgement: Judgement,
        before: Measurement,
        after: Measurement,
        size: int | None,
        seconds: float | None,
    ) -> IndexChange:
        both = sorted(before.keys() & after.keys())
        return IndexChange(
            shard=self.node.name,
            id=number,
            name=self.advice.name,
            table=self.advice.table,
            sql=self.advice.sql,
            state=state,
            reason=judgement.reason,
            size_bytes=size,
            estimated_gain=self.advice.gain,
            before_ms=judgement.before_ms,
            after_ms=judgement.after_ms,
            seconds=seconds,
            queries=tuple((self.queries[n].query.text, before[n].ms, after[n].ms) for n in both),
        )
