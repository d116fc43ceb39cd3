"""Several hosts of agents as processes on one database: told what to do, killed, frozen and thawed."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg

PROGRAM = Path(__file__).parent / "faults/agent_node.py"
LEASE_S = 20.0
"""Far longer than a busy machine keeps a living process from renewing it; to give one up there is `end_lease`."""
WAIT_S = 100.0


class Node:
    """One process; its answers and events are read by a thread."""

    def __init__(self, name: str, urls: tuple[str, ...], **config: Any) -> None:
        self.name = name
        options = json.dumps({"node_lease_s": LEASE_S, "queue_poll_s": 0.2, **config})
        self.process = subprocess.Popen(
            [sys.executable, str(PROGRAM), name, options, *urls],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self.events: list[dict[str, Any]] = []
        self._answers: dict[int, dict[str, Any]] = {}
        self._number = 0
        self._news = threading.Condition()
        self._is_ready = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        with self._news:
            assert self._news.wait_for(lambda: self._is_ready, WAIT_S), f"{name} did not come up"

    def ask(self, do: str, **arguments: Any) -> int:
        """Begin something; the number of its answer."""
        assert self.process.stdin is not None
        with self._news:
            self._number += 1
            number = self._number
            self.process.stdin.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        return number

    def answer(self, number: int, *, timeout_s: float = WAIT_S) -> Any:
        """What came of it; an error as {"error": code}."""
        with self._news:
            assert self._news.wait_for(lambda: number in self._answers, timeout_s), f"no answer to {number}"
            answer = self._answers[number]
        return answer.get("result", answer)

    def call(self, do: str, **arguments: Any) -> Any:
        """Do something and wait for what comes of it."""
        return self.answer(self.ask(do, **arguments))

    def told(self, event: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [each for each in self.events if each["event"] == event]

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End it, whatever state it is in."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(WAIT_S)
        assert self.process.stdout is not None
        assert self.process.stdin is not None
        self.process.stdout.close()
        if not self.process.stdin.closed:
            self.process.stdin.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not line.endswith("\n"):
                return  # it was killed in the middle of a word
            said = json.loads(line)
            with self._news:
                if "ready" in said:
                    self._is_ready = True
                elif "event" in said:
                    self.events.append(said)
                else:
                    self._answers[said["id"]] = said
                self._news.notify_all()


@contextmanager
def nodes(urls: tuple[str, ...], count: int, **config: Any) -> Iterator[list[Node]]:
    """Several of them for the length of the block."""
    started: list[Node] = []
    try:
        for index in range(count):
            started.append(Node(f"node-{index}", urls, **config))
        yield started
    finally:
        for node in started:
            node.stop()


def end_lease(url: str, node: Node) -> None:
    """Let its time be over on this shard, as if it had not been heard of for so long."""
    with psycopg.connect(url) as connection:
        connection.execute(
            "UPDATE headrace_nodes SET lease_until = now() - interval '1 s' WHERE starts_with(node, %s)",
            (f"{node.name}-",),
        )


async def until_the_day_lasts() -> None:
    """Return when midnight UTC, after which a day's executions are counted anew, is more than a minute away."""
    while time.time() % 86_400 > 86_400 - 60:
        await asyncio.sleep(0.1)


def wait_for(condition: Any, *, timeout_s: float = WAIT_S) -> Any:
    """What the condition returns as soon as it holds."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.05)
    return found
