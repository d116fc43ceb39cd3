"""Which events are written to the log, at which level."""

import logging

import pytest
import structlog

from headrace.config import LogConfig
from headrace.events import AgentUndeployed, ExecutionFinished
from headrace.server import log


@pytest.fixture(autouse=True)
def _logging():
    """Leave the process's logging as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


@pytest.mark.parametrize(("level", "is_written"), [("info", False), ("debug", True)])
def test_what_happens_at_every_request_is_written_when_debugging(level, is_written, capsys):
    """Everything else is written in any case, with its fields."""
    log.configure(LogConfig(format="json", level=level), process="worker-0")
    observer = log.LogObserver()
    observer.on(ExecutionFinished("a", "1.0.0", "e1", "completed", 0.1, 0.2))
    observer.on(AgentUndeployed("a", 3))
    written = capsys.readouterr().err
    assert ("ExecutionFinished" in written) is is_written
    assert '"event":"AgentUndeployed"' in written
    assert '"process":"worker-0"' in written
