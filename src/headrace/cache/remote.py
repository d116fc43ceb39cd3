"""Redis or Valkey as a set of nodes that answer commands: alone, behind Sentinel, or a Cluster.

redis-py makes the connections (URLs, TLS, ACL users, HELLO, database) and finds a Sentinel's primary; then the
transport is handed to a `Wire`, which is an order of magnitude faster for many tasks at once. This is the only module
that imports it, and only when a tier is opened.

Every method raises CacheUnavailable when the answer could not be had. Nothing here knows what a value is.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

import hiredis

from headrace.cache.config import RemoteConfig
from headrace.cache.pipeline import Pipeline, Watcher, Wire
from headrace.cache.topology import Address, SlotMap, parse_addresses, primaries, redirection, slot_of
from headrace.errors import CacheRefused, CacheUnavailable, ConfigError

if TYPE_CHECKING:
    from redis.asyncio.connection import AbstractConnection

BATCH = 512
"""Keys in one MGET or UNLINK: large enough to be cheap, small enough not to hold up the node's other callers."""
SCAN_COUNT = 1000
REDIRECTS_MAX = 5
REFRESH_WAIT_S = 0.1
TOPOLOGY_CHECK_S = 2.0
IMPORTING_S = 60.0
"""How long a node counts as one that serves keys after ASK has led to it."""
SHOWN_MAX = 40
"""Characters of a reply that an error message quotes."""
POINTED_AT: Address = ("", 0)
"""Stands for the one node that the URL points at."""
Part = bytes | str | int
Command = tuple[Part, ...]


def pack(command: Command) -> bytes:
    """A command as Redis reads it."""
    packed: bytes = hiredis.pack_command(command)  # type: ignore[arg-type]  # the stub means tuple[..., ...]
    return packed


