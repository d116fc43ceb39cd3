"""Compare-and-swap in the shared tier: a new entry is written only where everything it was made from still stands.

What it was made from is a `Basis`: the entry that was read, the generation under whose name it was read, and the
tokens of the tags that it had and is to have. One node checks all of it in the script that writes. In a Cluster the
generation and the tags live on other nodes than the entry: there they are asked for behind the write. If they are
still what they were, the write came before every `clear` and tag invalidation that there will be. If not, what was
written is taken back, unless somebody has written since.
"""

from collections.abc import Awaitable, Collection, Sequence
from typing import Any, Final, NamedTuple, Protocol

from headrace.cache.codec import HEAD_BYTES, Envelope, Sealed, Tags
from headrace.cache.keyspace import Keyspace
from headrace.cache.lease import Script
from headrace.cache.remote import Remote
from headrace.errors import CacheUnavailable

SWAP: Final = Script("""
for i = 3, #KEYS do if redis.call('GET', KEYS[i]) ~= ARGV[i + 2] then return 0 end end
if redis.call('GETRANGE', KEYS[1], 0, ARGV[4]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[2])
if ARGV[3] == '' then redis.call('SET', KEYS[1], ARGV[2]) else redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3]) end
return 1
""")
TAKE_BACK: Final = Script("""
if redis.call('GETRANGE', KEYS[1], 0, ARGV[2]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
""")


class Basis(NamedTuple):
    """What a decision rests on."""

    envelope: Envelope | None
    """The entry, if there is a valid one."""
    tags: Tags
    """With their tokens, for the entry that will be written."""
    names: tuple[bytes, bytes]
    """Of the entry and its lease, as they are in the generation of `tokens`."""
    head: bytes
    """The first bytes of what is there, which hold a random version; empty if nothing is."""
    tokens: tuple[tuple[bytes, bytes], ...]
    """Names and what must still be under them: the generation, and the tags of both entries."""


class Tier(Protocol):
    """What an exchange asks of the shared tier."""

    keyspace: Keyspace

    async def tokens(self, tags: Collection[str]) -> Tags | None:
        """The tags with their tokens; None if it is away."""

    async def settle(self, key: str) -> bool:
        """Deliver what is owed for a key; whether it can be believed now."""

    async def learn_generation(self) -> None:
        """Find out which generation is read now."""

    def fetch(self, key: str) -> Awaitable[Any] | None:
        """An awaitable of what stands under the key; None if it cannot be asked for."""

    def opened(self, key: str, data: Any, type: Any) -> Envelope | None:
        """The envelope in such an answer."""


class Exchange:
    """The swaps of one process."""

    def __init__(self, tier: Tier, remote: Remote, *, is_cluster: bool) -> None:
        self._tier = tier
        self._remote = remote
        self._is_cluster = is_cluster

    async def look(self, key: str, type: Any, tags: Sequence[str]) -> Basis | None:
        """What is there now; None while an invalidation by this process is on its way. Raises CacheUnavailable."""
        tier, keyspace = self._tier, self._tier.keyspace
        made = await tier.tokens(tags)
        if made is None:
            raise CacheUnavailable(f"{key!r} cannot be updated: its tags cannot be read.")
        if not await tier.settle(key):
            return None
        generation, reply = keyspace.generation, tier.fetch(key)
        if generation is None or reply is None:
            raise CacheUnavailable(f"{key!r} cannot be updated: the shared cache is away.")
        names = (keyspace.name(key), keyspace.lease(key))
        data = await reply
        envelope = tier.opened(key, data, type)
        had = envelope.tags if envelope is not None else ()
        if had and not await self._stand([(keyspace.tag(tag), token) for tag, token in had]):
            envelope, had = None, ()
        tokens = {keyspace.generation_key: generation}
        tokens.update((keyspace.tag(tag), token) for tag, token in (*had, *made))
        head = data[:HEAD_BYTES] if isinstance(data, bytes) else b""
        return Basis(envelope, made if tags else had, names, head, tuple(tokens.items()))

    async def swap(self, basis: Basis, entry: Sealed) -> bool:
        """Write the entry if its basis still stands. Raises CacheUnavailable: whether it was written is unknown."""
        checked = () if self._is_cluster else basis.tokens
        done = await SWAP.run(
            self._remote,
            (*basis.names, *(name for name, _ in checked)),
            basis.head,
            entry.data,
            "" if entry.life_ms is None else entry.life_ms,
            HEAD_BYTES - 1,
            *(token for _, token in checked),
        )
        if done and not self._is_cluster:
            return True
        if done:
            if await self._stand(basis.tokens):
                return True
            await TAKE_BACK.run(self._remote, basis.names[:1], entry.data[:HEAD_BYTES], HEAD_BYTES - 1)
        await self._tier.learn_generation()
        return False

    async def _stand(self, tokens: Sequence[tuple[bytes, bytes]]) -> bool:
        replies = await self._remote.get_many([name for name, _ in tokens])
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
        return all(reply == token for reply, (_, token) in zip(replies, tokens, strict=True))
