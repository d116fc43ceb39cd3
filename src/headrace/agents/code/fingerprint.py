"""What a compiled source depends on besides its text: the interpreter, the policy, and what is installed.

Two names come out of it. The *slot* is known before anything is parsed: text, interpreter, policy, declared
dependencies. The *key* adds the versions of what is declared or imported, which takes a compiled source, or the record
of an earlier one. A slot keeps one compiled source at a time; its dependencies tell whether it is still the right one.

Versions are read from the names of the `*.dist-info` and `*.egg-info` entries on `sys.path` (PEP 376), where a wheel's
version must stand; that is 20 times cheaper than to parse every METADATA as `importlib.metadata` does. Distributions
in zip files are not seen.
"""

import dis
import hashlib
import importlib.util
import re
import sys
import threading
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from inspect import getmodulename
from pathlib import Path
from typing import Any, NamedTuple, Self

import msgspec

from headrace.clock import Clock, SystemClock
from headrace.errors import AgentInvalid

ABSENT = ""
"""The version of a declared distribution that is not installed; to install it changes the key."""
RECHECK_S = 1.0
_DISTRIBUTION = re.compile(r"\s*([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)\s*(?:[\[(;@<>=!~\s].*)?", re.DOTALL)
_DECLARED_MAX = 1_000
_IMPORT = dis.opmap["IMPORT_NAME"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """What of a Python decides how a source is compiled, and whether it can run the result."""

    cache_tag: str
    magic: str
    """Number of the bytecode's format, in hexadecimal."""
    hexversion: int
    optimize: int
    """What -O says: asserts and docstrings are compiled away."""
    flags: int = 0
    """Flags of `compile`, such as those of a future statement."""

    @classmethod
    def current(cls) -> Self:
        """The Python that this process runs on."""
        return cls(
            cache_tag=sys.implementation.cache_tag or sys.implementation.name,
            magic=importlib.util.MAGIC_NUMBER.hex(),
            hexversion=sys.hexversion,
            optimize=sys.flags.optimize,
        )


class Fingerprint:
    """Slots and keys for one interpreter and one policy."""

    __slots__ = ("_seed",)

    def __init__(self, interpreter: Interpreter, policy: Any) -> None:
        self._seed = hashlib.sha256(_canonical(["headrace agent code", interpreter, policy]))

    def slot(self, source_sha256: str, declared: Iterable[str]) -> str:
        """The name under which a source is kept, as 64 hexadecimal digits."""
        digest = self._seed.copy()
        digest.update(_canonical([source_sha256, sorted(declared)]))
        return digest.hexdigest()

    @staticmethod
    def key(slot: str, dependencies: Mapping[str, str]) -> str:
        """The name of exactly this compiled source: the slot, and the version of each dependency."""
        return hashlib.sha256(_canonical([slot, sorted(dependencies.items())])).hexdigest()


_Entry = tuple[str, Path]


class _Directory(NamedTuple):
    """A directory of the path as it was when it was listed."""

    changed_ns: int
    entries: tuple[_Entry, ...]


class Environment:
    """Which distributions are installed, and which of them provides a module.

    Read when it is first needed, and again when a directory of the path has changed; it is looked at once in
    `recheck_s` at most. Blocks: it belongs into a thread.
    """

    def __init__(
        self, path: Sequence[str] | None = None, *, clock: Clock | None = None, recheck_s: float = RECHECK_S
    ) -> None:
        self._path = path
        self._clock = clock if clock is not None else SystemClock()
        self._recheck_s = recheck_s
        self._lock = threading.Lock()
        self._checked_at = float("-inf")
        self._directories: dict[str, _Directory] = {}
        self._entries: list[_Entry] = []
        self._versions: dict[str, str] = {}
        self._providers: dict[str, list[str]] | None = None

    def dependencies(self, modules: Iterable[str], declared: Iterable[str]) -> dict[str, str]:
        """The version of every distribution that is declared or provides one of the modules, sorted by name.

        Modules that no distribution provides have no version, and do not show up.
        """
        modules = tuple(modules)
        with self._lock:
            self._refresh()
            names = set(declared)
            if modules:
                providers = self._provided()
                names.update(name for module in modules for name in providers.get(module, ()))
            return {name: self._versions.get(name, ABSENT) for name in sorted(names)}

    def _refresh(self) -> None:
        now = self._clock.monotonic()
        if now - self._checked_at < self._recheck_s:
            return
        self._checked_at = now
        path = dict.fromkeys(sys.path if self._path is None else self._path)
        self._directories = {name: self._listed(name) for name in path}
        entries = [entry for directory in self._directories.values() for entry in directory.entries]
        if entries == self._entries:
            return
        self._entries = entries
        self._providers = None
        self._versions = {}
        for name, place in entries:
            self._versions.setdefault(name, _version(place))

    def _listed(self, name: str) -> "_Directory":
        place = Path(name or ".")
        changed_ns = _changed_ns(place)
        known = self._directories.get(name)
        if known is not None and known.changed_ns == changed_ns:
            return known
        # A time stamp is as coarse as the kernel's tick: what is this fresh may change again without a new one.
        is_settled = changed_ns < (self._clock.wall() - self._recheck_s) * 1e9
        return _Directory(changed_ns if is_settled else -1, tuple(_distributions(place)))

    def _provided(self) -> dict[str, list[str]]:
        if self._providers is None:
            self._providers = {}
            for name, place in self._entries:
                for module in _modules(place):
                    self._providers.setdefault(module, []).append(name)
        return self._providers


def imported_modules(code: types.CodeType) -> tuple[str, ...]:
    """The top-level modules outside the standard library that the import statements of a source name, sorted.

    Read off the instructions that they became, which takes a twentieth of the time of a walk through its syntax tree.
    So what the compiler left out as unreachable does not count. The names of relative imports count, though they name
    no distribution. What is imported by a call has to be declared.
    """
    found: set[str] = set()
    codes = [code]
    while codes:
        code = codes.pop()
        codes.extend(constant for constant in code.co_consts if isinstance(constant, types.CodeType))
        found.update(name.partition(".")[0] for name in _imported_names(code))
    return tuple(sorted(found - sys.stdlib_module_names - {""}))


def _imported_names(code: types.CodeType) -> Iterator[str]:
    # Two bytes an instruction: what to do, and to which of the names; numbers above 255 come in instructions before.
    instructions = code.co_code
    at = instructions.find(_IMPORT)
    while at >= 0:
        if at % 2 == 0:
            number, prefix, shift = instructions[at + 1], at - 2, 8
            while prefix >= 0 and instructions[prefix] == dis.EXTENDED_ARG:
                number |= instructions[prefix + 1] << shift
                prefix, shift = prefix - 2, shift + 8
            yield code.co_names[number]
        at = instructions.find(_IMPORT, at + 1)


def declared_distributions(dependencies: Mapping[str, str] | Iterable[str] | None) -> tuple[str, ...]:
    """The normal names (PEP 503) in a list of requirements, or in a mapping of names to anything; sorted.

    Only the name counts: which version is installed is read from the environment. Raises `AgentInvalid` for what names
    no distribution.
    """
    if dependencies is None:
        return ()
    if isinstance(dependencies, str):
        raise AgentInvalid(
            f"dependencies={dependencies!r} is a string, not several.", fix=f"Write [{dependencies!r}] instead."
        )
    names = set()
    for requirement in dependencies:
        match = _DISTRIBUTION.fullmatch(requirement)
        if match is None:
            raise AgentInvalid(
                f"The dependency {requirement!r} does not begin with the name of a distribution.",
                fix='Write it as in a requirements file: "httpx>=0.28".',
            )
        names.add(_normal(match[1]))
    if len(names) > _DECLARED_MAX:
        raise AgentInvalid(f"{len(names):,} dependencies are declared; at most {_DECLARED_MAX:,} are accepted.")
    return tuple(sorted(names))


def _canonical(value: Any) -> bytes:
    return msgspec.json.encode(value, order="deterministic")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _changed_ns(directory: Path) -> int:
    try:
        return directory.stat().st_mtime_ns
    except OSError:
        return 0  # not there, or a zip file out of reach: nothing to find in it


def _distributions(directory: Path) -> Iterator[_Entry]:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError:
        return
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        if dot and suffix in {"dist-info", "egg-info"} and not stem.startswith("~"):  # ~: pip was interrupted
            yield _normal(stem.split("-")[0]), directory / name


def _version(entry: Path) -> str:
    parts = entry.name.rpartition(".")[0].split("-")
    if len(parts) > 1:
        return parts[1]
    # A development egg keeps its version inside.
    found = re.search(r"^Version:\s*(\S+)", _text(entry / "PKG-INFO") or _text(entry), re.MULTILINE)
    return found[1] if found else "unknown"


def _modules(entry: Path) -> set[str]:
    """The top-level modules that a distribution says or shows that it provides."""
    if declared := _text(entry / "top_level.txt").split():
        return {name.partition("/")[0] for name in declared}
    modules = set()
    for line in _text(entry / "RECORD").splitlines():
        path = line.partition(",")[0].strip('"')
        first, slash, _ = path.partition("/")
        module = first if slash else getmodulename(first)
        if module and module.isidentifier():
            modules.add(module)
    return modules


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
