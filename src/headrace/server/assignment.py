"""What the supervisor tells a process that it starts: one JSON argument."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Self

import msgspec

from headrace.cache import RemoteConfig
from headrace.config import Config, load_config
from headrace.database import ShardConfig

EXIT_CONFIG = 78
"""EX_CONFIG of sysexits.h: the process cannot do what it was told to. During the start of the service that ends it."""


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """A process's place in the service. Holds no secret: those come by file and environment, as for the supervisor."""

    config_path: str | None
    run_directory: str
    """Where the processes of the service meet: counters, snapshot, locks."""
    supervisor_pid: int
    alive_fd: int
    """The process writes a byte to it when it is ready and every second from then on."""
    worker: int = 0
    listen_fd: int = -1
    application: str | None = None
    """`module:app` to wrap."""
    redis_url: str | None = None
    """The embedded Redis, if the configuration names no other."""
    shards: tuple[tuple[str, str], ...] = ()
    """Names and connection strings of the embedded Postgres servers."""

    def to_argument(self) -> str:
        """The text to start the process with."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def from_argument(cls, text: str) -> Self:
        """The assignment in a process's argument."""
        return msgspec.json.decode(text, type=cls)

    def config(self) -> Config:
        """The configuration in force, the embedded servers filled in."""
        config = load_config(self.config_path, environment=os.environ)
        if self.redis_url:
            config = replace(config, cache=replace(config.cache, remote=RemoteConfig(url=self.redis_url)))
        if self.shards:
            shards = tuple(ShardConfig(name=name, dsn=dsn) for name, dsn in self.shards)
            config = replace(config, database=replace(config.database, shards=shards))
        if config.agents.code_directory is None:
            code = self.directory.parent / "code"
            config = replace(config, agents=replace(config.agents, code_directory=code))
        return config

    @property
    def directory(self) -> Path:
        """`run_directory` as a path."""
        return Path(self.run_directory)
