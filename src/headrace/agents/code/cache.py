"""Compiled agents by what they were made of: in memory, on disk, and their sources in the shared cache.

A source is compiled once for everybody who has the same one: agents, threads and, with a directory, processes. A byte
of it, the interpreter, the policy or the version of a dependency makes another one of it.

Bytecode is as dangerous as code and, unlike it, can crash the interpreter; so `marshal` is only given what one of our
own keys signed, for this slot, on this machine's disk. What is shared between machines is the source, under its hash.
"""

import hashlib
import marshal
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.agents.code.compilation import CodePolicy, CompiledAgent, Refusal, compile_source, measured
from headrace.agents.code.fingerprint import Environment, Fingerprint, Interpreter, declared_distributions
from headrace.agents.code.keys import SigningKeys
from headrace.agents.code.store import BadRecord, CodeStore, Lock
from headrace.clock import Clock, SystemClock
from headrace.errors import CacheUnavailable, CallerError, ConfigError
from headrace.events import CodeRejected, Observer, Silent

if TYPE_CHECKING:
    from headrace.cache import Cache

MiB = 1 << 20
TURN_MAX_S = 30.0
"""Longest wait for a thread that compiles the same source; then it is compiled twice."""
FLUSH_MAX_S = 5.0
_REFUSAL_BYTES = 500
_HELD_BYTES = 1_500