_ASKING = pack(("ASKING",))
_CLUSTER_SLOTS = pack(("CLUSTER", "SLOTS"))
_TURNED_AWAY = ("READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "NOAUTH")


class RemoteWatcher:
    """Who is told when nodes come and go, and what they send unasked. The base class listens to nothing."""

    def on_node_up(self, name: str) -> None:
        """A node can be called."""

    def on_node_down(self, name: str, reason: str) -> None:
        """A node cannot be called; it is being tried again."""

    def on_push(self, name: str, message: list[Any]) -> None:
        """A node sent a RESP3 push message."""


class _DriverLink:
    """Keeps redis-py's connection object alive while its transport is in use."""

    __slots__ = ("_connection",)

    def __init__(self, connection: "AbstractConnection") -> None:
        self._connection = connection

    def close(self) -> None:
        self._connection._close()  # type: ignore[no-untyped-call]


class Remote:
    """The nodes of one shared tier."""

    def __init__(self, config: RemoteConfig, watcher: RemoteWatcher, *, rng: Callable[[], float]) -> None:
        self._config = config
        self._watcher = watcher
        self._rng = rng
        self._scheme = config.url.split("://", 1)[0]
        self._is_cluster = self._scheme.endswith("+cluster")
        self._seeds: list[Address] = _seeds(config) if "+" in self._scheme else []
        self._nodes: dict[Address, Pipeline] = {}
        self._only: Pipeline | None = None
        self._slots = SlotMap()
        self._importing: dict[Address, float] = {}
        """The nodes that ASK led to, and when: they may serve keys long before they serve a slot."""
        self._refresh: asyncio.Task[None] | None = None
        self._opening: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._closed = False
        self._learnt_at = self._loop.time()
        self._driver: Any = None

    # -- life ---------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect. Returns after the first attempt, whether it succeeded or not."""
        self._driver = await asyncio.to_thread(_load_driver)
        if not self._is_cluster:
            self._only = self._pipeline(POINTED_AT, _NodeWatcher(self._watcher))
            await self._only.open()
            return
        await self._refresh_slots()

    async def close(self) -> None:
        """Drop all connections and the tasks behind them."""
        self._closed = True
        tasks = [*self._opening, *([self._refresh] if self._refresh is not None else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        pipelines = [*self._nodes.values(), *([self._only] if self._only is not None else [])]
        await asyncio.gather(*(pipeline.close() for pipeline in pipelines))

    @property
    def is_available(self) -> bool:
        """Whether at least one node can be called now."""
        if self._only is not None:
            return self._only.is_up
        return any(pipeline.is_up for pipeline in self._nodes.values())

    # -- commands -----------------------------------------------------------------------------------------------------

    def get(self, key: bytes) -> Any:
        """An awaitable of the bytes under `key`, or None."""
        packed = b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(key), key)
        if self._only is not None:
            return self._only.call(packed)
        return self._call_slot(key, packed)

    async def call(self, key: bytes, *command: Part) -> Any:
        """The reply to a command, sent to the node that serves `key`."""
        packed = pack(command)
        if self._only is None:
            return await self._call_slot(key, packed)
        try:
            return await self._only.call(packed)
        except CacheRefused as refusal:
            self._turn_from(refusal)
            raise

    async def call_each(self, commands: Iterable[tuple[bytes, Command]]) -> list[Any]:
        """The replies to (key, command) pairs. They leave in one write a node, in order; a failure is in its place."""
        only = self._only
        if only is not None:
            futures = [only.call(pack(command)) for _, command in commands]
            replies = await asyncio.gather(*futures, return_exceptions=True)
            for reply in replies:
                if isinstance(reply, CacheRefused):
                    self._turn_from(reply)
            return replies
        calls = [self._call_slot(key, pack(command)) for key, command in commands]
        return await asyncio.gather(*calls, return_exceptions=True)

    async def get_many(self, keys: Sequence[bytes]) -> list[Any]:
        """What is under each key: bytes, None, or the CacheUnavailable that kept it from being known."""
        if self._only is None:
            return await self.call_each((key, ("GET", key)) for key in keys)
        chunks = [keys[start : start + BATCH] for start in range(0, len(keys), BATCH)]
        replies = await self.call_each((chunk[0], ("MGET", *chunk)) for chunk in chunks)
        found: list[Any] = []
        for chunk, reply in zip(chunks, replies, strict=True):
            found.extend(reply if isinstance(reply, list) else [reply] * len(chunk))
        return found

    async def unlink(self, keys: Sequence[bytes]) -> int:
        """Remove keys; how many there were. Raises if any could not be removed, after all were tried."""
        step = BATCH if self._only is not None else 1
        chunks = [keys[start : start + step] for start in range(0, len(keys), step)]
        replies = await self.call_each((chunk[0], ("UNLINK", *chunk)) for chunk in chunks)
        for reply in replies:
            if isinstance(reply, BaseException):
                raise reply
            if not isinstance(reply, int):
                raise CacheUnavailable(f"The server answered UNLINK with {_shown(reply)}, which is no number.")
        return sum(replies)

    async def unlink_matching(self, glob: bytes, kind: Callable[[bytes], bool | None]) -> int:
        """Remove every key that matches on every primary, a bounded batch at a time; how many counted.

        `kind` says of a found key whether it counts (True), goes uncounted (False) or stays (None). What does not
        count is the right to write what does, and goes everywhere first: a right that is used during that walk leaves
        its key to the second one, while a single walk could pass both names just before. A key that is there from
        beginning to end is found; one that comes meanwhile may be (as with SCAN). Cancelling it leaves the rest in
        place.
        """
        await self._unlink_everywhere(glob, lambda name: kind(name) is False)
        return await self._unlink_everywhere(glob, lambda name: kind(name) is True)

    async def _unlink_everywhere(self, glob: bytes, is_wanted: Callable[[bytes], bool]) -> int:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._unlink_on(pipeline, glob, is_wanted)) for pipeline in self.primaries()
                ]
        except* CacheUnavailable as group_error:
            failure = group_error.exceptions[0]
        else:
            return sum(task.result() for task in tasks)
        raise failure

    async def _unlink_on(self, pipeline: Pipeline, glob: bytes, is_wanted: Callable[[bytes], bool]) -> int:
        removed = 0
        async for keys in self._scan(pipeline, glob):
            removed += await self.unlink([key for key in keys if is_wanted(key)])
        return removed

    async def _scan(self, pipeline: Pipeline, glob: bytes) -> AsyncIterator[list[bytes]]:
        cursor = b"0"
        while True:
            match await pipeline.call(pack(("SCAN", cursor, "MATCH", glob, "COUNT", SCAN_COUNT))):
                case [bytes(cursor), list(keys)]:
                    if keys:
                        yield keys
                case reply:
                    raise CacheUnavailable(f"The server answered SCAN with {_shown(reply)}, which names no keys.")
            if cursor == b"0":
                return

    def primaries(self) -> list[Pipeline]:
        """Every node that holds keys."""
        if self._only is not None:
            return [self._only]
        return [self._node(address) for address in self._slots.addresses()]

    def _turn_from(self, refusal: CacheRefused) -> None:
        """A node that became a replica will stay one: connect again, which asks the Sentinels again."""
        if self._only is not None and refusal.message.startswith("READONLY"):
            self._only.cut("the node is a replica now")

    # -- cluster ------------------------------------------------------------------------------------------------------

    async def _call_slot(self, key: bytes, packed: bytes) -> Any:
        slot = slot_of(key)
        address = self._slots.owner(slot)
        if address is None:
            self._refresh_soon()
            raise CacheUnavailable(f"No primary of the cluster is known to serve slot {slot}.")
        asking = False
        for _ in range(REDIRECTS_MAX):
            pipeline = self._node(address)
            if asking:
                # Both leave in one write, one behind the other, so that ASKING holds for exactly this call.
                asked = pipeline.call(_ASKING)
                answer = pipeline.call(packed)
                await asyncio.wait([asked])
            else:
                answer = pipeline.call(packed)
            try:
                return await answer
            except CacheRefused as refusal:
                asking, address = await self._redirect(refusal, address)
            except CacheUnavailable:
                self._refresh_soon()
                raise
        raise CacheUnavailable(f"Slot {slot} was redirected {REDIRECTS_MAX} times without an answer.")

    async def _redirect(self, refusal: CacheRefused, asked: Address) -> tuple[bool, Address]:
        """Whether to ask with ASKING, and whom; raises the refusal when it names nobody else."""
        told = redirection(refusal.message, asked)
        if told is not None:
            kind, slot, address = told
            if kind == "MOVED":
                self._slots.move(slot, address)
                self._refresh_soon()
            else:
                self._importing[address] = self._loop.time()
            return kind == "ASK", address
        if refusal.message.startswith("TRYAGAIN"):
            await asyncio.sleep(REFRESH_WAIT_S / 4)
            return False, asked
        if refusal.message.startswith(_TURNED_AWAY):
            self._refresh_soon()
        raise refusal

    def _node(self, address: Address) -> Pipeline:
        pipeline = self._nodes.get(address)
        if pipeline is None:
            if len(self._nodes) >= self._config.connections_max:
                raise CacheUnavailable(
                    f"The cluster has more nodes than connections_max={self._config.connections_max}."
                )
            pipeline = self._nodes[address] = self._pipeline(address, _NodeWatcher(self._watcher))
            task = self._loop.create_task(pipeline.open())
            self._opening.add(task)
            task.add_done_callback(self._opening.discard)
        return pipeline

    def _refresh_soon(self) -> None:
        """Learn the topology again, once for all who found it wrong."""
        if self._refresh is None or self._refresh.done():
            self._refresh = self._loop.create_task(self._refresh_slots(REFRESH_WAIT_S))

    async def _refresh_slots(self, wait_s: float = 0.0) -> None:
        if wait_s:
            await asyncio.sleep(wait_s * (0.5 + self._rng()))
        for address in [*self._nodes, *(seed for seed in self._seeds if seed not in self._nodes)]:
            pipeline = self._nodes.get(address)
            if pipeline is None or not pipeline.is_up:
                if self._closed or (pipeline is None and len(self._nodes) >= self._config.connections_max):
                    return
                pipeline = self._node(address)
                await pipeline.open()
            try:
                ranges = primaries(await pipeline.call(_CLUSTER_SLOTS), address)
            except CacheUnavailable:
                continue
            if ranges:
                self._slots.replace(ranges)
                await self._open_known()
                return

    async def _open_known(self) -> None:
        """Connect to every primary and drop the nodes that serve no key."""
        known = self.addresses()
        for address in [address for address in self._nodes if address not in known]:
            await self._nodes.pop(address).close()
        # Nodes beyond the bound are as if away: calls to them fail, one by one.
        nearest = sorted(known, key=lambda address: address not in self._nodes)[: self._config.connections_max]
        await asyncio.gather(*[self._node(address).open() for address in nearest])

    # -- connections --------------------------------------------------------------------------------------------------

    def channel(self, address: Address, watcher: Watcher) -> Pipeline:
        """A further connection to a node, of the caller's own, not yet opened."""
        return self._pipeline(address, watcher)

    def addresses(self) -> set[Address]:
        """The primaries that serve keys now."""
        if not self._is_cluster:
            return {POINTED_AT}
        since = self._loop.time() - IMPORTING_S
        self._importing = {address: asked for address, asked in self._importing.items() if asked > since}
        return self._slots.addresses() | self._importing.keys()

    @property
    def follows_sentinel(self) -> bool:
        """Whether the node may turn into a replica behind our back."""
        return self._scheme.endswith("+sentinel")

    async def check_topology(self) -> None:
        """In a cluster, learn again who serves what, if that was not done for a while."""
        now = self._loop.time()
        if self._is_cluster and now - self._learnt_at >= TOPOLOGY_CHECK_S:
            self._learnt_at = now
            await self._refresh_slots()

    def _pipeline(self, address: Address, watcher: Watcher) -> Pipeline:
        config = self._config
        name = f"{address[0]}:{address[1]}" if address[0] else config.address
        return Pipeline(
            name,
            lambda wire: self.dial(address, wire),
            watcher,
            timeout_s=config.timeout,
            connect_timeout_s=config.connect_timeout,
            pending_max=config.pending_max,
            wait_max_s=config.reconnect_wait_max,
            rng=self._rng,
        )

    async def dial(self, address: Address, wire: Wire) -> _DriverLink:
        """Connect to a node, or to wherever the URL points, and put `wire` on the line."""
        connection: AbstractConnection | None = None
        try:
            connection = await self._connection(address)
            await connection.connect()  # type: ignore[no-untyped-call]
            # redis-py offers no way to take a connection over; its stream writer is the only thing that knows the
            # transport.
            writer = connection._writer
            assert writer is not None
            transport = writer.transport
            transport.set_protocol(wire)
            wire.connection_made(transport)
            return _DriverLink(connection)
        except (self._driver.RedisError, OSError) as error:
            raise CacheUnavailable(f"{error}".rstrip(".") or error.__class__.__name__) from error
        finally:
            if wire.transport is None and connection is not None:
                connection._close()  # type: ignore[no-untyped-call]

    async def _connection(self, address: Address) -> "AbstractConnection":
        config, driver = self._config, self._driver
        options: dict[str, Any] = dict(driver.parse_url(_plain_url(config.url)))
        plain = driver.SSLConnection if self._scheme.startswith("rediss") else driver.Connection
        kind: Any = options.pop("connection_class", plain)
        if config.username is not None:
            options["username"] = config.username
        if config.password is not None:
            options["password"] = config.password
        if self._scheme.endswith("+sentinel"):
            address = await self._sentinel_primary(options)
        if address[0]:
            options["host"], options["port"] = address
        options.update(
            protocol=3,
            socket_timeout=config.connect_timeout,
            socket_connect_timeout=config.connect_timeout,
            client_name="headrace",
            driver_info=None,  # it would read package metadata from disk, on the loop
        )
        try:
            connection: AbstractConnection = kind(**options)
        except TypeError as error:
            raise ConfigError(f"RemoteConfig.url has an option that redis-py does not know: {error}.") from error
        return connection

    async def _sentinel_primary(self, options: dict[str, Any]) -> Address:
        """Ask the Sentinels who the primary is. Done for each connection, so that a failover is followed."""
        name, _, database = urlsplit(self._config.url).path.strip("/").partition("/")
        if database:
            options["db"] = int(database)
        timeout = self._config.connect_timeout
        settings = {name: value for name, value in options.items() if name.startswith("ssl_")}
        settings |= {"socket_timeout": timeout, "socket_connect_timeout": timeout, "driver_info": None}
        settings["ssl"] = self._scheme.startswith("rediss")
        sentinel: Any = self._driver.Sentinel(self._seeds, sentinel_kwargs=settings)
        try:
            host, port = await sentinel.discover_master(name)
        finally:
            for client in sentinel.sentinels:
                await client.aclose()
        return host, int(port)


