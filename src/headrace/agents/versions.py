"""Which version of an agent serves: deployments, aliases, trials, and the choice for one execution.

A version serves only after it was loaded, started and checked in the process that deploys it; the switch is one row in
one transaction. Whoever began before keeps the version that it began with.
"""

import re
from functools import partial
from typing import TYPE_CHECKING, Any

from headrace.agents.config import AgentsConfig
from headrace.agents.rollout import is_chosen
from headrace.agents.shelf import Loaded, Shelf
from headrace.agents.store import Agent, AgentStore, Canary, Deployment, Key, Version, agent_not_found
from headrace.errors import AgentNotFound, InvalidRequest, TrialNotFound
from headrace.events import (
    AgentDeployed,
    AgentRolledBack,
    AgentUndeployed,
    CanaryAborted,
    CanaryPromoted,
    CanaryStarted,
    Observer,
)

if TYPE_CHECKING:
    from headrace.agents.code.cache import CodeCache
    from headrace.cache import Cache

_is_alias = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,63}").fullmatch


class Versions:
    """The agents in service and their versions."""

    def __init__(
        self,
        config: AgentsConfig,
        store: AgentStore,
        shelf: Shelf,
        *,
        code_cache: "CodeCache",
        cache: "Cache | None",
        observer: Observer,
    ) -> None:
        self._config = config
        self._store = store
        self._shelf = shelf
        self._code_cache = code_cache
        self._cache = cache
        self._observer = observer
        self._serving: dict[Key, str] = {}
        """Versions as they were last seen in service, for whoever cannot wait to ask."""

    async def deploy(self, deployment: Deployment, loaded: Loaded) -> None:
        """Keep a loaded version and put it into service, or on trial."""
        source = deployment.source
        try:
            agent = await self._store.deploy(deployment)
        except BaseException:
            self._shelf.retire(loaded)
            raise
        self._shelf.put((agent.tenant, agent.agent_id, source.version), loaded)
        await self._switched(agent)
        if self._cache is not None:
            await self._code_cache.share(agent.agent_id, source.text)
        if deployment.canary is not None:
            self._observer.on(CanaryStarted(agent.agent_id, source.version, deployment.canary))
        else:
            self._observer.on(
                AgentDeployed(agent.agent_id, source.version, len(source.text.encode()), deployment.compile_ms)
            )

    async def rollback(self, tenant: str, agent_id: str, version: str) -> Agent:
        """Put a version that was deployed before back into service."""
        agent = await self._store.put_in_service(tenant, agent_id, version)
        await self._switched(agent)
        self._observer.on(AgentRolledBack(agent_id, version))
        return agent

    async def promote(self, tenant: str, agent_id: str) -> Agent:
        """Put the version on trial into service."""
        ended = await self._store.end_trial(tenant, agent_id, promote=True)
        if ended is None:
            raise _no_trial(agent_id)
        agent, canary = ended
        await self._switched(agent)
        self._observer.on(CanaryPromoted(agent_id, canary.version))
        return agent

    async def abort(
        self, tenant: str, agent_id: str, *, reason: str, trial: str | None = None, by_itself: bool = False
    ) -> Agent | None:
        """End the trial; None if the one that is named has ended already."""
        ended = await self._store.end_trial(tenant, agent_id, promote=False, trial=trial)
        if ended is None:
            return None
        agent, canary = ended
        await self._switched(agent)
        self._observer.on(CanaryAborted(agent_id, canary.version, reason, by_itself))
        return agent

    async def abort_by_hand(self, tenant: str, agent_id: str, *, reason: str) -> Agent:
        """End the trial because somebody says so."""
        agent = await self.abort(tenant, agent_id, reason=reason)
        if agent is None:
            raise _no_trial(agent_id)
        return agent

    async def alias(self, tenant: str, agent_id: str, alias: str, version: str | None) -> Agent:
        """Let a name stand for a version, or for none."""
        if not _is_alias(alias):
            raise InvalidRequest(
                f"The alias {alias[:80]!r} could be taken for a version.",
                fix="Begin with a letter; use letters, digits, `.`, `_` and `-`, at most 64.",
            )
        agent = await self._store.name_version(tenant, agent_id, alias, version)
        await self._switched(agent)
        return agent

    async def undeploy(self, tenant: str, agent_id: str) -> int:
        """Take an agent out of service."""
        cancelled = await self._store.undeploy(tenant, agent_id)
        if self._cache is not None:
            await self._cache.delete(f"agent:{tenant}/{agent_id}", f"agent-status:{tenant}/{agent_id}")
        self._serving.pop((tenant, agent_id), None)
        self._shelf.drop(tenant, agent_id)
        self._observer.on(AgentUndeployed(agent_id, cancelled))
        return cancelled

    async def in_service(self, tenant: str, agent_id: str, *, fresh: bool = False) -> Agent:
        """The agent, as old as the cache lets it be; `fresh`, as it is on record."""
        load_agent = partial(self._store.agent, tenant, agent_id)
        agent: Agent | None
        if self._cache is None or fresh:
            agent = await load_agent()
        else:
            agent = await self._cache.get_or_load(f"agent:{tenant}/{agent_id}", load_agent, type=Agent | None)
        if agent is None:
            if self._serving.pop((tenant, agent_id), None) is not None:
                self._shelf.keep_workers_of(tenant, agent_id, ())
            raise agent_not_found(agent_id)
        if self._serving.get((tenant, agent_id)) != agent.version:
            self._seen(agent)
        return agent

    def instance(self, tenant: str, agent_id: str) -> Any:
        """A fresh instance of the version that was seen in service last."""
        version = self._serving.get((tenant, agent_id))
        loaded = None if version is None else self._shelf.find((tenant, agent_id, version))
        if loaded is None:
            raise AgentNotFound(
                f"No version of the agent {agent_id!r} that is in service is loaded in this process.",
                fix="Deploy it, or `await host.load(agent_id)` first.",
            )
        execute = loaded.definition.make()
        return getattr(execute, "__self__", execute)

    def _seen(self, agent: Agent) -> None:
        if len(self._serving) >= 2 * self._config.definitions_max:
            self._serving.clear()
        self._serving[agent.tenant, agent.agent_id] = agent.version
        on_trial = () if agent.canary is None else (agent.canary.version,)
        wanted = {agent.version, *on_trial, *agent.aliases.values()}
        self._shelf.keep_workers_of(agent.tenant, agent.agent_id, wanted)

    async def choose(
        self, tenant: str, agent_id: str, execution_id: str, asked: str | None
    ) -> tuple[Loaded, Canary | None]:
        """The loaded version for an execution, and the trial that its end counts for.

        `asked` is a version or an alias. Who asks for none gets the one in service, or for a share of the execution
        ids the one on trial.
        """
        agent = await self.in_service(tenant, agent_id)
        trial, version = agent.canary, agent.version
        if asked is not None:
            trial, version = None, agent.aliases.get(asked, asked)
        elif trial is not None and is_chosen(execution_id, trial.version, trial.share):
            version = trial.version
        loaded = await self._shelf.get((tenant, agent_id, version), partial(self._stored, tenant, agent_id, version))
        return loaded, trial

    def release(self, loaded: Loaded) -> None:
        """Whoever held a version does not need it any more."""
        self._shelf.release(loaded)

    async def version(self, tenant: str, agent_id: str, version: str) -> Version:
        """A version as it was deployed."""
        return await self._store.version(tenant, agent_id, version)

    async def _stored(self, tenant: str, agent_id: str, version: str) -> Version:
        """A version to load: what it is from the store, its source from the shared cache if it is there."""
        shared = None if self._cache is None else partial(self._code_cache.fetch, agent_id)
        return await self._store.version(tenant, agent_id, version, shared=shared)

    async def _switched(self, agent: Agent) -> None:
        self._seen(agent)
        if self._cache is not None:
            await self._cache.set(f"agent:{agent.tenant}/{agent.agent_id}", agent, type=Agent | None)
            await self._cache.delete(f"agent-status:{agent.tenant}/{agent.agent_id}")


def _no_trial(agent_id: str) -> TrialNotFound:
    return TrialNotFound(f"The agent {agent_id!r} has no version on trial.")
