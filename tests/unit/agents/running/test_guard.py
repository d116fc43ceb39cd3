"""The guard of the event loop: hogs of every kind end, the others go on.

They run in processes of their own, because pytest-timeout has SIGALRM here. What loops in a `try` is a long call: a
signal that arrives at the jump back of a loop takes its exception past the `except` around it, in CPython 3.11.
"""

import asyncio
import json
import re
import subprocess
import sys
import threading
from functools import cache

import pytest

from headrace.agents.config import AgentsConfig
from headrace.agents.running.guard import Guard
from headrace.clock import SystemClock
from headrace.errors import ConfigError
from headrace.events import Silent

HOGS = {
    "spins": "async def Agent(input, context):\n    while True: pass",
    "blocks": "import time\nasync def Agent(input, context):\n    time.sleep(60)",
    "constructs": "class Agent:\n    def __init__(self):\n        while True: pass\n"
    "    async def execute(self, input, context): ...",
    "in a library": "import json\nasync def Agent(input, context):\n"
    "    json.loads('[' + '1,' * 3_000_000 + '1]', parse_int=lambda text: sum(range(200)))",
    "after an await": "import asyncio\nasync def Agent(input, context):\n    await asyncio.sleep(0.01)\n"
    "    while True: pass",
    "in a task": "import asyncio\nasync def child():\n    while True: pass\n"
    "async def Agent(input, context):\n    await asyncio.create_task(child())",
    "cleans up": "async def Agent(input, context):\n    try:\n        while True: sum(range(99_999))\n"
    "    finally:\n        context.progress(1, 1, 'cleaned')",
    "swallows": "async def Agent(input, context):\n    while True:\n        try:\n"
    "            while True: sum(range(99_999))\n        except BaseException:\n            pass",
    "swallows twice": "async def Agent(input, context):\n    while True:\n        try:\n            while True:\n"
    "                try:\n                    while True: sum(range(99_999))\n                except BaseException:\n"
    "                    pass\n        except BaseException:\n            continue",
    "suppresses": "import contextlib\nasync def Agent(input, context):\n    while True:\n"
    "        with contextlib.suppress(BaseException):\n            for n in range(10**12): abs(n)",
}
PAUSE_MAX_S = 20.0  # a machine may be busy for so long; the hogs would hold it for a minute or for ever
SCRIPT = """
import asyncio, json, sys, time
from headrace.agents import AgentHost, AgentsConfig
from headrace.errors import AgentQuarantined

STEADY = '''
import asyncio, time
async def Agent(input, context):
    longest, worked, end = 0.0, 0.0, time.monotonic() + input
    while (before := time.monotonic()) < end:
        before_work = time.process_time()
        await asyncio.sleep(0.001)
        longest = max(longest, time.monotonic() - before)
        worked = max(worked, time.process_time() - before_work)
    return longest, worked
'''

class Notes:
    def __init__(self): self.events = []
    def on(self, event):
        if type(event).__name__ in ("StepInterrupted", "VersionQuarantined"):
            self.events.append([type(event).__name__, event.agent_id, event.strikes])

async def main(hogs):
    notes = Notes()
    found = {"ends": {}, "longest": {}}
    async with AgentHost(AgentsConfig(step_max_s=0.2, timeout_s=20), observer=notes) as host:
        host.guard.arm()
        await host.deploy("steady", STEADY, version="1.0.0")
        for name, text in hogs.items():
            await host.deploy(name, text, version="1.0.0")
            other = asyncio.create_task(host.execute("steady", 0.5))
            await asyncio.sleep(0.02)
            end = await host.execute(name, None)
            found["ends"][name] = [end.status, end.error, end.progress and end.progress.note]
            found["longest"][name] = (await other).output
        found["swallower"] = "runs"
        try:
            await host.execute("swallows", None)
        except AgentQuarantined as error:
            found["swallower"] = error.message
        await host.execute("spins", None)
        await host.execute("spins", None)
        found["spinner"] = "runs"
        try:
            await host.execute("spins", None)
        except AgentQuarantined as error:
            found["spinner"] = error.message
        submitted = await host.submit("steady", 0)
        await host.deploy("spins", "async def Agent(input, context): return 'better'", version="1.0.1")
        found["better"] = (await host.execute("spins", None)).output
        long = await host.execute("steady", 1.0)
        found["patient"] = long.status
        host.guard.disarm()
    found["events"] = notes.events
    print(json.dumps(found))

loop, hogs = json.loads(sys.argv[1])
if loop == "uvloop":
    import uvloop
    uvloop.run(main(hogs))
else:
    asyncio.run(main(hogs))
"""