def _shown(reply: Any) -> str:
    """A reply that makes no sense, for an error message."""
    return repr(reply)[:SHOWN_MAX]


def _load_driver() -> SimpleNamespace:
    """What is used of redis-py. Importing it takes a while and reads files, so it is done in a thread, once."""
    from redis.asyncio.connection import Connection, SSLConnection, parse_url
    from redis.asyncio.sentinel import Sentinel
    from redis.exceptions import RedisError

    return SimpleNamespace(
        Connection=Connection,
        RedisError=RedisError,
        SSLConnection=SSLConnection,
        Sentinel=Sentinel,
        parse_url=parse_url,
    )


class _NodeWatcher:
    """Tells the tier's watcher which node spoke."""

    __slots__ = ("_watcher",)

    def __init__(self, watcher: RemoteWatcher) -> None:
        self._watcher = watcher

    def on_up(self, pipeline: Pipeline) -> None:
        self._watcher.on_node_up(pipeline.name)

    def on_lost(self, pipeline: Pipeline, reason: str) -> None:
        """Not told: the next attempt decides whether it matters."""

    def on_down(self, pipeline: Pipeline, reason: str) -> None:
        self._watcher.on_node_down(pipeline.name, reason)

    def on_push(self, pipeline: Pipeline, message: list[Any]) -> None:
        self._watcher.on_push(pipeline.name, message)


def _seeds(config: RemoteConfig) -> list[Address]:
    hosts = urlsplit(config.url).netloc.rsplit("@", 1)[-1]
    port = 26379 if "+sentinel" in config.url else 6379
    return parse_addresses(hosts, port=port)


def _plain_url(url: str) -> str:
    """The URL as redis-py reads it: one host, no path that is not a database number."""
    parts = urlsplit(url)
    if "+" not in parts.scheme:
        return url
    user, at, hosts = parts.netloc.rpartition("@")
    return urlunsplit((parts.scheme.partition("+")[0], f"{user}{at}{hosts.partition(',')[0]}", "", parts.query, ""))
