"""The guides are programs that run: their Python blocks, in order, in one module a guide, on a real Redis.

A block is what would be typed into `python -m asyncio`, so it may await; one that does not await runs in a thread, as
in a program without an event loop. Tests that a block defines are called with the fixtures that they name.
"""

import ast
import asyncio
import dataclasses
import importlib
import inspect
import re
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from headrace.cache import Cache, CachePolicy, RemoteConfig, Strategy, SyncCache
from headrace.cache.integrations.settings import close_shared
from headrace.database import DatabaseConfig
from tests.redis_servers import RedisServer, free_port

ROOT = Path(__file__).parents[2]
GUIDES = sorted((ROOT / "docs/guides").glob("*.md"))
LINES_MAX = 110
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
TEST_NAME = re.compile(r"`(tests/[\w/]+\.py)::(\w+)(?:\[[\w-]+\])?`")
FRAMEWORK = re.compile(r"^from ((?:agno|langgraph|pydantic_ai)[\w.]*) import", re.MULTILINE)
READERS_REDIS = re.compile(r"\b(localhost|cache):6379\b")
"""Where the Redis of a guide's reader listens."""
REDIS_S = 5.0
DATABASE_S = 20.0
DEFAULT_LIMIT = re.compile(r"\b((?:connect_)?timeout)=0\.5\b")
"""The limits that a Redis has by default, which a guide may spell out."""


def named(path: Path) -> str:
    return path.stem


def blocks(guide: Path, address: str) -> Iterator[tuple[int, str]]:
    """Each Python block with the line before it, and the reader's Redis replaced by the one of this test.

    That one may be slow: it is given longer than by default. Where a guide breaks the network it says its own limits.
    """
    text = guide.read_text()
    for found in BLOCK.finditer(text):
        source = DEFAULT_LIMIT.sub(rf"\1={REDIS_S}", READERS_REDIS.sub(address, found[1]))
        yield text.count("\n", 0, found.start(1)), source


@pytest.fixture
def redis_address() -> Iterator[str]:
    """Where a Redis of this test's own listens."""
    with tempfile.TemporaryDirectory(prefix="hr") as directory:
        server = RedisServer(Path(directory) / "redis", port=free_port()).start()
        yield f"127.0.0.1:{server.port}"
        server.stop()


@pytest.fixture
def patience(monkeypatch) -> None:
    """A Redis or a Postgres that is only slow is not taken for one that is away."""
    defaults = RemoteConfig.__init__.__kwdefaults__
    for name in ("timeout", "connect_timeout"):
        assert defaults[name] == 0.5, "as in DEFAULT_LIMIT"
        monkeypatch.setitem(defaults, name, REDIS_S)
    monkeypatch.setitem(DatabaseConfig.__init__.__kwdefaults__, "acquire_timeout_s", DATABASE_S)


@pytest.fixture
async def module(monkeypatch, patience, tmp_path: Path) -> AsyncIterator[ModuleType]:
    """What the blocks of a guide fill, in a directory of its own; the caches in it are closed in the end."""
    module = ModuleType("guide")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # where msgspec looks for the names in annotations
    monkeypatch.chdir(tmp_path)
    yield module
    try:
        for value in vars(module).values():
            if isinstance(value, SyncCache):
                await asyncio.to_thread(value.close)
            elif isinstance(value, Cache):
                await value.close()
    finally:
        await asyncio.to_thread(close_shared)


