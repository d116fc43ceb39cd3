"""Logs: one reader of the events, and the form that everything on standard error has."""

import logging
import sys
from typing import Any

import msgspec
import structlog

from headrace.config import LogConfig
from headrace.events import (
    EntryRejected,
    Event,
    ExecutionFinished,
    LoadFailed,
    ProcessExited,
    RequestFailed,
    ShardUnavailable,
    TierUnavailable,
    WriteDropped,
)

_WARNINGS = (EntryRejected, LoadFailed, ProcessExited, RequestFailed, ShardUnavailable, TierUnavailable, WriteDropped)
_FREQUENT = (ExecutionFinished,)


def configure(config: LogConfig, **process: Any) -> None:
    """Write events, and the log records of every library, in one form; `process` stands in each line."""
    is_console = config.format == "console" or (config.format == "auto" and sys.stderr.isatty())
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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**process)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared, processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last]
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(max(level, logging.WARNING))


class LogObserver:
    """Writes every event as one line: its type as the message, its fields as they are."""

    def __init__(self) -> None:
        self._log = structlog.get_logger("headrace")

    def on(self, event: Event) -> None:
        """Write one fact down; what happens at every request only when debugging."""
        fields = msgspec.structs.asdict(event)
        if isinstance(event, _WARNINGS):
            self._log.warning(type(event).__name__, **fields)
        elif isinstance(event, _FREQUENT):
            self._log.debug(type(event).__name__, **fields)
        else:
            self._log.info(type(event).__name__, **fields)
