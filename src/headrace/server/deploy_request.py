"""What a deployment may ask for, and the refusal of what is not done here.

A field that is accepted and ignored would be a promise that nobody keeps, so what the host does not do is refused by
name, with what to do instead.
"""

import base64
import binascii
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from headrace.agents import AgentsConfig
from headrace.errors import DeploymentUnsupported, InvalidRequest
from headrace.server.agent_paths import Id, Line, Name, Version
from headrace.server.agents_api import ENVIRONMENT

_SHARE_DEFAULT = 0.1


class AgentMetadata(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Who the agent is."""

    agent_id: Id
    version: Version
    name: Line | None = None
    tags: Annotated[tuple[Line, ...], Meta(max_length=50)] = ()


class Dependencies(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What it needs to be installed; nothing is installed for it."""

    python: Annotated[tuple[Line, ...], Meta(max_length=200)] = ()
    """Requirements. Their installed versions are part of what its compiled code is known by."""
    system: tuple[Line, ...] = ()


class AgentConfiguration(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Limits of its executions."""

    timeout: Annotated[float, Meta(gt=0, description="Seconds.")] | None = None
    memory_limit: Annotated[int, Meta(ge=1, le=1 << 20, description="MiB, of each of its workers.")] | None = None
    concurrent_executions: Annotated[int, Meta(ge=1)] | None = None
    isolation: Literal["trusted", "process"] | None = None
    """Without it, what `agents.isolation_default` says."""
    idempotent: bool = False
    """Whether running it twice for one execution does no harm."""
    attempts_max: Annotated[int, Meta(ge=1)] | None = None


class AgentCode(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What it runs."""

    source_code: Annotated[str, Meta(description="Python source, UTF-8, base64.")]
    entrypoint: Name = "Agent"
    dependencies: Dependencies = Dependencies()
    configuration: AgentConfiguration = AgentConfiguration()

    def source(self) -> str:
        """The source as text."""
        try:
            return base64.b64decode(self.source_code, validate=True).decode()
        except (binascii.Error, ValueError) as error:
            raise InvalidRequest(
                f"agent_code.source_code is no base64 of UTF-8 text: {error}.", fix="base64-encode the source file."
            ) from error

    def check(self) -> None:
        """Refuse what nobody would see to."""
        limits = self.configuration
        if self.dependencies.system:
            raise DeploymentUnsupported(
                f"agent_code.dependencies.system names {', '.join(self.dependencies.system)[:80]!r}; nothing is"
                " installed at a deployment.",
                fix="Install it where the workers run, and leave it out.",
            )
        if limits.concurrent_executions is not None:
            raise DeploymentUnsupported(
                "configuration.concurrent_executions is not limited for each agent, but for each tenant, by its tier.",
                fix="Leave it out; see agents.tiers.",
            )


class AutoRollback(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """When a canary is refused by itself. The service judges; a request can only make sure of how."""

    enabled: bool = True
    error_rate: float | None = None
    """By how much its error rate may be higher: `agents.canary_failure_margin`."""
    slowdown: float | None = None
    """How many times as long its 95th percentile may be: `agents.canary_slowdown_max`."""


class Rollout(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """How a version comes into service."""

    strategy: Literal["blue_green", "rolling", "canary"] = "blue_green"
    traffic_percentage: Annotated[float, Meta(gt=0, le=100)] | None = None
    success_criteria: dict[str, Any] | None = None
    auto_rollback: AutoRollback | None = None

    @property
    def share(self) -> float | None:
        """Of the executions, for a canary."""
        if self.strategy != "canary":
            return None
        return _SHARE_DEFAULT if self.traffic_percentage is None else self.traffic_percentage / 100

    def check(self, config: AgentsConfig) -> None:
        """Refuse what is not done here."""
        if self.strategy == "rolling":
            raise DeploymentUnsupported(
                "strategy is 'rolling', but there are no instances to roll through: every process switches at once.",
                fix="Use blue_green, or canary to begin with a share.",
            )
        if self.success_criteria:
            raise DeploymentUnsupported(
                "success_criteria would promote a canary by themselves; here that is a person's decision.",
                fix="Leave them out, and promote it with PUT .../versions/{version} and strategy blue_green.",
            )
        if self.strategy == "blue_green":
            self._check_whole()
        elif self.traffic_percentage is not None and self.traffic_percentage >= 100:
            raise DeploymentUnsupported(
                "A canary with all of the traffic is no trial.", fix="Use blue_green, or a smaller traffic_percentage."
            )
        if self.auto_rollback is not None and self.strategy == "canary":
            self._check_triggers(self.auto_rollback, config)

    def _check_whole(self) -> None:
        if self.traffic_percentage not in {None, 100}:
            raise DeploymentUnsupported(
                f"traffic_percentage is {self.traffic_percentage:g} with strategy blue_green, which switches all.",
                fix="Use strategy canary for a share.",
            )
        if self.auto_rollback is not None and self.auto_rollback.enabled:
            raise DeploymentUnsupported(
                "auto_rollback watches a canary beside the version in service; after blue_green there is nothing to"
                " compare with.",
                fix="Use strategy canary, or leave auto_rollback out and roll back with POST .../rollback.",
            )

    @staticmethod
    def _check_triggers(asked: AutoRollback, config: AgentsConfig) -> None:
        if not asked.enabled:
            raise DeploymentUnsupported(
                "auto_rollback.enabled is false, but every canary is watched.",
                fix="Use blue_green to switch unwatched.",
            )
        for name, value, setting in (
            ("error_rate", asked.error_rate, "canary_failure_margin"),
            ("slowdown", asked.slowdown, "canary_slowdown_max"),
        ):
            in_force = getattr(config, setting)
            if value not in {None, in_force}:
                raise DeploymentUnsupported(
                    f"auto_rollback.{name} is {value:g}, but canaries are judged by {in_force:g} in this service.",
                    fix=f"Leave it out, or set agents.{setting}.",
                )


class DeploymentConfig(Rollout, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Where it runs, and how it comes into service."""

    environment: Line | None = None
    """Kept as the tag `environment:NAME`."""
    auto_scaling: dict[str, Any] | None = None


class DeployRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A version of an agent to put into service."""

    agent_metadata: AgentMetadata
    agent_code: AgentCode
    deployment_config: DeploymentConfig = DeploymentConfig()

    def check(self, config: AgentsConfig) -> None:
        """Refuse what is not done here."""
        self.agent_code.check()
        self.deployment_config.check(config)
        if self.deployment_config.auto_scaling:
            raise DeploymentUnsupported(
                "deployment_config.auto_scaling is for one agent; workers serve all agents and are scaled together.",
                fix="Leave it out; the number of workers is the service's.",
            )

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags, its environment among them."""
        environment = self.deployment_config.environment
        return self.agent_metadata.tags + ((f"{ENVIRONMENT}{environment}",) if environment is not None else ())


class UpdateRequest(Rollout, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Another version for an agent that is in service; without code, one that was deployed before."""

    agent_code: AgentCode | None = None

    def check(self, config: AgentsConfig) -> None:
        """Refuse what is not done here."""
        Rollout.check(self, config)
        if self.agent_code is not None:
            self.agent_code.check()


class RollbackRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Back to where; without a version, a trial ends, or else what was in service before returns."""

    version: Version | None = None
    reason: Line = "by hand"


class AliasRequest(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """What a name stands for."""

    version: Version
