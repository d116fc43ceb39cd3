"""A real `headrace up` in a process of its own, and a lean client to put it under load."""

import asyncio
import base64
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

START_TIMEOUT_S = 100.0


@dataclass
class Service:
    """One running service."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    family: list[psutil.Process] | None = None
    """What it had started when it was told to stop; None: it was not."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.url.rsplit(":", 1)[1])

    def children(self) -> dict[str, int]:
        """Process ids by the supervisor's names, from its log: the newest of each."""
        return {line["name"]: line["pid"] for line in self.told("ProcessStarted")}

    def told(self, event: str, name: str | None = None) -> list[dict[str, Any]]:
        """The log lines of one kind, of one process or of all."""
        whole, _, _ = self.log.read_text().rpartition("\n")  # what follows is being written
        lines = [json.loads(line) for line in whole.split("\n") if line.startswith("{")]
        return [line for line in lines if line.get("event") == event and name in {None, line.get("name")}]

    def workers(self) -> set[int]:
        """Process ids of the workers that live."""
        return workers_of(self.process.pid)

    def kill(self, name: str) -> int:
        """kill -9 one of its processes; the killed pid."""
        pid = self.children()[name]
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self) -> None:
        """SIGTERM, and only one: who waits for the end of it is `running`."""
        self.family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGTERM)

    def wait_for_restart(self, name: str, killed: int, *, timeout_s: float = 60.0) -> int:
        """The pid of the process that took the killed one's place."""
        deadline = time.monotonic() + timeout_s
        while (pid := self.children()[name]) == killed:
            assert time.monotonic() < deadline, f"{name} was not restarted:\n{self.log.read_text()[-2000:]}"
            time.sleep(0.02)
        return pid

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request: its status and its JSON."""
        return asyncio.run(one_call(self.port, method, path, body))

    def deploy(self, agent_id: str, source: str, version: str = "1.0.0") -> None:
        """Put an agent into service."""
        status, answer = self.call("POST", "/api/v1/agents/deploy", deploy_body(agent_id, source, version))
        assert status == 201, answer


def workers_of(supervisor_pid: int) -> set[int]:
    """Process ids of the supervisor's living workers."""
    found = set()
    for child in psutil.Process(supervisor_pid).children():
        with suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
            if "headrace.server.worker" in child.cmdline():
                found.add(child.pid)
    return found


def wait_until(condition: Callable[[], object], *, timeout_s: float = 60.0) -> None:
    """Return when the condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.05)


def deploy_body(agent_id: str, source: str, version: str = "1.0.0") -> dict[str, Any]:
    """The request that deploys a source."""
    return {
        "agent_metadata": {"agent_id": agent_id, "version": version},
        "agent_code": {"source_code": base64.b64encode(source.encode()).decode()},
    }


@contextmanager
def running(directory: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Service]:
    """`headrace up` on a free port for the length of the block; it must stop cleanly and leave no process."""
    log = directory / "up.log"
    directory.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "headrace",
        "up",
        "--port",
        "0",
        "--directory",
        str(directory / "data"),
        *arguments,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
            env={**os.environ, "HEADRACE_LOG_FORMAT": "json", **(environment or {})},
        )
    try:
        service = Service(process, _url_of(process, log), log)
        yield service
        if service.family is None:
            if process.poll() is not None:
                assert process.returncode == -signal.SIGKILL, f"it ended by itself:\n{log.read_text()[-3000:]}"
                return
            service.stop()
        assert process.wait(60) == 0, log.read_text()[-3000:]
        _, alive = psutil.wait_procs(service.family or (), timeout=30)
        assert alive == []
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _url_of(process: "subprocess.Popen[str]", log: Path) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        if match := re.search(r"headrace is up: (\S+)", line):
            return match[1]
        assert line or process.poll() is None, f"it did not come up:\n{log.read_text()[-3000:]}"
    raise AssertionError(f"it did not come up in time:\n{log.read_text()[-3000:]}")


async def one_call(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """One request on a connection of its own."""
    connection = await Connection.open(port)
    try:
        return await connection.call(method, path, body)
    finally:
        await connection.close()


class Connection:
    """A keep-alive HTTP/1.1 connection that reads whole JSON answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, port: int) -> "Connection":
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    async def close(self) -> None:
        self._writer.close()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Send a request and read its answer; ConnectionError when the other side went away."""
        data = b"" if body is None else json.dumps(body).encode()
        kind = "" if body is None else "content-type: application/json\r\n"
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\n{kind}content-length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        try:
            answer = await self._reader.readuntil(b"\r\n\r\n")
            match = re.search(rb"content-length: (\d+)", answer)
            assert match is not None, answer
            text = await self._reader.readexactly(int(match[1]))
        except asyncio.IncompleteReadError as error:
            raise ConnectionResetError("the server closed the connection") from error
        return int(answer.split(b" ", 2)[1]), json.loads(text)


@dataclass
class Load:
    """What came of a load."""

    acknowledged: list[str] = field(default_factory=list)
    """Ids of executions that were answered as finished."""
    problems: list[str] = field(default_factory=list)
    """The code of each problem+json, or the name of each connection error."""
    due: int = 0
    """How many requests the rate asked for."""

    @property
    def done(self) -> int:
        """How many requests have come to an end."""
        return len(self.acknowledged) + len(self.problems)

    def failed(self, reason: str) -> None:
        """Note a request that was not answered with a result."""
        self.problems.append(reason)


async def execute_steadily(
    port: int, agent_id: str, *, rate: float, stop: asyncio.Event, connections: int = 16
) -> Load:
    """Execute an agent at a steady rate on several connections until told to stop; what was due by then is sent.

    At most a second's worth is in arrears, so that a machine that is too slow for the rate is not buried under it.
    """
    load = Load()
    turns, path = asyncio.Semaphore(0), f"/api/v1/agents/{agent_id}/execute"
    async with asyncio.TaskGroup() as tasks:
        clients = [tasks.create_task(_client(port, path, load, turns)) for _ in range(connections)]
        await _pace(rate, load, turns, stop)
        for client in clients:
            client.cancel()
    return load


async def _pace(rate: float, load: Load, turns: asyncio.Semaphore, stop: asyncio.Event) -> None:
    """Give out turns as they fall due; return when the last of them has come to its end."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    while not stop.is_set():
        due = min(int((loop.time() - started) * rate), load.done + int(rate))
        for _ in range(due - load.due):
            turns.release()
        load.due = due
        await asyncio.sleep(0.005)
    while load.done < load.due:
        await asyncio.sleep(0.005)


async def _client(port: int, path: str, load: Load, turns: asyncio.Semaphore) -> None:
    """Send a request for each turn, for ever."""
    connection = None
    try:
        while True:
            await turns.acquire()
            try:
                connection = connection or await Connection.open(port)
                async with asyncio.timeout(30):
                    status, answer = await connection.call("POST", path, {"input": {"n": 1}})
            except (ConnectionError, TimeoutError) as error:
                load.failed(type(error).__name__)
                if connection is not None:
                    await connection.close()
                connection = None
                continue
            if status == 200:
                load.acknowledged.append(answer["execution_id"])
            else:
                load.failed(answer["code"])
    finally:
        if connection is not None:
            await connection.close()
