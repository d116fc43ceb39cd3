"""Stops an agent that holds the event loop: a step without an end would hold up every other execution and request.

An interval timer interrupts the main thread a few times a second. If the loop has not turned since an earlier tick,
and the same call of an agent is still on the stack, that call has held the loop in between. After `step_max_s` it is
ended by an exception that only `except BaseException` catches. So a step costs nothing while it is short: nobody reads
a clock for it. Tasks that an agent starts, and its callbacks, are watched like its own steps.

The exception is raised where it does the least harm. For a while only in a frame of the agent's own module, so that no
library is cut off between taking a lock and entering its `try`; then anywhere below the agent; never in code of ours.
An agent that catches it gets it again a tick later, and from then on with every jump and call that it makes, in its
`except` and `finally` blocks too, until its stack is unwound. Each interruption is a strike against the version of the
agent; with `step_strikes_max` of them it is refused, in this process and until that ends: deploy another version.

This is against mistakes, not against enemies. Signals reach the main thread alone, so that is where the loop must run.
An agent inside a C extension is interrupted when the extension returns, which may be never; then what is left is the
supervisor, who ends a process that gives no sign of life for `server.silence_max_s`. Foreign code that must be stopped
whatever it does belongs into a process of its own.
"""

import _thread
import asyncio
import signal
import sys
import threading
from functools import partial
from types import FrameType

from headrace.agents.config import AgentsConfig
from headrace.agents.definition import Definition
from headrace.clock import Clock
from headrace.errors import AgentQuarantined, ConfigError
from headrace.events import Observer, StepInterrupted, VersionQuarantined

_TICKS_A_STEP = 4
_TICK_MAX_S = 0.25
_PATIENCE = 1.5
"""How many times `step_max_s` an agent is given to come back from a library into its own code."""
_LOOK_S = 0.01
"""Between looks whether it has."""
_OURS = "headrace."
_KNOWN_MAX = 4_096

VersionName = tuple[str, str, str]
"""Agent id, version and digest of the source: another source under the same version is another matter."""


class StepTooLong(BaseException):
    """A step of an agent held the event loop for too long. Not an `Exception`: no agent is to handle it."""


class _OnceMore:
    """Its negation has the handler of SIGALRM called once more, at the next jump or call that is executed.

    After a call CPython looks for signals: a handler that called `interrupt_main` by its name would interrupt itself.
    After an operator it does not look, so what is interrupted is what the agent does next. The result is None.
    """

    __slots__ = ()
    __neg__ = staticmethod(partial(_thread.interrupt_main, signal.SIGALRM))


_once_more = _OnceMore()


