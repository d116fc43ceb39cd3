"""All rooms' settings as one frozen `Config`, from a TOML file and `HEADRACE_*` variables.

A table of the file is a room, a key of it a field: `[server] port = 8000`. A variable names the same path with
underscores, `HEADRACE_SERVER_PORT=8000`, and wins over the file. What does not exist is refused, with the nearest
name that does.
"""

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import msgspec

from headrace.agents.config import AgentsConfig
from headrace.cache.config import MemoryConfig, RemoteConfig
from headrace.cache.policy import CachePolicy
from headrace.database.config import DatabaseConfig
from headrace.errors import ConfigError
from headrace.monitor.config import MonitorConfig

T = TypeVar("T")

PREFIX = "HEADRACE_"
NOT_SETTINGS = ("HEADRACE_URL", "HEADRACE_COMPILE", "HEADRACE_PLAIN", "HEADRACE_TRACES", "HEADRACE_TEST_")
"""Variables with our prefix that mean something to a command, the build or the tests instead."""

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """The cache that the service itself uses."""

    memory: MemoryConfig | None = field(default_factory=MemoryConfig)
    """The tier in each process; `memory = false` turns it off."""
    remote: RemoteConfig | None = None
    """The shared tier; `headrace up` fills it in with the embedded Redis."""
    policies: tuple[CachePolicy, ...] = ()
    """Rules for keys; the first match wins."""
    namespace: str = "headrace"
    """Prefix of every key in the shared tier."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP side of one service."""

    host: str = "127.0.0.1"
    """Address to bind. Anything but loopback needs a `token`."""
    port: int = 8000
    """Port to bind; 0 takes a free one."""
    workers: int = 0
    """Serving processes; 0: one for each CPU."""
    token: str | None = field(default=None, repr=False)
    """With it, our own paths but the health check and the dashboard's page want `Authorization: Bearer <token>`."""
    body_bytes_max: int = 2 * 1024 * 1024
    """Largest request body. It is decoded in one piece on the event loop, about 10 ms a MiB, while others wait."""
    request_timeout_s: float = 60.0
    """Longest time to an answer; streams and the wrapped application are not bound by it."""
    drain_s: float = 10.0
    """How long a stopping worker may take to answer what it has accepted."""
    silence_max_s: float = 30.0
    """A process whose event loop has not turned for so long is killed and started again."""

    def __post_init__(self) -> None:
        """Refuse an open door without a key."""
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"server.port is {self.port}; it must be between 0 and 65535.")
        if self.workers < 0:
            raise ConfigError(f"server.workers is {self.workers}; it must be 0 (one for each CPU) or more.")
        for name in ("body_bytes_max", "request_timeout_s", "drain_s", "silence_max_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"server.{name} is {getattr(self, name)}; it must be above 0.")
        if self.host not in LOOPBACK and not self.token:
            raise ConfigError(
                f"server.host is {self.host!r}, which others can reach, and there is no server.token.",
                fix="Set server.token (HEADRACE_SERVER_TOKEN), or bind 127.0.0.1.",
            )
        if self.token is not None and len(self.token) < 16:
            raise ConfigError(f"server.token has {len(self.token)} characters; it must have at least 16.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtocolsConfig:
    """Doors to the agents in protocols of others; each opens paths that an application behind us may have itself."""

    a2a: bool = False
    """Agents as servers of A2A v1.0, at `/a2a/<agent id>`."""
    mcp: bool = False
    """Agents as the tools of an MCP server, at `/mcp`."""
    ag_ui: bool = False
    """Runs of agents for pages in AG-UI, at `/ag-ui/<agent id>`."""
    url: str | None = None
    """Where clients reach this service (`https://agents.example`), for the cards of A2A; None: as a request says."""
    a2a_root_agent: str | None = None
    """The agent whose card is at `/.well-known/agent-card.json`; None: there is none at the root."""

    def __post_init__(self) -> None:
        """Refuse what no client could follow."""
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ConfigError(f"protocols.url is {self.url!r}; it must begin with http:// or https://.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedConfig:
    """The Redis and Postgres that `headrace up` starts for what is not configured otherwise."""

    directory: Path = Path(".headrace")
    """Holds their data."""
    redis: bool = True
    """Start a Redis, unless `cache.remote` names one."""
    shards: int = 2
    """Postgres servers to start, unless `database.shards` names some; 0: none, agents live in memory."""
    postgres: int = 16
    """Major version of a new data directory: 16 or 18."""

    def __post_init__(self) -> None:
        """Refuse what cannot be started."""
        if not 0 <= self.shards <= 64:
            raise ConfigError(f"embedded.shards is {self.shards}; it must be between 0 and 64.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogConfig:
    """How events are written to standard error."""

    format: str = "auto"
    """`console`, `json`, or `auto`: console on a terminal, JSON elsewhere."""
    level: str = "info"
    """`debug`, `info`, `warning` or `error`."""

    def __post_init__(self) -> None:
        """Refuse names that mean nothing."""
        for name, known in (("format", ("auto", "console", "json")), ("level", ("debug", "info", "warning", "error"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"log.{name} is {getattr(self, name)!r}; it is one of {', '.join(known)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Everything that headrace can be told."""

    server: ServerConfig = field(default_factory=ServerConfig)
    protocols: ProtocolsConfig = field(default_factory=ProtocolsConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    database: DatabaseConfig = field(default_factory=DatabaseConfig)
    agents: AgentsConfig = field(default_factory=AgentsConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    embedded: EmbeddedConfig = field(default_factory=EmbeddedConfig)
    log: LogConfig = field(default_factory=LogConfig)


def load_config(path: Path | str | None = None, *, environment: Mapping[str, str] | None = None) -> Config:
    """Read the file, if one is named, lay the variables over it, and check everything.

    Raises `ConfigError` naming the key, the value and the rule.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise ConfigError(f"The configuration {path} cannot be read: {error.strerror}.") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"The configuration {path} is no valid TOML: {error}.") from error
    for name, text in (environment or {}).items():
        if name.startswith(PREFIX) and not name.startswith(NOT_SETTINGS):
            _lay_over(data, name, text)
    return build(Config, data)


def build(kind: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """A config dataclass from plain data, checked key by key."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path or 'The configuration'} is {_kind_of(data)}; it must be a table.")
    hints = _fields(kind)
    for key in data:
        if key not in hints:
            raise ConfigError(f"The key {_joined(path, key)!r} does not exist.{_did_you_mean(key, hints)}")
    values = {}
    for each in dataclasses.fields(cast("Any", kind)):
        if each.name in data:
            place = _joined(path, each.name)
            values[each.name] = _converted(hints[each.name], data[each.name], place, is_secret=not each.repr)
        elif each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING:
            raise ConfigError(f"The key {_joined(path, each.name)!r} is missing.", fix=f"Give {path} its {each.name}.")
    return kind(**values)


def leaves(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting with its path, secrets blanked, in the order of the classes."""
    for each in dataclasses.fields(config):
        value, name = getattr(config, each.name), _joined(path, each.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, name)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for index, item in enumerate(value):
                yield from leaves(item, f"{name}[{index}]")
        else:
            yield name, value if each.repr or value is None else "***"


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in {Union, types.UnionType} else (hint,)


def _kind_of(value: Any) -> str:
    """What a value is, without the value: where a table belongs, a string may be a URL with its password."""
    kinds = {str: "a string", bool: "a boolean", int: "an integer", float: "a float", list: "a list", dict: "a table"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _converted(hint: Any, value: Any, path: str, *, is_secret: bool) -> Any:
    options = _options(hint)
    table: Any = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if table is not None:
        if value is False and type(None) in options:
            return None
        return build(table, value, path)
    if get_origin(hint) is Mapping and (kinds := _tables_in(get_args(hint)[1])):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{path} is {_kind_of(value)}; it must be a table of tables ([{path}]).")
        return {name: build(_fitting(kinds, each), each, _joined(path, name)) for name, each in value.items()}
    item = next(iter(get_args(hint)), None)
    if get_origin(hint) is tuple and isinstance(item, type) and dataclasses.is_dataclass(item):
        if not isinstance(value, list):
            raise ConfigError(f"{path} is {_kind_of(value)}; it must be a list of tables ([[{path}]]).")
        return tuple(build(item, each, f"{path}[{index}]") for index, each in enumerate(value))
    return _leaf(hint, options, value, path, is_secret=is_secret)


def _tables_in(hint: Any) -> list[Any]:
    return [option for option in _options(hint) if dataclasses.is_dataclass(option)]


def _fitting(kinds: list[Any], data: Any) -> Any:
    """The first kind of table that has all the keys; for a table of no kind the first, which says what it wants."""
    if not isinstance(data, Mapping) or not data:
        return kinds[0]
    return next((kind for kind in kinds if data.keys() <= _fields(kind).keys()), kinds[0])


def _leaf(hint: Any, options: tuple[Any, ...], value: Any, path: str, *, is_secret: bool) -> Any:
    if Path in options and isinstance(value, str):
        return Path(value)
    for option in options:
        if isinstance(option, type) and issubclass(option, Enum):
            names = {member.value: member for member in option}
            if value in names:
                return names[value]
            raise ConfigError(f"{path} is {value!r}; it is one of {', '.join(map(str, names))}.")
    try:
        return msgspec.convert(value, hint)
    except (msgspec.ValidationError, TypeError) as error:
        raise ConfigError(f"{path} is {'***' if is_secret else repr(value)}: {error}.") from error


def _lay_over(data: dict[str, Any], variable: str, text: str) -> None:
    """Put the value of a variable where its name points to."""
    paths = dict(_variables(Config))
    if variable not in paths:
        raise ConfigError(
            f"The variable {variable} names no setting.{_did_you_mean(variable, paths)}",
            fix="Unset it, or name a setting: `headrace doctor` lists them.",
        )
    (*tables, key), hint = paths[variable]
    for index, table in enumerate(tables, 1):
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise ConfigError(f"{'.'.join(tables[:index])} is {_kind_of(data)}; {variable} needs it to be a table.")
    data[key] = _from_text(hint, text)


def _from_text(hint: Any, text: str) -> Any:
    """A variable's text as it is where text belongs, else as the TOML value that it looks like.

    A token may consist of digits, and a password be `true`.
    """
    if not {str, Path}.isdisjoint(_options(hint)):
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _variables(kind: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[tuple[str, ...], Any]]]:
    for name, hint in _fields(kind).items():
        table = next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)
        if table is not None:
            yield from _variables(table, (*path, name))
        yield PREFIX + "_".join((*path, name)).upper(), ((*path, name), hint)


def _fields(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind)}


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _did_you_mean(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else f" There are: {', '.join(sorted(known)[:20])}."
