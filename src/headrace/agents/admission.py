"""Who may begin, who must wait, who is told to come back: limits by tenant. Pure: `now` comes in by the door.

Rates are kept by GCRA, a token bucket that is one number: the time at which the bucket would be full again [1]. A
tenant's concurrency is divided by the nodes that live: each enforces `limit // nodes`, at least 1, so together they
never exceed max(limit, nodes); a tenant all of whose requests reach one node gets that node's share. The number of
nodes, the executions of the day and the length of the queue are read back from Postgres every few seconds, so the
daily quota and the queue can be exceeded by what all nodes admit within one such interval, and not by more.

[1] ITU-T I.371, Generic Cell Rate Algorithm.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from headrace.agents.config import Priority, TierConfig

DAY_S = 86_400.0
_BUSY_RETRY_S = 1.0

_URGENCY: tuple[Priority, ...] = ("low", "normal", "high")

Reason = Literal["rate", "quota", "concurrency", "queue"]


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request of a tenant is not taken, and when it may be."""

    reason: Reason
    message: str
    retry_after_s: float


@dataclass(frozen=True, slots=True)
class Ledger:
    """What Postgres knows of a tenant."""

    used_today: int = 0
    """Executions recorded since midnight UTC."""
    queued: int = 0


@dataclass(slots=True)
class _Account:
    tier: TierConfig | None
    running: int = 0
    full_at: float = 0.0
    """GCRA's theoretical arrival time."""
    known: Ledger = field(default_factory=Ledger)
    carried: int = 0
    """Under way here when the ledger was read, and so not in it."""
    admitted: int = 0
    """Admitted here since the ledger was read."""
    enqueued: int = 0
    """Put into the queue from here since the ledger was read."""
    day: int = 0


def gcra(full_at: float, now: float, *, rate_per_s: float, burst: int) -> tuple[float, float]:
    """The next theoretical arrival time if this request is taken, and how long it would have to wait (0: not)."""
    interval = 1 / rate_per_s
    start = max(full_at, now)
    wait = start - now - (burst - 1) * interval
    return start + interval, max(0.0, wait)


class Admission:
    """The accounts of the tenants that one node serves."""

    def __init__(self, tier_of: Callable[[str], TierConfig | None], *, queued_max: int) -> None:
        self._tier_of = tier_of
        self._queued_max = queued_max
        self._accounts: dict[str, _Account] = {}
        self.nodes = 1
        """Living nodes, this one included."""

    def admit(self, tenant: str, *, monotonic: float, wall: float, queued: bool) -> Refusal | None:
        """Whether a new request is taken; if so, it is counted against rate, quota and, if `queued`, the queue."""
        account = self._account(tenant, wall)
        tier = account.tier
        if queued and (refusal := self._queue_full(tenant, account)):
            return refusal
        if tier is not None and (refusal := self._over_limit(tenant, tier, account, monotonic, wall)):
            return refusal
        account.admitted += 1
        account.enqueued += queued
        return None

    def capped(self, tenant: str, priority: Priority) -> Priority:
        """The priority that the tenant's tier allows."""
        tier = self._account(tenant).tier
        return priority if tier is None else min(priority, tier.priority_max, key=_URGENCY.index)

    def begin(self, tenant: str) -> Refusal | None:
        """Take a place for an execution that starts now; `end` gives it back."""
        account = self._account(tenant)
        if account.running >= self.share(tenant):
            return Refusal("concurrency", self._too_many(tenant, account), _BUSY_RETRY_S)
        account.running += 1
        return None

    def end(self, tenant: str) -> None:
        """Give a place back."""
        self._accounts[tenant].running -= 1

    def share(self, tenant: str) -> float:
        """Executions that the tenant may have at once on this node."""
        tier = self._account(tenant).tier
        return float("inf") if tier is None else max(1, tier.executions_max // self.nodes)

    def free(self) -> dict[str, int]:
        """The places that are left for the tenants with a limit that were heard of lately."""
        return {
            tenant: max(0, int(self.share(tenant)) - account.running)
            for tenant, account in self._accounts.items()
            if account.tier is not None
        }

    def tenants(self) -> list[str]:
        """Whose ledgers are worth reading."""
        return list(self._accounts)

    def learn(self, nodes: int, ledgers: Mapping[str, Ledger], *, asked: Iterable[str], wall: float) -> None:
        """Take note of what Postgres knows, and forget the tenants that have been idle since the last time."""
        self.nodes = max(1, nodes)
        for tenant in asked:
            account = self._accounts.get(tenant)
            if account is None:
                continue
            ledger = ledgers.get(tenant, Ledger())
            is_idle = not (account.running or account.admitted or ledger.queued or ledger.used_today)
            account.known, account.carried, account.day = ledger, account.running, _day(wall)
            account.admitted = account.enqueued = 0
            if is_idle:
                del self._accounts[tenant]

    def _over_limit(
        self, tenant: str, tier: TierConfig, account: _Account, monotonic: float, wall: float
    ) -> Refusal | None:
        used = account.known.used_today + account.known.queued + account.carried + account.admitted
        if tier.executions_per_day is not None and used >= tier.executions_per_day:
            message = f"The tenant {tenant!r} has used its {tier.executions_per_day:,} executions of today"
            return Refusal("quota", f"{message} (tier {tier.name}).", DAY_S - wall % DAY_S)
        if tier.rate_per_s is not None:
            full_at, wait = gcra(account.full_at, monotonic, rate_per_s=tier.rate_per_s, burst=tier.burst)
            if wait > 0:
                message = f"The tenant {tenant!r} asks more than {tier.rate_per_s:g} times a second"
                return Refusal("rate", f"{message} (tier {tier.name}).", wait)
            account.full_at = full_at
        return None

    def _queue_full(self, tenant: str, account: _Account) -> Refusal | None:
        limit = self._queued_max if account.tier is None else min(self._queued_max, account.tier.queued_max)
        if account.known.queued + account.enqueued < limit:
            return None
        return Refusal("queue", f"{limit:,} executions of the tenant {tenant!r} are queued already.", _BUSY_RETRY_S)

    def _too_many(self, tenant: str, account: _Account) -> str:
        assert account.tier is not None, "only a tier limits"
        at_most = f"at most {account.tier.executions_max:,} by its tier {account.tier.name} over {self.nodes} nodes"
        return f"{account.running:,} executions of the tenant {tenant!r} run on this node; {at_most}."

    def _account(self, tenant: str, wall: float | None = None) -> _Account:
        account = self._accounts.get(tenant)
        if account is None:
            account = self._accounts[tenant] = _Account(self._tier_of(tenant))
        if wall is not None and account.day != (today := _day(wall)):
            # A new day begins at 0; what is admitted from now on is counted until the ledger is read.
            if account.day:
                account.known, account.admitted = Ledger(0, account.known.queued), 0
            account.day = today
        return account


def _day(wall: float) -> int:
    return int(wall // DAY_S)
