"""The supervisor with children that fail in every way: what it repairs, when it gives up, in which order it stops."""

import asyncio
import errno
import os
import signal
import subprocess

import pytest

from headrace.app import ask_for_workers
from headrace.config import Config, EmbeddedConfig, ServerConfig
from headrace.errors import BackendError, ConfigError
from headrace.events import ProcessExited, ProcessFailed, ProcessStarted
from headrace.server import controller
from headrace.server.assignment import Assignment
from headrace.server.supervisor import Supervisor


class Part:
    """A child whose process sleeps. `faults` says what a step raises, in order; None: this time nothing."""

    def __init__(self, name, journal, **faults):
        self.name = name
        self.processes = []
        self.hold = None
        """While set, the process is not stopped: it drains."""
        self._journal = journal
        self._faults = {step: iter(errors) for step, errors in faults.items()}

    def _step(self, step):
        self._journal.append((self.name, step))
        error = next(self._faults.get(step, iter(())), None)
        if error is not None:
            raise error

    async def prepare(self):
        self._step("prepare")

    def spawn(self):
        self._step("spawn")
        self.processes.append(subprocess.Popen(["/bin/sleep", "60"]))
        return self.processes[-1]

    async def wait_until_ready(self, process):
        self._step("ready")

    async def stop(self, process):
        self._step("stop")
        if self.hold is not None:
            await self.hold.wait()
        process.kill()
        process.wait()
        self._journal.append((self.name, "stopped"))

    def silent_s(self):
        return 0.0

    def living(self):
        return [process for process in self.processes if process.poll() is None]


class Small(Supervisor):
    """A supervisor of parts instead of servers."""

    def __init__(self, directory, *parts, workers=1):
        self.journal = []
        self.events = []
        self.parts = {part.name: part for part in parts}
        for part in parts:
            part._journal = self.journal
        config = Config(
            server=ServerConfig(port=0, workers=workers), embedded=EmbeddedConfig(directory=directory / "data")
        )
        super().__init__(config, observer=self)

    def on(self, event):
        self.events.append(event)

    def told(self, kind):
        return [event for event in self.events if isinstance(event, kind)]

    def serving(self):
        return sorted(name for name, part in self.parts.items() if name.startswith("worker-") and part.living())

    def _choose_embedded(self):
        """None: their place is taken by the parts that are no workers."""

    def _controller(self):
        return self.parts.setdefault("controller", Part("controller", self.journal))

    def _worker(self, index):
        return self.parts.setdefault(f"worker-{index}", Part(f"worker-{index}", self.journal))

    async def _start(self):
        if "redis" in self.parts:
            await self._all_ready([self.parts["redis"]])
        await super()._start()