class Guard:
    """Watches the agents of one event loop; `arm` it in the main thread.

    Unarmed it interrupts nothing; what is quarantined stays so.
    """

    def __init__(self, config: AgentsConfig, *, clock: Clock, observer: Observer) -> None:
        self._config = config
        self._clock = clock
        self._observer = observer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._known: dict[str, Definition] = {}
        """By the name of their modules, which stands in every frame of an agent."""
        self._strikes: dict[VersionName, int] = {}
        self._quarantined: set[VersionName] = set()
        self._tick_s = min(_TICK_MAX_S, config.step_max_s / _TICKS_A_STEP)
        self._is_turn_asked = False
        self._suspect: FrameType | None = None
        """The outermost frame of an agent that was running at an earlier tick of this turn of the loop."""
        self._suspect_since = 0.0
        self._interruptions = 0
        """Of the suspect."""
        self._interrupted: tuple[Definition, float, int] | None = None
        """What the observer is to be told when the loop is free: whose step, held for how long, and its strikes."""

    @property
    def is_armed(self) -> bool:
        """Whether it interrupts."""
        return self._loop is not None

    def arm(self) -> None:
        """Begin to watch the running loop. It takes SIGALRM and the process's real-time interval timer.

        Raises `ConfigError` outside the main thread, or when SIGALRM is somebody else's.
        """
        if threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "Long steps can be interrupted in the main thread alone, and this loop runs in another.",
                fix="Run the event loop in the main thread, or leave the guard off.",
            )
        if signal.getsignal(signal.SIGALRM) != signal.SIG_DFL:
            raise ConfigError(
                "SIGALRM has a handler already; the guard of long steps would take it away.",
                fix="Leave either of the two off.",
            )
        self._loop = asyncio.get_running_loop()
        self._is_turn_asked = False
        signal.signal(signal.SIGALRM, self._tick)
        self._next_tick(self._tick_s)

    def disarm(self) -> None:
        """Watch no longer."""
        if self._loop is None:
            return
        self._loop = None  # first: a tick that comes in between must not ask for another, which would end the process
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        self._acquit()

    def admit(self, definition: Definition) -> None:
        """An execution of this definition is about to begin. Raises `AgentQuarantined` when its version may not."""
        if self._quarantined and _name_of(definition) in self._quarantined:
            raise AgentQuarantined(
                f"Version {definition.version} of the agent {definition.agent_id!r} held the event loop for longer"
                f" than {self._config.step_max_s:g} s {self._config.step_strikes_max} times; it is not executed any"
                " more."
            )
        if definition.module not in self._known:
            self._know(definition)

    def _know(self, definition: Definition) -> None:
        if len(self._known) >= max(_KNOWN_MAX, 2 * self._config.definitions_max):
            self._known = {name: known for name, known in self._known.items() if name in sys.modules}
        self._known[definition.module] = definition

    # -- in the signal handler -------------------------------------------------------------------------------------

    def _tick(self, _signal: int, frame: FrameType | None) -> None:
        loop = self._loop
        if loop is None or loop.is_closed():
            return
        if not self._is_turn_asked:
            # Nothing is known of this turn yet. When the loop gets to the callback, the turn is over.
            self._is_turn_asked = True
            loop.call_soon_threadsafe(self._turned)
            self._suspect = None
        outermost = self._agent_on(frame)
        now = self._clock.monotonic()
        if outermost is None or outermost is not self._suspect:
            self._acquit()
            self._suspect, self._suspect_since = outermost, now
        held_s = now - self._suspect_since
        if outermost is None or frame is None or held_s < self._config.step_max_s:
            self._next_tick(self._tick_s)
            return
        if self._may_raise_in(frame, outermost, patience=held_s < _PATIENCE * self._config.step_max_s):
            # It gets the time of a tick to clean up.
            self._next_tick(self._tick_s)
            self._interrupt(outermost, held_s)
        self._next_tick(_LOOK_S)

    def _interrupt(self, outermost: FrameType, held_s: float) -> None:
        definition = self._known[outermost.f_globals["__name__"]]
        name = _name_of(definition)
        strikes = self._strikes[name] = self._strikes.get(name, 0) + 1
        self._interrupted = (definition, held_s, strikes)
        self._interruptions += 1
        error = _too_long(held_s, self._config.step_max_s)
        if self._interruptions > 1:
            error.__cause__ = -_once_more
        raise error

    def _may_raise_in(self, frame: FrameType, outermost: FrameType, *, patience: bool) -> bool:
        """Whether the interrupted code may be left by an exception right here."""
        if patience and frame.f_globals.get("__name__") != outermost.f_globals["__name__"]:
            return False
        below: FrameType | None = frame
        while below is not None and below is not outermost:
            if str(below.f_globals.get("__name__", "")).startswith(_OURS):
                return False
            below = below.f_back
        return True

    def _agent_on(self, frame: FrameType | None) -> FrameType | None:
        """The outermost frame of an agent on the stack."""
        found = None
        while frame is not None:
            module = frame.f_globals.get("__name__")
            if isinstance(module, str) and module in self._known:
                found = frame
            frame = frame.f_back
        return found

    def _next_tick(self, seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)

    # -- in the loop -----------------------------------------------------------------------------------------------

    def _turned(self) -> None:
        self._is_turn_asked = False
        self._acquit()
        if self._interrupted is None:
            return
        definition, held_s, strikes = self._interrupted
        self._interrupted = None
        self._observer.on(StepInterrupted(definition.agent_id, definition.version, held_s, strikes))
        name, limit = _name_of(definition), self._config.step_strikes_max
        if strikes >= limit and name not in self._quarantined:
            self._quarantined.add(name)
            self._observer.on(VersionQuarantined(definition.agent_id, definition.version, strikes))

    def _acquit(self) -> None:
        self._suspect = None
        self._interruptions = 0


def _name_of(definition: Definition) -> VersionName:
    return definition.agent_id, definition.version, definition.sha256


def _too_long(held_s: float, limit_s: float) -> StepTooLong:
    return StepTooLong(
        f"It held the event loop for {held_s:.2f} s; a step may take {limit_s:g} s (agents.step_max_s)."
        " Await between parts of long work, or make `execute` a plain function, which runs in a thread."
    )
