"""What `POST /api/v1/agents/{id}/execute` costs, beside a bare ASGI application that answers the same bytes.

    python -m benchmarks.scenario.execute_http [--rounds 3] [--seconds 4] [--connections 64] [--shards 0] [--json FILE]

One worker of `headrace up` with its agents in memory (or on embedded Postgres, with `--shards`), a trusted agent that
returns its input, a body of 36 bytes, `wrk` with one thread on the same machine. *floor* is the same server, uvicorn
with uvloop and httptools, and an application of six lines: it reads the body and sends what the worker answered, so
nothing that an application does can be cheaper. CPU is user and system time of the serving process alone, from
/proc/PID/stat, by request; it hardly moves when the machine is busy, as the rate does. Rounds alternate between rows.

Needs `wrk` (Debian package `wrk`) and Linux.
"""

import argparse
import base64
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

AGENT = "async def Agent(input, context):\n    return input"
BODY = b'{"input": {"text": "hello", "n": 3}}'
SCRIPT = """
wrk.method = "POST"
wrk.body = '%s'
wrk.headers["Content-Type"] = "application/json"
done = function(summary, latency)
  io.write(string.format("FIGURES %%d %%d %%f %%f %%f\\n", summary.requests, summary.duration,
    latency:percentile(50) / 1000, latency:percentile(99) / 1000, latency.max / 1000))
end
"""
BARE = """
import os
import uvicorn

ANSWER = os.environ["ANSWER"].encode()
HEADERS = [(b"content-length", str(len(ANSWER)).encode()), (b"x-content-type-options", b"nosniff"),
           (b"content-type", b"application/json")]

async def app(scope, receive, send):
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})

uvicorn.run(app, port=int(os.environ["PORT"]), loop="uvloop", http="httptools", lifespan="off", access_log=False,
            log_config=None, server_header=False, timeout_keep_alive=75)
"""
PATH = "/api/v1/agents/a/execute"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(url: str, body: bytes) -> bytes:
    """The answer, once the server is there."""
    asked = urllib.request.Request(url, body, {"content-type": "application/json"})
    give_up_at = time.monotonic() + 60
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=5) as answer:
                return bytes(answer.read())
        except OSError as error:
            if isinstance(error, urllib.error.HTTPError) or time.monotonic() > give_up_at:
                raise
            time.sleep(0.1)


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def child_named(parent: int, part: str) -> int:
    """The child of a process whose command line has this part."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_child = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent
            if is_child and part.encode() in (entry / "cmdline").read_bytes():
                return int(entry.name)
    raise RuntimeError(f"{part} is not among the children of {parent}")


@contextlib.contextmanager
def started(command: list[str], **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, env={**os.environ, **variables}, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextlib.contextmanager
def headrace(shards: int, folder: Path) -> Iterator[tuple[str, int]]:
    """A worker with the agent deployed: its URL and its pid."""
    port = free_port()
    config = folder / "headrace.toml"
    config.write_text(f"[embedded]\nredis = false\nshards = {shards}\n")
    command = [sys.executable, "-m", "headrace", "up", "--config", str(config), "--workers", "1"]
    with started([*command, "--port", str(port), "--directory", str(folder / "data")]) as process:
        url = f"http://127.0.0.1:{port}"
        deployment = {
            "agent_metadata": {"agent_id": "a", "name": "a", "version": "1.0.0"},
            "agent_code": {"source_code": base64.b64encode(AGENT.encode()).decode()},
        }
        call(f"{url}/api/v1/agents/deploy", json.dumps(deployment).encode())
        yield url, child_named(process.pid, "headrace.server.worker")


@contextlib.contextmanager
def bare(answer: bytes) -> Iterator[tuple[str, int]]:
    port = free_port()
    with started([sys.executable, "-c", BARE], PORT=str(port), ANSWER=answer.decode()) as process:
        yield f"http://127.0.0.1:{port}", process.pid


def driven(url: str, pid: int, script: Path, *, seconds: int, connections: int) -> dict[str, float]:
    """What wrk saw and what the server used."""
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "-s", str(script), url + PATH]
    before = cpu_s(pid)
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = cpu_s(pid) - before
    found = re.search(r"FIGURES (\d+) (\d+) ([\d.]+) ([\d.]+) ([\d.]+)", text)
    if found is None or "Non-2xx" in text:
        raise RuntimeError(f"{url} answered with errors, or wrk printed no figures:\n{text}")
    requests = int(found[1])
    return {
        "cpu_us": used / requests * 1e6,
        "per_s": requests / (int(found[2]) / 1e6),
        "p50_ms": float(found[3]),
        "p99_ms": float(found[4]),
        "max_ms": float(found[5]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--shards", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    rows: dict[str, list[dict[str, float]]] = {"floor": [], "execute": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        script = folder / "post.lua"
        script.write_text(SCRIPT % BODY.decode())
        with headrace(options.shards, folder) as service:
            answer = call(service[0] + PATH, BODY)
            with bare(answer) as floor:
                call(floor[0] + PATH, BODY)
                for _ in range(options.rounds):
                    for row, (url, pid) in (("floor", floor), ("execute", service)):
                        figures = driven(url, pid, script, seconds=options.seconds, connections=options.connections)
                        rows[row].append(figures)
    medians: dict[str, dict[str, Any]] = {}
    print("| row | CPU of the server, us a request | a second of CPU | requests/s seen | p50 / p99 / max ms |")
    print("|---|---|---|---|---|")
    for row, rounds in rows.items():
        medians[row] = each = {key: statistics.median(figures[key] for figures in rounds) for key in rounds[0]}
        low, high = min(figures["cpu_us"] for figures in rounds), max(figures["cpu_us"] for figures in rounds)
        print(
            f"| {row} | {each['cpu_us']:.1f} ({low:.1f} to {high:.1f}) | {1e6 / each['cpu_us']:,.0f}"
            f" | {each['per_s']:,.0f} | {each['p50_ms']:.1f} / {each['p99_ms']:.1f} / {each['max_ms']:.1f} |"
        )
    if options.json:
        options.json.write_text(json.dumps(medians, indent=1))


if __name__ == "__main__":
    main()
