"""The door for pages: AG-UI 1.0, a POST that is answered with the events of one run [1].

A run is an execution; its thread is an `instance` of the agent, so a conversation goes on in `context.state`. The same
run asked for twice is one execution. Who leaves cancels it: a page has no other way to say so, and no way back to the
stream.

What is refused before the run has begun is a problem+json with its status, as everywhere; after that it is RUN_ERROR.

[1] https://docs.ag-ui.com, "Events", "RunAgentInput"
"""

import msgspec

from headrace.server.agent_paths import agent_id_of
from headrace.server.exchange import Exchange, Operation, Streamed
from headrace.server.protocols.ag_ui_events import RunAgentInput, RunWords, input_of
from headrace.server.protocols.executions import Executions
from headrace.server.protocols.profile import Profiles

PREFIX = "/ag-ui"
AGENT = f"{PREFIX}/{{agent_id}}"

_decoder = msgspec.json.Decoder(RunAgentInput)


class AgUiDoor:
    """The operation of AG-UI on the agents of one host."""

    def __init__(self, executions: Executions, profiles: Profiles) -> None:
        self._executions = executions
        self._profiles = profiles

    def operations(self) -> tuple[Operation, ...]:
        """Everything that this door opens."""
        return (
            Operation(
                method="POST",
                path=AGENT,
                name="agUiRun",
                summary="A run of AG-UI, as a stream of its events.",
                handler=self.run,
                permission="agent:execute",
                request=RunAgentInput,
                media_type="text/event-stream",
                answers={200: str},
                failures=(403, 404, 409, 413, 415, 422, 429, 503),
            ),
        )

    async def run(self, exchange: Exchange) -> Streamed:
        """Begin a run and stream it."""
        agent_id, tenant = agent_id_of(exchange), exchange.tenant
        run = await exchange.body(_decoder)
        self._executions.admit(tenant)
        profile = await self._profiles.find(agent_id, tenant=tenant)
        execution = await self._executions.begin(
            agent_id,
            input_of(run, profile.ag_ui),
            tenant=tenant,
            execution_id=run.execution_id(agent_id),
            instance=run.instance,
        )
        return self._executions.streamed(execution, RunWords(run), is_left_cancelled=True)