@cache
def outcome(loop):
    """What became of all hogs, one after the other, in one process on the given event loop."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, json.dumps([loop, HOGS])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(params=["asyncio", "uvloop"])
def found(request):
    """On both event loops."""
    return outcome(request.param)


@pytest.mark.parametrize("hog", HOGS)
def test_a_step_that_holds_the_loop_is_ended(found, hog):
    """Wherever it spins or blocks and whatever it catches, its execution fails and says why."""
    status, error, _ = found["ends"][hog]

    assert status == "failed"
    held = re.match(r"StepTooLong: It held the event loop for (\d+\.\d+) s", error)
    assert 0.2 <= float(held[1]) < PAUSE_MAX_S
    assert "agents.step_max_s" in error


@pytest.mark.parametrize("hog", HOGS)
def test_others_wait_for_a_hog_no_longer_than_a_step_and_a_little(found, hog):
    """`step_max_s` is 0.2; in a library an agent is given half of that again. What a busy machine does beside it takes
    time and is no work of this process."""
    longest, worked = found["longest"][hog]

    assert worked < 3.0
    assert longest < PAUSE_MAX_S


def test_an_interrupted_agent_may_clean_up(found):
    """Its `finally` runs as for any other exception."""
    assert found["ends"]["cleans up"][2] == "cleaned"


def test_a_version_that_swallows_its_interruption_is_quarantined(found):
    """At once: each interruption is a strike."""
    assert "Version 1.0.0 of the agent 'swallows' held the event loop" in found["swallower"]
    assert ["VersionQuarantined", "swallows"] in [event[:2] for event in found["events"]]


def test_a_version_with_three_strikes_is_quarantined_and_a_better_one_serves(found):
    """Each strike and the quarantine are told; the refusal names the version."""
    events = [event for event in found["events"] if event[1] == "spins"]

    assert events == [*(["StepInterrupted", "spins", n] for n in (1, 2, 3)), ["VersionQuarantined", "spins", 3]]
    assert "Version 1.0.0 of the agent 'spins'" in found["spinner"]
    assert found["better"] == "better"


def test_a_long_execution_of_short_steps_is_left_alone(found):
    """What counts is how long the loop is held at a time, not how long it takes."""
    assert found["patient"] == "completed"
    assert "steady" not in {event[1] for event in found["events"]}


async def test_a_signal_that_is_somebody_elses_is_not_taken_away():
    """pytest-timeout has it here, and keeps it."""
    guard = Guard(AgentsConfig(), clock=SystemClock(), observer=Silent())

    with pytest.raises(ConfigError, match="SIGALRM has a handler"):
        guard.arm()

    assert not guard.is_armed


def test_it_is_armed_in_the_main_thread_alone():
    """Elsewhere no signal arrives, and that is said instead of guarding nothing."""
    errors = []

    async def arm():
        try:
            Guard(AgentsConfig(), clock=SystemClock(), observer=Silent()).arm()
        except ConfigError as error:
            errors.append(error.message)

    thread = threading.Thread(target=lambda: asyncio.run(arm()))
    thread.start()
    thread.join()

    assert "main thread" in errors[0]


LEAVING = """
import asyncio, signal, time
from headrace.agents.config import AgentsConfig
from headrace.agents.running.guard import Guard
from headrace.clock import SystemClock
from headrace.events import Silent

set_timer = signal.setitimer

def set_and_tick(which, seconds, *interval):
    found = set_timer(which, seconds, *interval)
    if seconds == 0:  # the alarm that was already on its way
        guard._tick(signal.SIGALRM, None)
    return found

async def main():
    global guard
    guard = Guard(AgentsConfig(), clock=SystemClock(), observer=Silent())
    guard.arm()
    signal.setitimer = set_and_tick
    guard.disarm()
    time.sleep(0.5)

asyncio.run(main())
print("alive")
"""


def test_an_alarm_on_its_way_does_not_end_a_process_that_disarms():
    """No tick asks for another once the guard is leaving."""
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr
