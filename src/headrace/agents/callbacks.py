"""Tells whoever asked for it that an execution has ended: a signed POST, tried again from the row until it arrives.

A URL comes from a tenant, so it is not trusted: https only, its host's address is looked up once, must be public, and
is the one that is connected to, so that a name cannot change its mind in between; redirects are failures. With
`agents.callback_private` plain http and private addresses are allowed too, for tests and closed networks.

The receiver checks `Headrace-Signature: t=<unix seconds>,v1=<hex>`: HMAC-SHA256 with the shared key over the time, a
full stop and the body. A callback may arrive twice; `Headrace-Execution` is what to recognise it by.
"""

import asyncio
import hashlib
import hmac
import http.client
import ipaddress
import random
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.agents.execution import Execution
from headrace.agents.retry import backoff_s
from headrace.agents.store import AgentStore, Callback
from headrace.agents.threads import DaemonThreads
from headrace.clock import Clock
from headrace.errors import BackendError, InvalidRequest
from headrace.events import CallbackGivenUp, Observer

_AT_ONCE_MAX = 16
_TENANT_AT_ONCE_MAX = 4
"""Of those to one tenant's receivers: dead ones hold no more, each for `callback_timeout_s`."""
_RETRY_FIRST_S = 2.0
_RETRY_MAX_S = 600.0
_URL_CHARACTERS_MAX = 2_000
_NOT_PUBLIC = tuple(map(ipaddress.IPv6Network, ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "fec0::/10")))
"""What `ipaddress` calls global all the same: addresses that carry an IPv4 address inside lead to wherever that one
does (like 6to4 and Teredo), and site-local ones stay inside."""


class _Undelivered(Exception):
    """Why a callback did not arrive; one try, which is told to nobody unless it is the last."""


