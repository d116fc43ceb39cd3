"""What has to be invalidated in the shared tier and could not be confirmed yet, in bounds."""

import asyncio
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

from headrace.cache.policy import glob_pattern
from headrace.errors import CacheUnavailable

PATTERNS_MAX = 64
ARRIVAL_WAIT_MAX_S = 30.0
"""How long an invalidation may be on its way before calls of its own process stop waiting for it."""
ALL = "*"
"""The name under which a whole namespace is owed."""

Debt = tuple[str, str]
"""What kind of invalidation is owed ("key", "tag", "pattern", "all"), and of what."""


class Deferred:
    """Invalidations that the tier has not confirmed yet.

    Each is kept with the number of the call that owes it: a delivery pays what was owed when it began. What was
    invalidated again meanwhile is owed until that, too, is delivered.
    """

    __slots__ = ("_changed", "_keys_max", "everything", "keys", "latest", "patterns", "tags")

    def __init__(self, keys_max: int) -> None:
        self._keys_max = keys_max
        self._changed: set[Debt] | None = None
        self.keys: dict[str, int] = {}
        self.tags: dict[str, int] = {}
        self.patterns: dict[str, tuple[re.Pattern[str], int]] = {}
        self.everything = 0
        """The number of the `clear` that is owed; 0: none is."""
        self.latest = 0
        """The number of the last invalidation: to be noted before a delivery begins."""

    @property
    def is_owed(self) -> bool:
        """Whether anything is."""
        return bool(self.keys or self.everything or self.patterns or self.tags)

    def covers(self, key: str) -> bool:
        """Whether what the tier says about `key` may not be believed."""
        if self.everything or key in self.keys:
            return True
        return any(pattern.match(key) for pattern, _ in self.patterns.values())

    def covering(self, key: str) -> list[str]:
        """The patterns, and ALL for a `clear`, that are owed and keep `key` from being believed."""
        globs = [glob for glob, (pattern, _) in self.patterns.items() if pattern.match(key)]
        return [*globs, ALL] if self.everything else globs

    # -- owing --------------------------------------------------------------------------------------------------------

    def add_keys(self, keys: Iterable[str]) -> None:
        """Keep keys; too many become a `clear`."""
        self.latest += 1
        wanted = dict.fromkeys(keys, self.latest)
        self.keys.update(wanted)
        self._tell("key", wanted)
        if len(self.keys) > self._keys_max:
            self.add_everything()

    def add_tags(self, tags: Iterable[str]) -> None:
        """Keep tags; too many become a `clear`."""
        self.latest += 1
        wanted = dict.fromkeys(tags, self.latest)
        self.tags.update(wanted)
        self._tell("tag", wanted)
        if len(self.tags) > self._keys_max:
            self.add_everything()

    def add_pattern(self, glob: str) -> None:
        """Keep a pattern; too many become a `clear`."""
        self.latest += 1
        self.patterns[glob] = (glob_pattern(glob), self.latest)
        self._tell("pattern", [glob])
        if len(self.patterns) > PATTERNS_MAX:
            self.add_everything()

    def add_everything(self) -> None:
        """Keep a `clear`, which stands for all that was owed before it."""
        self.clear()
        self.latest += 1
        self.everything = self.latest
        self._tell("all", [ALL])

    def add(self, debt: Debt) -> None:
        """Keep what a process that is dead owed."""
        kind, name = debt
        match kind:
            case "key":
                self.add_keys([name])
            case "tag":
                self.add_tags([name])
            case "pattern":
                self.add_pattern(name)
            case _:
                self.add_everything()

    # -- paying -------------------------------------------------------------------------------------------------------

    def pay_keys(self, keys: Iterable[str], *, as_of: int) -> None:
        """Keys were delivered, or written anew, by what began at `as_of`."""
        self._tell("key", _pay(self.keys, keys, as_of))

    def pay_tags(self, tags: Iterable[str], *, as_of: int) -> None:
        """Tags were delivered by what began at `as_of`."""
        self._tell("tag", _pay(self.tags, tags, as_of))

    def pay_pattern(self, glob: str, *, as_of: int) -> None:
        """A pattern was delivered by what began at `as_of`."""
        if glob in self.patterns and self.patterns[glob][1] <= as_of:
            del self.patterns[glob]
            self._tell("pattern", [glob])

    def pay_everything(self, *, as_of: int) -> None:
        """A `clear` that began at `as_of` was delivered: whatever was owed until then is paid with it."""
        self.pay_keys(list(self.keys), as_of=as_of)
        self.pay_tags(list(self.tags), as_of=as_of)
        for glob in list(self.patterns):
            self.pay_pattern(glob, as_of=as_of)
        if self.everything <= as_of:
            self.everything = 0
            self._tell("all", [ALL])

    def clear(self) -> None:
        """Nothing is owed any more."""
        self.latest += 1
        self.pay_everything(as_of=self.latest)

    # -- telling ------------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """What is owed, for people."""
        return [*self.keys, *(f"tag {tag}" for tag in self.tags), *self.patterns, *([ALL] if self.everything else [])]

    def changes(self) -> dict[Debt, bool]:
        """What may have come to be owed or paid since the last call, and whether it is owed now.

        From the first call on it is remembered for the next one.
        """
        changed, self._changed = self._changed, set()
        if changed is None:
            return dict.fromkeys(self.debts(), True)
        return {debt: self._is_debt(debt) for debt in changed}

    def note(self, debts: Iterable[Debt]) -> None:
        """Tell of these again at the next call of `changes`."""
        if self._changed is not None:
            self._changed.update(debts)

    def debts(self) -> set[Debt]:
        """All that is owed."""
        debts = {(kind, name) for kind in ("key", "tag", "pattern") for name in self._owed(kind)}
        return debts | {("all", ALL)} if self.everything else debts

    def _is_debt(self, debt: Debt) -> bool:
        kind, name = debt
        return bool(self.everything) if kind == "all" else name in self._owed(kind)

    def _owed(self, kind: str) -> Mapping[str, object]:
        if kind == "pattern":
            return self.patterns
        return self.keys if kind == "key" else self.tags

    def _tell(self, kind: str, names: Iterable[str]) -> None:
        self.note((kind, name) for name in names)


