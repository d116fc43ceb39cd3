"""The files beside the agents."""

import ast
from importlib.util import module_from_spec, spec_from_file_location

import pytest

from tests.unit.examples.deployment import EXAMPLES


def generated() -> dict[str, bytes]:
    spec = spec_from_file_location("generate", EXAMPLES / "data" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    files: dict[str, bytes] = module.files()
    return files


@pytest.mark.parametrize("name", ["access.log", "orders.csv"])
def test_generated_data_is_reproduced_byte_for_byte(name):
    """generate.py makes exactly the file that is checked in."""
    assert generated()[name] == (EXAMPLES / "data" / name).read_bytes()


def test_data_has_the_size_that_the_guides_name():
    """About 2,000 lines of log, 500 orders and 1,000 words."""
    data = EXAMPLES / "data"
    assert 1_900 <= (data / "access.log").read_text(encoding="utf-8").count("\n") <= 2_100
    assert generated()["orders.csv"].count(b"\r\n") == 1 + 500 + 3
    assert 950 <= len((data / "watermills.txt").read_text(encoding="utf-8").split()) <= 1_150


def test_starlette_app_is_short_and_cached():
    """The app is an ordinary one of at most forty lines, with one cached function."""
    path = EXAMPLES / "app" / "starlette_app.py"
    source = path.read_text(encoding="utf-8")
    compile(source, str(path), "exec", dont_inherit=True)
    assert source.count("\n") <= 40
    decorators = [
        ast.unparse(decorator)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.AsyncFunctionDef)
        for decorator in node.decorator_list
    ]
    assert "cache.cached('user:{user_id}', ttl=60)" in decorators
