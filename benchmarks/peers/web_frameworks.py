"""Which web framework carries our two hottest endpoints at the lowest cost?

One uvicorn worker (uvloop, httptools) per framework, driven by `wrk` from the same machine: `GET
/api/v1/agents/{id}/status` and `POST /api/v1/agents/{id}/execute` with a JSON body that is validated and answered as
JSON. The handlers do nothing else, so the difference between two rows is the framework. Rounds alternate between
frameworks, so that a noisy neighbour hits all of them.

    python -m benchmarks.peers.web_frameworks [--rounds 3] [--seconds 4]

Needs `wrk` (Debian package `wrk`) and the packages of `benchmarks/peers/requirements.txt`.
"""

import argparse
import importlib.metadata
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import msgspec

FRAMEWORKS = ("raw", "starlette_asgi", "starlette", "blacksheep", "litestar", "fastapi")


class ExecuteRequest(msgspec.Struct, forbid_unknown_fields=True):
    input: dict[str, Any]
    execution_id: str | None = None
    timeout: float | None = None


class ExecuteAnswer(msgspec.Struct):
    execution_id: str
    status: str
    output: dict[str, Any]


class Status(msgspec.Struct):
    agent_id: str
    status: str
    version: str
    executions: int


STATUS = Status("a", "active", "1.0.0", 12)
_decoder = msgspec.json.Decoder(ExecuteRequest)
_encode = msgspec.json.Encoder().encode


def raw() -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        if scope["method"] == "POST":
            while True:
                message = await receive()
                body += message["body"]
                if not message.get("more_body"):
                    break
            request = _decoder.decode(body)
            answer = _encode(ExecuteAnswer("x", "completed", request.input))
        else:
            answer = _encode(STATUS)
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(answer)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    return app


def starlette() -> Any:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    async def status(request: Request) -> Response:
        return Response(_encode(STATUS), media_type="application/json")

    async def execute(request: Request) -> Response:
        body = _decoder.decode(await request.body())
        return Response(_encode(ExecuteAnswer("x", "completed", body.input)), media_type="application/json")

    return Starlette(
        routes=[
            Route("/api/v1/agents/{agent_id}/status", status),
            Route("/api/v1/agents/{agent_id}/execute", execute, methods=["POST"]),
        ]
    )


def starlette_asgi() -> Any:
    """Starlette's router alone: endpoints are ASGI callables, so no Request and no Response object is made."""
    from starlette.routing import Route, Router

    plain = raw()

    class Endpoint:
        """A class instance, because Starlette wraps plain functions in its Request and Response."""

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await plain(scope, receive, send)

    return Router(
        routes=[
            Route("/api/v1/agents/{agent_id}/status", Endpoint()),
            Route("/api/v1/agents/{agent_id}/execute", Endpoint(), methods=["POST"]),
        ]
    )


def blacksheep() -> Any:
    from blacksheep import Application, Content, Request, Response

    app = Application(show_error_details=False)

    @app.router.get("/api/v1/agents/{agent_id}/status")
    async def status(request: Request) -> Response:
        return Response(200, content=Content(b"application/json", _encode(STATUS)))

    @app.router.post("/api/v1/agents/{agent_id}/execute")
    async def execute(request: Request) -> Response:
        body = _decoder.decode(await request.read())
        return Response(
            200, content=Content(b"application/json", _encode(ExecuteAnswer("x", "completed", body.input)))
        )

    return app


def litestar() -> Any:
    from litestar import Litestar, get, post

    @get("/api/v1/agents/{agent_id:str}/status")
    async def status(agent_id: str) -> Status:
        return STATUS

    @post("/api/v1/agents/{agent_id:str}/execute", status_code=200)
    async def execute(agent_id: str, data: ExecuteRequest) -> ExecuteAnswer:
        return ExecuteAnswer("x", "completed", data.input)

    return Litestar([status, execute], openapi_config=None)


def fastapi() -> Any:
    import pydantic
    from fastapi import FastAPI

    class Body(pydantic.BaseModel):
        input: dict[str, Any]
        execution_id: str | None = None
        timeout: float | None = None

    app = FastAPI()

    async def status(agent_id: str) -> dict[str, Any]:
        return {"agent_id": "a", "status": "active", "version": "1.0.0", "executions": 12}

    async def execute(agent_id: str, body: Body) -> dict[str, Any]:
        return {"execution_id": "x", "status": "completed", "output": body.input}

    execute.__annotations__["body"] = Body
    app.get("/api/v1/agents/{agent_id}/status")(status)
    app.post("/api/v1/agents/{agent_id}/execute")(execute)
    return app


def application() -> Any:
    """The factory that uvicorn calls in the server process."""
    return globals()[os.environ["FRAMEWORK"]]()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wrk(url: str, *, seconds: int, script: str | None) -> float:
    command = ["wrk", "-t1", "-c64", f"-d{seconds}s", url]
    if script:
        command[1:1] = ["-s", script]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    if "Non-2xx" in answer:
        raise RuntimeError(f"{url} answered with errors:\n{answer}")
    match = re.search(r"Requests/sec:\s+([\d.]+)", answer)
    if match is None:
        raise RuntimeError(f"wrk printed no rate:\n{answer}")
    return float(match[1])


def _round(name: str, seconds: int, script: str) -> tuple[float, float]:
    port = _free_port()
    command = [sys.executable, "-m", "uvicorn", "--factory", f"{__spec__.name}:application", "--port", str(port)]
    command += ["--no-access-log", "--log-level", "error"]
    server = subprocess.Popen(command, env={**os.environ, "FRAMEWORK": name})
    try:
        base = f"http://127.0.0.1:{port}/api/v1/agents/a"
        for _ in range(100):
            try:
                urllib.request.urlopen(f"{base}/status", timeout=1).read()
                break
            except OSError:
                time.sleep(0.1)
        read = _wrk(f"{base}/status", seconds=seconds, script=None)
        return read, _wrk(f"{base}/execute", seconds=seconds, script=script)
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=4)
    options = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "post.lua")
        script.write_text(
            'wrk.method = "POST"\nwrk.body = \'{"input": {"text": "hello", "n": 3}}\'\n'
            'wrk.headers["Content-Type"] = "application/json"\n'
        )
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in FRAMEWORKS}
        for _ in range(options.rounds):
            for name in FRAMEWORKS:
                rates[name].append(_round(name, options.seconds, str(script)))
    print(f"{'framework':<15} {'version':<10} {'GET status/s':>24} {'POST execute/s':>24}")
    for name, rounds in rates.items():
        version = "-" if name == "raw" else importlib.metadata.version(name.removesuffix("_asgi"))
        cells = []
        for column in (0, 1):
            values = [row[column] for row in rounds]
            cells.append(f"{statistics.median(values):>9,.0f} ({min(values):,.0f}-{max(values):,.0f})")
        print(f"{name:<15} {version:<10} {cells[0]:>24} {cells[1]:>24}")


if __name__ == "__main__":
    main()