async def until(condition):
    """Return when the condition holds."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


def run(supervisor, while_up, left=list):
    """Run the supervisor, and `while_up` from the moment that it is up; then end it by SIGTERM. `left` may live on."""

    async def whole():
        up = asyncio.Event()
        running = asyncio.create_task(supervisor.run(lambda _: up.set()))
        arrived = asyncio.create_task(up.wait())
        try:
            await asyncio.wait({running, arrived}, return_when=asyncio.FIRST_COMPLETED)
            if up.is_set():
                await while_up()
                if not running.done():
                    os.kill(os.getpid(), signal.SIGTERM)
            await running
        finally:
            arrived.cancel()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    try:
        asyncio.run(whole())
    finally:
        living, expected = [process for part in supervisor.parts.values() for process in part.living()], left()
        for process in living:
            process.kill()
            process.wait()
        assert living == expected


TOO_MANY = OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize("step", ["prepare", "spawn", "ready"])
@pytest.mark.parametrize("error", [TOO_MANY, RuntimeError("can't start new thread"), BackendError("It is away.")])
def test_what_passes_by_itself_is_waited_for(tmp_path, step, error):
    """A child that cannot be started for a while is told, tried again, and kept; stopping works as ever."""
    worker = Part("worker-0", [], **{step: [None, error, error]})
    supervisor = Small(tmp_path, worker)

    async def kill():
        worker.processes[0].kill()
        await until(lambda: supervisor.journal.count(("worker-0", "ready")) >= (4 if step == "ready" else 2))

    run(supervisor, kill)
    failures = supervisor.told(ProcessFailed)
    assert [(failure.name, failure.reason) for failure in failures] == [("worker-0", str(error))] * 2
    assert failures[0].restart_in_s < failures[1].restart_in_s
    assert supervisor.told(ProcessExited)[0].exit_code == -signal.SIGKILL


def test_a_child_that_cannot_be_stopped_gets_no_second_beside_it(tmp_path):
    """The next try begins with ending what is left of the last one."""
    worker = Part("worker-0", [], ready=[None, TOO_MANY], stop=[None, TOO_MANY])
    supervisor = Small(tmp_path, worker)
    most = []

    async def kill():
        worker.processes[0].kill()

        def is_back():
            most.append(len(worker.living()))
            return supervisor.journal.count(("worker-0", "ready")) >= 3

        await until(is_back)

    run(supervisor, kill)
    assert max(most) == 1
    assert len(supervisor.told(ProcessFailed)) >= 1


def test_a_stop_that_fails_does_not_keep_the_others_from_being_stopped(tmp_path):
    """It is told, and the order stays: workers, the controller, the servers."""
    worker, redis = Part("worker-0", []), Part("redis", [])
    supervisor = Small(tmp_path, worker, redis)
    worker._faults["stop"] = iter([TOO_MANY])

    async def nothing():
        return None

    run(supervisor, nothing, left=worker.living)
    ends = [name for name, step in supervisor.journal if step == "stopped"]
    assert ends == ["controller", "redis"]
    (failure,) = supervisor.told(ProcessFailed)
    assert (failure.name, failure.restart_in_s) == ("worker-0", None)


def test_a_bug_in_keeping_ends_the_service_in_order(tmp_path):
    """What nobody foresaw is not swallowed: the others are stopped, and it is raised."""
    redis = Part("redis", [], prepare=[None, KeyError("unforeseen")])
    supervisor = Small(tmp_path, redis)

    async def kill():
        redis.processes[0].kill()
        await until(supervisor._stopping.is_set)

    with pytest.raises(KeyError, match="unforeseen"):
        run(supervisor, kill)
    assert [name for name, step in supervisor.journal if step == "stopped"] == ["redis", "worker-0", "controller"]


@pytest.mark.parametrize(("error", "raised"), [(TOO_MANY, BackendError), (ConfigError("It is wrong."), ConfigError)])
def test_what_keeps_it_from_coming_up_is_raised(tmp_path, error, raised):
    """The first start is not tried again: whoever waits for it is told why."""
    supervisor = Small(tmp_path, Part("worker-0", [], spawn=[error]))

    with pytest.raises(raised, match=r"Too many open files|It is wrong"):
        run(supervisor, None)
    assert supervisor.journal.count(("worker-0", "spawn")) == 1


def test_a_worker_that_leaves_is_stopped_before_the_servers(tmp_path):
    """One that still drains when the service stops is waited for like those that serve."""
    redis, newest = Part("redis", []), Part("worker-1", [])
    supervisor = Small(tmp_path, redis, newest, workers=2)

    async def leave():
        newest.hold = asyncio.Event()
        supervisor.remove_worker()
        await until(lambda: ("worker-1", "stop") in supervisor.journal)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: ("worker-0", "stopped") in supervisor.journal)
        assert redis.living()
        newest.hold.set()

    run(supervisor, leave)
    ends = [name for name, step in supervisor.journal if step == "stopped"]
    assert ends == ["worker-0", "worker-1", "controller", "redis"]


def test_workers_are_scaled(tmp_path):
    """To the number that was asked for; a name is free again only when its worker has ended."""
    newest = Part("worker-1", [])
    supervisor = Small(tmp_path, newest, workers=2)

    async def scale():
        newest.hold = asyncio.Event()
        supervisor.remove_worker()
        supervisor.add_worker()
        await until(lambda: supervisor.serving() == ["worker-0", "worker-1", "worker-2"])
        newest.hold.set()
        await until(lambda: supervisor.serving() == ["worker-0", "worker-2"])
        supervisor.remove_worker()
        supervisor.remove_worker()
        supervisor.remove_worker()
        await until(lambda: supervisor.serving() == ["worker-0"])

    run(supervisor, scale)


def test_a_number_of_workers_is_asked_for_by_a_file_and_a_signal(tmp_path):
    """The signal alone asks for nothing; what is no number neither."""
    supervisor = Small(tmp_path)
    directory = tmp_path / "data" / "headrace-run"

    async def ask():
        os.kill(os.getpid(), signal.SIGUSR1)
        (directory / "workers").write_text("many")
        os.kill(os.getpid(), signal.SIGUSR1)
        ask_for_workers(directory, 6)
        os.kill(os.getpid(), signal.SIGUSR1)
        await until(lambda: len(supervisor.serving()) == 6)

    run(supervisor, ask)
    assert len(supervisor.told(ProcessStarted)) == 7


def test_a_controller_that_watches_no_more_ends(tmp_path, monkeypatch):
    """Only so can it be started anew."""
    read_fd, write_fd = os.pipe()
    assignment = Assignment(config_path=None, run_directory=str(tmp_path), supervisor_pid=1, alive_fd=write_fd)
    reports = []

    async def broken(_monitor):
        raise RuntimeError("can't start new thread")

    async def watch():
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reports.append(context["message"]))
        async with asyncio.timeout(20):
            await controller.watch(assignment, Config())

    monkeypatch.setattr("headrace.monitor.Monitor.run", broken)
    try:
        with pytest.raises(RuntimeError, match="new thread"):
            asyncio.run(watch())
    finally:
        os.close(read_fd)
        os.close(write_fd)
    assert reports == ["the monitor stopped watching"]
