"""The README's example is a program that runs."""

import re
import sys
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse

README = Path(__file__).parents[2] / "README.md"


class FastAPI(Starlette):
    """What the example uses of FastAPI, on the framework that it is made of: path parameters as arguments."""

    def get(self, path):
        def decorate(function):
            async def endpoint(request):
                return JSONResponse(await function(user_id=int(request.path_params["user_id"])))

            self.add_route(path, endpoint)
            return function

        return decorate


@pytest.fixture
def fastapi(monkeypatch):
    """A module `fastapi` to import from."""
    module = ModuleType("fastapi")
    module.FastAPI = FastAPI
    monkeypatch.setitem(sys.modules, "fastapi", module)


@pytest.mark.usefixtures("fastapi")
async def test_the_example_serves_from_its_cache():
    """It starts, answers, and asks the slow loader once; a Redis that is away does not matter."""
    (text,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    asked = []

    async def load_user_from_somewhere_slow(user_id):
        asked.append(user_id)
        return {"id": user_id}

    names = {"load_user_from_somewhere_slow": load_user_from_somewhere_slow}
    exec(compile(text.replace("localhost:6379", "127.0.0.1:1"), str(README), "exec"), names)
    app = names["app"]

    async with (
        app.router.lifespan_context(app) as state,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client,
    ):
        answers = [await client.get("/users/7") for _ in range(2)]

    assert state is None, "what a lifespan yields must be a mapping: Starlette keeps it as the application's state"
    assert [answer.json() for answer in answers] == [{"id": 7}, {"id": 7}]
    assert asked == [7]