class Callbacks:
    """Sends what is due, from every shard."""

    def __init__(
        self,
        store: AgentStore,
        config: AgentsConfig,
        *,
        clock: Clock,
        observer: Observer,
        tls: Callable[[], ssl.SSLContext] = ssl.create_default_context,
    ) -> None:
        self._store = store
        self._config = config
        self._clock = clock
        self._observer = observer
        self._tls = tls
        self._keys = {tenant.name: tenant.callback_key for tenant in config.tenants if tenant.callback_key}
        self._threads = DaemonThreads(_AT_ONCE_MAX, name="headrace-callback")
        self._rng = random.Random()  # noqa: S311 - for jitter, not for secrets
        self._loop: asyncio.Task[None] | None = None
        self._sends: dict[asyncio.Task[None], str] = {}
        """Each with its tenant."""
        self._wake = asyncio.Event()

    def open(self) -> None:
        """Begin to send, if there is a key to sign with."""
        if self._keys or self._config.callback_key:
            self._loop = asyncio.get_running_loop().create_task(self._serve())

    async def close(self) -> None:
        """Send no more; what is due stays in its row."""
        tasks = [*self._sends, *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.close()

    def wake(self) -> None:
        """Something may be due."""
        self._wake.set()

    def check(self, tenant: str, url: str) -> None:
        """Refuse what could never be sent."""
        if self._key(tenant) is None:
            raise InvalidRequest(
                f"The tenant {tenant!r} has no key that its callbacks could be signed with.",
                fix="Set agents.callback_key, or callback_key of the tenant in agents.tenants.",
            )
        parts = _parts(url)
        if parts.scheme != "https" and not (self._config.callback_private and parts.scheme == "http"):
            raise InvalidRequest(f"The callback URL begins with {parts.scheme[:20]!r}; it must be https.")

    def _key(self, tenant: str) -> str | None:
        return self._keys.get(tenant, self._config.callback_key)

    async def _serve(self) -> None:
        while True:
            self._wake.clear()
            for shard in self._store.shards:
                try:
                    await self._send_due(shard)
                except BackendError:
                    continue  # the shard's own event tells
                except Exception as error:  # noqa: BLE001 - a fault of ours must not end all callbacks
                    loop = asyncio.get_running_loop()
                    loop.call_exception_handler({"message": "callbacks were not sent", "exception": error})
            with suppress(TimeoutError):
                async with asyncio.timeout(self._config.queue_poll_s):
                    await self._wake.wait()

    async def _send_due(self, shard: str) -> None:
        # A thread is taken until its conversation has really ended, a send only for its time.
        free = min(_AT_ONCE_MAX - len(self._sends), self._threads.free)
        if free <= 0:
            return
        # Twice the time that one try takes: whoever dies while it sends is tried again by another process.
        within_s = 2 * self._config.callback_timeout_s
        places = {tenant: _TENANT_AT_ONCE_MAX - count for tenant, count in Counter(self._sends.values()).items()}
        for callback in await self._store.due_callbacks(
            shard, limit=free, within_s=within_s, free=places, free_default=_TENANT_AT_ONCE_MAX
        ):
            send = asyncio.get_running_loop().create_task(self._send(callback))
            self._sends[send] = callback.execution.tenant
            send.add_done_callback(self._sends.pop)

    async def _send(self, callback: Callback) -> None:
        execution, reason = callback.execution, ""
        try:
            await self._post(callback)
        except _Undelivered as error:
            reason = str(error)
        again_in_s: float | None = None
        if reason and callback.attempt < self._config.callback_attempts_max:
            again_in_s = backoff_s(
                callback.attempt, first_s=_RETRY_FIRST_S, limit_s=_RETRY_MAX_S, rng=self._rng.random
            )
        elif reason:
            self._observer.on(CallbackGivenUp(execution.agent_id, execution.id, callback.attempt, reason))
        try:
            await self._store.callback_done(callback, again_in_s=again_in_s)
        except BackendError:
            return  # it is due again when its time is over; receivers know callbacks that arrive twice
        self.wake()

    async def _post(self, callback: Callback) -> None:
        key = self._key(callback.execution.tenant)
        if key is None or not self._threads.reserve():
            raise _Undelivered("there is no key to sign it with, or no thread to send it in")
        body = _body(callback.execution)
        headers = _signed(body, key, now=int(self._clock.wall()), execution_id=callback.execution.id)
        delivery = _Delivery(callback.url, body, headers, self._config, self._tls)
        sending = self._threads.run(delivery.run)
        done, _ = await asyncio.wait({sending}, timeout=self._config.callback_timeout_s)
        if not done:
            delivery.abort()
            sending.add_done_callback(lambda late: late.cancelled() or late.exception())  # nobody's any more
            raise _Undelivered(f"no answer within {self._config.callback_timeout_s:g} s")
        if error := sending.exception():
            raise _Undelivered(f"{type(error).__name__}: {error}") from error


class _Delivery:
    """One try, in a thread."""

    def __init__(
        self,
        url: str,
        body: bytes,
        headers: dict[str, str],
        config: AgentsConfig,
        tls: Callable[[], ssl.SSLContext],
    ) -> None:
        self._parts = _parts(url)
        self._body = body
        self._headers = headers
        self._config = config
        self._tls = tls
        self._socket: socket.socket | None = None
        self._is_aborted = False

    def run(self) -> None:
        """Send it; raises if it did not arrive."""
        host, is_tls = self._parts.hostname or "", self._parts.scheme == "https"
        port = self._parts.port or (443 if is_tls else 80)
        connection = http.client.HTTPConnection(host, port)
        connection.sock = self._socket = self._connected(host, port)
        try:
            if is_tls:
                # Shaken hands apart: until there is a socket that can be shut down, nothing can end the conversation.
                secured = self._tls().wrap_socket(self._socket, server_hostname=host, do_handshake_on_connect=False)
                connection.sock = self._socket = secured
                self._go_on()
                secured.do_handshake()
            self._go_on()
            target = (self._parts.path or "/") + (f"?{self._parts.query}" if self._parts.query else "")
            connection.request("POST", target, self._body, self._headers)
            status = connection.getresponse().status
        finally:
            connection.close()
        if not 200 <= status < 300:
            raise _Undelivered(f"it was answered with {status}")

    def abort(self) -> None:
        """End the conversation, so that the thread is free again."""
        self._is_aborted = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _go_on(self) -> None:
        if self._is_aborted:
            raise _Undelivered("its time was over")

    def _connected(self, host: str, port: int) -> socket.socket:
        failed: OSError | None = None
        for address in self._addresses(host, port):
            self._go_on()
            try:
                return socket.create_connection((address, port), timeout=self._config.callback_timeout_s)
            except OSError as error:
                failed = error
        raise _Undelivered(f"{host} cannot be reached: {failed}") from failed

    def _addresses(self, host: str, port: int) -> list[str]:
        """Where the host is, all of it public."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(address[4][0]) for address in found]
        if not self._config.callback_private:
            for address in addresses:
                if not _is_public(address):
                    raise _Undelivered(f"{host} is at {address}, which is not a public address")
        return addresses


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.split("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    actual = mapped or parsed
    if isinstance(actual, ipaddress.IPv6Address) and (
        actual.sixtofour or actual.teredo or any(actual in network for network in _NOT_PUBLIC)
    ):
        return False
    return actual.is_global and not actual.is_multicast


def _parts(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_good = bool(parts.hostname) and parts.port != 0 and parts.username is None
    except ValueError as error:
        raise InvalidRequest(f"The callback URL cannot be read: {error}.") from error
    if not is_good or len(url) > _URL_CHARACTERS_MAX or not url.isascii() or any(c <= " " for c in url):
        raise InvalidRequest(
            "The callback URL has no host, a user, spaces, or is too long.",
            fix=f"Use https://host/path of at most {_URL_CHARACTERS_MAX} ASCII characters.",
        )
    return parts


def _body(execution: Execution) -> bytes:
    output = msgspec.Raw(execution.output_json or b"null")
    return msgspec.json.encode(
        {
            "execution_id": execution.id,
            "agent_id": execution.agent_id,
            "version": execution.version,
            "status": execution.status,
            "output": output,
            "error": execution.error,
            "queue_ms": execution.queue_ms,
            "run_ms": execution.run_ms,
            "started_at": execution.started_at,
            "finished_at": execution.finished_at,
        }
    )


def _signed(body: bytes, key: str, *, now: int, execution_id: str) -> dict[str, str]:
    signature = hmac.new(key.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
    return {
        "Content-Type": "application/json",
        "User-Agent": "headrace",
        "Headrace-Execution": execution_id,
        "Headrace-Signature": f"t={now},v1={signature}",
    }