def _pay(owed: dict[str, int], names: Iterable[str], as_of: int) -> list[str]:
    paid = [name for name in names if owed.get(name, as_of + 1) <= as_of]
    for name in paid:
        owed.pop(name, None)
    return paid


class OnWay:
    """The deliveries under way of a `clear` or a pattern: whoever needs them to have arrived waits for that."""

    __slots__ = ("_deliveries", "_on_given_up")

    def __init__(self, on_given_up: Callable[[], None]) -> None:
        self._deliveries: dict[asyncio.Future[None], tuple[str, float]] = {}
        self._on_given_up = on_given_up

    @contextmanager
    def delivery(self, name: str) -> Iterator[None]:
        """That of a pattern, or of ALL, is under way until the block ends, whether it arrives or fails.

        One whose caller is cancelled is told of: it can be delivered by somebody else at once.
        """
        loop = asyncio.get_running_loop()
        landed: asyncio.Future[None] = loop.create_future()
        self._deliveries[landed] = (name, loop.time())
        try:
            yield
        except asyncio.CancelledError:
            self._on_given_up()
            raise
        finally:
            del self._deliveries[landed]
            landed.set_result(None)

    def brings(self, name: str) -> bool:
        """Whether one of this pattern is under way."""
        return any(name == brought for brought, _ in self._deliveries.values())

    async def landed(self, names: Collection[str]) -> None:
        """Return when those of these names that are under way now have arrived or failed.

        Raises CacheUnavailable once one of them is under way for too long, however late its waiter came.
        """
        loop = asyncio.get_running_loop()
        for landed, (name, began) in list(self._deliveries.items()):
            if name in names and not landed.done():
                await asyncio.wait([landed], timeout=max(0.0, began + ARRIVAL_WAIT_MAX_S - loop.time()))
                if not landed.done():
                    raise CacheUnavailable(
                        f"The invalidation of {name!r} is on its way for longer than {ARRIVAL_WAIT_MAX_S:g} s."
                    )
