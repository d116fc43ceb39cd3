"""A stand-in for `headrace up`: the paths that benchmarks call, over raw ASGI, with just enough behaviour to measure.

    python -m tests.unit.cli.bench.stand_in up --directory DIR --port PORT --workers N

It takes the arguments of `headrace up`, says that it is up in the same words and stops at SIGTERM.
"""

import argparse
import base64
import os
import re
from typing import Any

import msgspec
import uvicorn

AGENT_PATH = re.compile(r"/api/v1/agents/([\w-]+)/(status|execute)")

agents: dict[str, Any] = {}
"""Instances of what was deployed, by agent id."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    status, answer = await respond(scope["method"], scope["path"], await body(receive))
    content = msgspec.json.encode(answer)
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


async def body(receive: Any) -> bytes:
    content, more = b"", True
    while more:
        message = await receive()
        content += message["body"]
        more = message.get("more_body", False)
    return content


async def respond(method: str, path: str, content: bytes) -> tuple[int, dict[str, Any]]:
    if path == "/api/v1/system/health":
        return 200, {"status": "ok", "workers": [{"pid": os.getpid()}]}
    if (method, path) == ("POST", "/api/v1/agents/deploy"):
        return 201, deploy(msgspec.json.decode(content))
    matched = AGENT_PATH.fullmatch(path)
    if matched is None or matched[1] not in agents:
        return 404, {"title": "not found", "detail": path}
    if matched[2] == "status":
        return 200, {"agent_id": matched[1], "status": "active"}
    output = await agents[matched[1]].execute(msgspec.json.decode(content)["input"], None)
    return 200, {"agent_id": matched[1], "status": "completed", "output": output}


def deploy(request: dict[str, Any]) -> dict[str, Any]:
    agent_id = request["agent_metadata"]["agent_id"]
    namespace: dict[str, Any] = {}
    exec(compile(base64.b64decode(request["agent_code"]["source_code"]), agent_id, "exec"), namespace)
    agents[agent_id] = namespace[request["agent_code"]["entrypoint"]]()
    return {"agent_id": agent_id, "status": "deployed"}


class Announcing(uvicorn.Server):
    """Says where it listens, as `headrace up` does."""

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        print(f"headrace is up: http://127.0.0.1:{port}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("verb", choices=["up"])
    parser.add_argument("--directory", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    arguments = parser.parse_args()
    config = uvicorn.Config(
        app, port=arguments.port, loop="uvloop", http="httptools", lifespan="off", access_log=False
    )
    Announcing(config).run()


if __name__ == "__main__":
    main()