Dependencies = Mapping[str, str] | Iterable[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeStatistics:
    """What a CodeCache did since it was made, and what it holds."""

    memory_hits: int = 0
    disk_hits: int = 0
    misses: int = 0
    """Requests that found nothing usable. For `compile` this is followed by a compilation or a refusal."""
    compiles: int = 0
    refusals: int = 0
    """Requests for a source that cannot be compiled, remembered or not."""
    rejected: int = 0
    """Records and shared sources that could not be trusted or read."""
    written: int = 0
    unwritten: int = 0
    evictions: int = 0
    """Records removed from the directory to keep its bound."""
    memory_bytes: int = 0
    """Estimated size of the code in memory."""


class _Meta(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    slot: str
    key: str
    source_sha256: str
    imports: tuple[str, ...]
    dependencies: dict[str, str]
    metadata: dict[str, Any]
    compiled_at: float
    compile_ms: float


@dataclass(frozen=True, slots=True)
class _Request:
    agent_id: str
    source: str
    sha256: str
    slot: str
    declared: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    compiled: CompiledAgent
    imports: tuple[str, ...]


class CodeCache:
    """A cache of compiled agents.

    `directory`: where signed bytecode outlives the process; None keeps it in memory only. Environments with other
    packages should have directories of their own, or they replace each other's records. `signing_key`: a secret, or
    several of which the first signs and all verify; without one it is read from `<directory>.key`, which is made when
    it is missing. `bytes_max` bounds the code in memory, `disk_bytes_max` the directory. `cache` shares sources, by
    `share` and `fetch`.

    `get`, `put` and `compile` block and may be called from any thread: for an event loop they belong into one. No
    failure of the disk or of the shared cache is the caller's: it is an event, a count, and a miss.
    """

    def __init__(
        self,
        directory: Path | str | None = None,
        *,
        signing_key: str | Sequence[str] | None = None,
        bytes_max: int = 64 * MiB,
        disk_bytes_max: int = 256 * MiB,
        policy: CodePolicy = CodePolicy(),  # noqa: B008 - frozen
        cache: "Cache | None" = None,
        interpreter: Interpreter | None = None,
        environment: Environment | None = None,
        lock_wait_s: float = 2.0,
        loads: Callable[[bytes], Any] = marshal.loads,  # noqa: TID251 - is given what a signature was verified of
        observer: Observer | None = None,
        clock: Clock | None = None,
    ) -> None:
        if not (bytes_max > 0 and disk_bytes_max > 0):
            raise ConfigError(
                f"CodeCache has bytes_max={bytes_max} and disk_bytes_max={disk_bytes_max}; both must be above 0."
            )
        self._clock = clock if clock is not None else SystemClock()
        self._observer = observer if observer is not None else Silent()
        self._policy = policy
        self._cache = cache
        self._interpreter = interpreter if interpreter is not None else Interpreter.current()
        self._environment = environment if environment is not None else Environment(clock=self._clock)
        self._fingerprint = Fingerprint(self._interpreter, policy)
        self._loads = loads
        from headrace.cache import MemoryCache  # with its room come drivers, which the room of the agents does without

        self._memory = MemoryCache(ttl=None, weight_max=bytes_max, policy="lru", clock=self._clock)
        self._turns = _Turns()
        self._counts: dict[str, int] = {field.name: 0 for field in fields(CodeStatistics)}
        self._counting = threading.Lock()
        self._store: CodeStore | None = None
        if directory is not None:
            self._store = CodeStore(
                Path(directory),
                keys=None if signing_key is None else SigningKeys.given(signing_key),
                bytes_max=disk_bytes_max,
                lock_wait_s=lock_wait_s,
                observer=self._observer,
                clock=self._clock,
            )

    # -- compiled code --------------------------------------------------------------------------------------------

    def get(self, agent_id: str, source: str, dependencies: Dependencies = None) -> CompiledAgent | None:
        """The compiled source, if it is in memory or on disk and everything that it was made of is still the same.

        `dependencies` are the declared ones, as requirements or a mapping of their names; imported ones are known.
        """
        request = self._request(agent_id, source, dependencies)
        if isinstance(request, Refusal):
            return None
        found = self._remembered(request)
        if found is None:
            with self._turns.turn(request.slot):  # two that read at once would have two code objects
                found = self._remembered(request) or self._read(request)
        return found if isinstance(found, CompiledAgent) else None

    def put(self, agent_id: str, source: str, compiled: CompiledAgent, dependencies: Dependencies = None) -> None:
        """Keep what another cache compiled. Raises `CallerError` if it was not made of this source, here and now."""
        request = self._request(agent_id, source, dependencies)
        if isinstance(request, Refusal):
            raise request.error(agent_id)
        imports = tuple(compiled.metadata["imports"])
        current = self._environment.dependencies(imports, request.declared)
        if compiled.source_sha256 != request.sha256 or compiled.key != self._fingerprint.key(request.slot, current):
            raise CallerError(
                f"What is put for {agent_id!r} was not compiled from this source with these dependencies.",
                fix="Pass the source, the dependencies and the interpreter that it was compiled with, or compile it.",
            )
        self._keep(request, _Held(compiled, imports), None if self._store is None else self._store.lock(request.slot))

    def compile(self, agent_id: str, source: str, dependencies: Dependencies = None) -> CompiledAgent:
        """The compiled source, compiled if need be; once, however many threads and processes ask.

        Runs none of it. Raises `AgentInvalid` with the reason when it cannot be compiled; that is remembered, too.
        """
        request = self._request(agent_id, source, dependencies)
        found = request if isinstance(request, Refusal) else self._found_or_made(request)
        if isinstance(found, Refusal):
            self._count("refusals")
            raise found.error(agent_id)
        return found

    def _found_or_made(self, request: _Request) -> CompiledAgent | Refusal:
        if (found := self._remembered(request)) is not None:
            return found
        with self._turns.turn(request.slot):
            return self._remembered(request) or self._read(request) or self._make(request)

    def _request(self, agent_id: str, source: str, dependencies: Dependencies) -> _Request | Refusal:
        encoded = measured(source, self._policy)
        if isinstance(encoded, Refusal):
            return encoded
        declared = declared_distributions(dependencies)
        sha256 = hashlib.sha256(encoded).hexdigest()
        return _Request(agent_id, source, sha256, self._fingerprint.slot(sha256, declared), declared)

    def _remembered(self, request: _Request) -> CompiledAgent | Refusal | None:
        held = self._memory.get(request.slot)
        if held is None or isinstance(held, Refusal):
            return held
        if held.compiled.dependencies != self._environment.dependencies(held.imports, request.declared):
            self._memory.delete(request.slot)
            return None
        self._count("memory_hits")
        compiled: CompiledAgent = held.compiled
        return compiled

    def _read(self, request: _Request) -> CompiledAgent | None:
        """What the directory has; it is in memory then, too."""
        held = self._held_on_disk(request)
        if held is None:
            self._count("misses")
            return None
        self._count("disk_hits")
        return held.compiled

    def _held_on_disk(self, request: _Request) -> _Held | None:
        if self._store is None:
            return None
        try:
            record = self._store.read(request.slot)
            if record is None:
                return None
            meta = _expected(record.meta, request)
            if meta.dependencies != self._environment.dependencies(meta.imports, request.declared):
                return None
            held = _Held(_opened(meta, self._loaded(record.body)), meta.imports)
        except BadRecord as reason:
            self._count("rejected")
            self._store.quarantine(request.slot)
            self._observer.on(CodeRejected(request.agent_id, request.slot, str(reason)))
            return None
        self._memory.set(request.slot, held, weight=_weight(record.body))
        return held

    def _loaded(self, body: bytes) -> types.CodeType:
        try:
            code = self._loads(body)
        except (EOFError, ValueError, TypeError, MemoryError) as error:
            raise BadRecord(f"not readable: {type(error).__name__}") from error
        if not isinstance(code, types.CodeType):
            raise BadRecord(f"a {type(code).__name__}, not code")
        return code

    def _make(self, request: _Request) -> CompiledAgent | Refusal:
        lock = None if self._store is None else self._store.lock(request.slot)
        is_handed_over = False
        try:
            # Whoever had the lock before may have made it.
            if lock is not None and (held := self._held_on_disk(request)) is not None:
                self._count("disk_hits")
                return held.compiled
            started = self._clock.monotonic()
            outcome = compile_source(request.source, policy=self._policy, interpreter=self._interpreter)
            compile_ms = (self._clock.monotonic() - started) * 1000
            if isinstance(outcome, Refusal):
                if outcome.is_lasting:
                    self._memory.set(request.slot, outcome, weight=_REFUSAL_BYTES + len(outcome.reason))
                return outcome
            self._count("compiles")
            dependencies = self._environment.dependencies(outcome.imports, request.declared)
            compiled = CompiledAgent(
                code=outcome.code,
                metadata=outcome.metadata,
                compiled_at=self._clock.wall(),
                compile_ms=compile_ms,
                dependencies=dependencies,
                source_sha256=request.sha256,
                key=self._fingerprint.key(request.slot, dependencies),
            )
            is_handed_over = self._keep(request, _Held(compiled, outcome.imports), lock)
            return compiled
        finally:
            if lock is not None and not is_handed_over:
                lock.release()

    def _keep(self, request: _Request, held: _Held, lock: Lock | None) -> bool:
        """Take it into memory, and hand it to the disk with the lock of its record; whether the lock went with it."""
        compiled = held.compiled
        body = marshal.dumps(compiled.code)
        self._memory.set(request.slot, held, weight=_weight(body))
        if self._store is None or lock is None:
            return False
        meta = _Meta(
            slot=request.slot,
            key=compiled.key,
            source_sha256=request.sha256,
            imports=held.imports,
            dependencies=dict(compiled.dependencies),
            metadata=dict(compiled.metadata),
            compiled_at=compiled.compiled_at,
            compile_ms=compiled.compile_ms,
        )
        self._store.write(request.slot, msgspec.json.encode(meta), body, lock)
        return True

    # -- shared sources -------------------------------------------------------------------------------------------

    async def share(self, agent_id: str, source: str) -> str:
        """Put a source into the shared cache; its SHA-256, by which any process gets it with `fetch`.

        Raises `AgentInvalid` for what is no text or too long. How long it stays there is up to the cache's policy for
        `agent-source:*`; while the cache is away nothing is shared.
        """
        encoded = measured(source, self._policy)
        if isinstance(encoded, Refusal):
            raise encoded.error(agent_id)
        sha256 = hashlib.sha256(encoded).hexdigest()
        if self._cache is not None:
            try:
                await self._cache.set(f"agent-source:{sha256}", source, type=str)
            except CacheUnavailable:
                return sha256  # the cache's own events tell; who needs the source reads it where it is durable
        return sha256

    async def fetch(self, agent_id: str, source_sha256: str) -> str | None:
        """The source of this SHA-256, if somebody shared it; never another one."""
        if self._cache is None:
            return None
        key = f"agent-source:{source_sha256}"
        source = await self._cache.get(key, type=str)
        if source is None:
            return None
        encoded = measured(source, self._policy)
        if not isinstance(encoded, Refusal) and hashlib.sha256(encoded).hexdigest() == source_sha256:
            return str(source)
        self._count("rejected")
        self._observer.on(CodeRejected(agent_id, key, "not the source of this hash"))
        try:
            await self._cache.delete(key)
        except CacheUnavailable:
            return None  # it will be refused the next time as well
        return None

    # -- the rest -------------------------------------------------------------------------------------------------

    def statistics(self) -> CodeStatistics:
        """What this cache did so far."""
        with self._counting:
            counts = dict(self._counts)
        if self._store is not None:
            counts["written"] = self._store.written
            counts["unwritten"] = self._store.unwritten
            counts["evictions"] = self._store.evictions
        counts["memory_bytes"] = self._memory.statistics().weight
        return CodeStatistics(**counts)

    def flush(self, timeout_s: float = FLUSH_MAX_S) -> bool:
        """Wait until what was compiled is on disk, or cannot be; False when that takes longer than `timeout_s`."""
        return self._store is None or self._store.flush(timeout_s)

    def close(self, timeout_s: float = FLUSH_MAX_S) -> None:
        """Write what waits to be written and end the thread that does it. Using the cache again starts it again."""
        if self._store is not None:
            self._store.close(timeout_s)

    def _count(self, name: str) -> None:
        with self._counting:
            self._counts[name] += 1


class _Turn:
    __slots__ = ("lock", "threads")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.threads = 0


class _Turns:
    """One thread at a time for each name; no trace of a name that nobody asks for."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._turns: dict[str, _Turn] = {}

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        with self._lock:
            turn = self._turns.setdefault(name, _Turn())
            turn.threads += 1
        has_turn = turn.lock.acquire(timeout=TURN_MAX_S)
        try:
            yield
        finally:
            if has_turn:
                turn.lock.release()
            with self._lock:
                turn.threads -= 1
                if not turn.threads:
                    del self._turns[name]


def _expected(encoded: bytes, request: _Request) -> _Meta:
    try:
        meta = msgspec.json.decode(encoded, type=_Meta)
    except msgspec.MsgspecError as error:
        raise BadRecord("its description is not readable") from error
    if meta.slot != request.slot or meta.source_sha256 != request.sha256:
        raise BadRecord("made for another source, interpreter, policy or list of dependencies")
    return meta


def _opened(meta: _Meta, code: types.CodeType) -> CompiledAgent:
    return CompiledAgent(
        code=code,
        metadata=meta.metadata,
        compiled_at=meta.compiled_at,
        compile_ms=meta.compile_ms,
        dependencies=meta.dependencies,
        source_sha256=meta.source_sha256,
        key=meta.key,
    )


def _weight(body: bytes) -> int:
    """A code object takes about one and a half times the bytes of its marshalled form."""
    return _HELD_BYTES + len(body) * 3 // 2
