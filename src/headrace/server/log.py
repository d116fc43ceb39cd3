"""Logs: one reader of the events, and the form that everything on standard error has."""

import logging
import os
import sys
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
import structlog

from headrace.config import LogConfig
from headrace.events import (
    CallbackGivenUp,
    CanaryAborted,
    CodeRejected,
    CodeStoreUnavailable,
    EntryRejected,
    Event,
    ExecutionFinished,
    GuardOff,
    LoadFailed,
    MonitorFailed,
    NodeFenced,
    NodesLost,
    ProcessExited,
    ProcessFailed,
    RequestFailed,
    ShardUnavailable,
    StepInterrupted,
    TierUnavailable,
    VersionQuarantined,
    WorkerKilled,
    WriteDropped,
    ZygoteEnded,
)

_WARNINGS = (
    CallbackGivenUp,
    CanaryAborted,
    CodeRejected,
    CodeStoreUnavailable,
    EntryRejected,
    GuardOff,
    LoadFailed,
    MonitorFailed,
    NodeFenced,
    NodesLost,
    ProcessExited,
    ProcessFailed,
    RequestFailed,
    ShardUnavailable,
    StepInterrupted,
    TierUnavailable,
    VersionQuarantined,
    WorkerKilled,
    WriteDropped,
    ZygoteEnded,
)
_FREQUENT = (ExecutionFinished,)


def configure(config: LogConfig, **process: Any) -> None:
    """Write events, and the log records of every library, in one form; `process` stands in each line."""
    # A process that was started without a standard error has None there; what it would say has no reader.
    stream = sys.stderr or Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for as long as the process is
    is_console = config.format == "console" or (config.format == "auto" and stream.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer()]
        if is_console
        else [
            structlog.processors.dict_tracebacks,
            structlog.processors.JSONRenderer(serializer=lambda value, **_: msgspec.json.encode(value).decode()),
        ]
    )
    level = logging.getLevelNamesMapping()[config.level.upper()]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(stream),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**process)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


class LogObserver:
    """Writes every event as one line: its type as the message, its fields as they are.

    A line that cannot be written, because whoever read standard error is gone or the disk is full, is lost: who tells
    a fact must not fail for it.
    """

    def __init__(self) -> None:
        self._log = structlog.get_logger("headrace")

    def on(self, event: Event) -> None:
        """Write one fact down; what happens at every request only when debugging."""
        if isinstance(event, _FREQUENT):
            if not self._is_debugging:
                return
            write = self._log.debug
        elif isinstance(event, _WARNINGS):
            write = self._log.warning
        else:
            write = self._log.info
        fields = msgspec.structs.asdict(event)
        with suppress(OSError):
            write(type(event).__name__, **fields)

    @cached_property
    def _is_debugging(self) -> bool:
        """Asked once, when the level has been set: who is told of every request must not ask at every request."""
        is_debugging: bool = self._log.is_enabled_for(logging.DEBUG)
        return is_debugging