async def run(source: str, guide: Path, line: int, module: ModuleType) -> None:
    """Run a block; a traceback shows the lines of the guide itself."""
    code = compile("\n" * line + source, str(guide), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        await eval(code, vars(module))
    else:
        await asyncio.to_thread(exec, code, vars(module))


@pytest.fixture
def fixtures(guide: Path, request: pytest.FixtureRequest) -> dict[str, object]:
    """What the tests that a guide shows ask for by name."""
    functions = [
        node
        for _, source in blocks(guide, "")
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name.startswith("test_")
    ]
    names = {argument.arg for function in functions for argument in function.args.args}
    return {name: request.getfixturevalue(name) for name in names}


async def call_tests(module: ModuleType, fixtures: dict[str, object]) -> None:
    """Call the tests that the guide shows."""
    for name, function in list(vars(module).items()):
        if name.startswith("test_") and inspect.isfunction(function):
            arguments = {name: fixtures[name] for name in inspect.signature(function).parameters}
            if inspect.iscoroutinefunction(function):
                await function(**arguments)
            else:
                await asyncio.to_thread(function, **arguments)


@pytest.mark.parametrize("guide", [guide for guide in GUIDES if BLOCK.search(guide.read_text())], ids=named)
async def test_the_blocks_of_a_guide_run(guide, redis_address, module, fixtures):
    """Each Python block of a guide runs after those before it, and what it asserts is true."""
    for name in FRAMEWORK.findall(guide.read_text()):
        # It may take longer than an agent may take to load, but only once in a process.
        await asyncio.to_thread(importlib.import_module, name)
    for line, source in blocks(guide, redis_address):
        await run(source, guide, line, module)
    await call_tests(module, fixtures)


async def test_a_block_that_is_wrong_is_noticed(redis_address, module, tmp_path):
    """The runner is able to fail: at an assertion after an await, and at one in a block without any."""
    guide = tmp_path / "wrong.md"
    guide.write_text(
        "# Wrong\n\n```python\nimport asyncio\n\nawait asyncio.sleep(0)\nassert False, 'awaited'\n```\n"
        "\n```python\nassert 'localhost:6379' == 'nowhere', 'localhost:6379'\n```\n"
    )
    (first, awaiting), (second, plain) = blocks(guide, redis_address)

    with pytest.raises(AssertionError, match="awaited") as caught:
        await run(awaiting, guide, first, module)
    assert caught.traceback[-1].lineno == 6, "the traceback names the line of the guide"
    with pytest.raises(AssertionError, match=redis_address):
        await run(plain, guide, second, module)


@pytest.mark.parametrize("guide", GUIDES, ids=named)
def test_a_guide_is_short_and_begins_with_its_summary(guide):
    """Below the title stand five lines that say what there is to know, and the whole is read in one sitting."""
    title, blank, *lines = guide.read_text().splitlines()
    summary = lines[: lines.index("")]

    assert title.startswith("# ")
    assert not blank
    assert len(summary) == 5
    assert all(line.startswith("- ") for line in summary)
    assert len(lines) + 2 <= LINES_MAX


def test_the_list_of_guides_is_complete():
    """Whoever looks for a guide finds it in docs/README.md."""
    listed = set(re.findall(r"\]\(guides/([\w.-]+)\)", (ROOT / "docs/README.md").read_text()))

    assert listed == {guide.name for guide in GUIDES}


def test_the_tests_that_guides_name_are_there():
    """A promise is followed by the test that keeps it: each one that is named exists."""
    named_tests = {(guide.name, *found) for guide in GUIDES for found in TEST_NAME.findall(guide.read_text())}
    assert named_tests, "failures.md names tests"

    missing = []
    for guide, path, function in sorted(named_tests):
        file = ROOT / path
        tree = ast.parse(file.read_text()) if file.is_file() else ast.Module([], [])
        if not any(getattr(node, "name", None) == function for node in ast.walk(tree)):
            missing.append(f"{guide} names {path}::{function}, which is not there")
    assert not missing, "\n".join(missing)


def test_every_option_of_a_policy_is_explained():
    """The table of policies.md has each field of CachePolicy, in order, with the default that it has."""
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", (ROOT / "docs/guides/policies.md").read_text(), re.MULTILINE)
    fields = [(field.name, field.default) for field in dataclasses.fields(CachePolicy)]

    defaults = [value.name if isinstance(value, Strategy) else repr(value) for _, value in fields]
    assert rows == [(name, default) for (name, _), default in zip(fields, defaults, strict=True)]


async def test_djangos_settings_are_understood(redis_address, module):
    """The CACHES of django.md make a cache that stores and finds."""
    cache_handler = pytest.importorskip("django.core.cache", reason="Django is not installed").CacheHandler
    guide = ROOT / "docs/guides/django.md"
    line, source = next(blocks(guide, redis_address))
    await run(source, guide, line, module)
    module.CACHES["default"]["OPTIONS"]["remote"]["timeout"] = REDIS_S  # in place of a limit that is tight

    def use() -> object:
        cache = cache_handler(module.CACHES)["default"]
        cache.set("greeting", "hello")
        return cache.get("greeting")

    assert await asyncio.to_thread(use) == "hello"
