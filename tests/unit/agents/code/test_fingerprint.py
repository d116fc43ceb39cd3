"""What a compiled source depends on: found without running it, told apart by every part."""

import ast
import importlib.metadata
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from headrace.agents.code.compilation import CodePolicy
from headrace.agents.code.fingerprint import (
    Environment,
    Fingerprint,
    Interpreter,
    declared_distributions,
    imported_modules,
)
from headrace.errors import AgentInvalid
from headrace.testing import FakeClock

HERE = Interpreter.current()


def install(site: Path, name: str, version: str, *modules: str) -> Path:
    """What pip leaves of a distribution."""
    place = site / f"{name.replace('-', '_')}-{version}.dist-info"
    place.mkdir(parents=True)
    (place / "RECORD").write_text("".join(f"{module}/__init__.py,sha256=x,1\n" for module in modules))
    return place


@pytest.mark.parametrize(
    "other",
    [
        {"cache_tag": "cpython-399"},
        {"magic": "00000000"},
        {"hexversion": HERE.hexversion + 1},
        {"optimize": HERE.optimize + 1},
        {"flags": 1},
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_interpreter_has_another_slot(other):
    """Each of its facts counts by itself."""
    policy = CodePolicy()

    slots = {Fingerprint(each, policy).slot("00", ()) for each in (HERE, replace(HERE, **other))}

    assert len(slots) == 2


def test_another_policy_source_or_declaration_has_another_slot():
    """A policy is its version and its limits, for with another limit another source is refused."""
    policies = [CodePolicy(), CodePolicy(version=2), CodePolicy(nodes_max=10), CodePolicy(source_bytes_max=10)]

    slots = [Fingerprint(HERE, policy).slot("00", ()) for policy in policies]
    slots += [Fingerprint(HERE, CodePolicy()).slot(*of) for of in (("01", ()), ("00", ("a",)), ("00", ("a", "b")))]

    assert len(set(slots)) == len(slots)


def test_a_slot_is_the_same_in_every_process_and_order():
    """It names a file that other processes look for."""
    fingerprint = Fingerprint(replace(HERE, cache_tag="t", magic="m", hexversion=1, optimize=0), CodePolicy())

    assert fingerprint.slot("00", ("a", "b")) == fingerprint.slot("00", ("b", "a"))
    assert fingerprint.slot("00", ()) == Fingerprint(
        Interpreter(cache_tag="t", magic="m", hexversion=1, optimize=0), CodePolicy()
    ).slot("00", ())


def test_the_key_knows_every_version():
    """Of the same slot, another version of a dependency is another key, and so is one more."""
    versions = [{}, {"a": "1"}, {"a": "2"}, {"a": "1", "b": "1"}, {"b": "1"}, {"a": ""}]

    keys = [Fingerprint.key("00", dependencies) for dependencies in versions]

    assert len(set(keys)) == len(keys)
    assert Fingerprint.key("00", {"a": "1", "b": "2"}) == Fingerprint.key("00", {"b": "2", "a": "1"})


def test_imports_are_found_wherever_a_statement_can_stand():
    """In functions, classes, branches, loops, handlers, matches, `with`; the standard library is the interpreter's."""
    source = """
import json, a0.sub as x
from . import sibling
from .. import another
from a1.deep import thing
def f():
    import a2
    async def g():
        from a3 import x
class C:
    import a4
    def m(self):
        for i in []:
            import a5
        else:
            import a6
        while self:
            import a7
try:
    import a8
except ImportError:
    import a9
else:
    import b0
finally:
    import b1
with open("x"):
    import b2
match 1:
    case 1:
        import b3
if x:
    import b4
elif y:
    import b5
lambda: [__import__(z) for z in x]
"""

    assert imported_modules(compile(source, "x", "exec")) == (
        *(f"a{number}" for number in range(10)),
        *(f"b{number}" for number in range(6)),
    )


def test_the_seventy_thousandth_name_is_found_like_the_first():
    """Where numbers take more than a byte."""
    source = "".join(f"x{number} = 1\n" for number in range(70_000)) + "import late\nfrom later import last\n"

    assert imported_modules(compile(source, "x", "exec")) == ("late", "later")


def test_imports_are_those_of_the_syntax_tree(monkeypatch):
    """In the files of the standard library, where for once its own modules count, too."""
    monkeypatch.setattr(sys, "stdlib_module_names", frozenset())
    checked = 0
    for path in sorted(Path(os.__file__).parent.glob("[a-m]*.py")):
        text = path.read_text(encoding="utf-8")
        nodes = list(ast.walk(ast.parse(text)))
        tree = {alias.name.partition(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        tree |= {str(node.module).partition(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}

        found = imported_modules(compile(text, str(path), "exec"))

        assert set(found) == tree - {"None"}, path
        checked += len(tree)
    assert checked > 300


def test_declared_names_are_normal_and_sorted():
    """As PEP 503 spells them; a version or extra that is asked for does not count, only what is installed."""
    assert declared_distributions(["Ruamel.YAML >= 0.18; python_version > '3'", "a__b[x]==1", "c @ file:///d"]) == (
        "a-b",
        "c",
        "ruamel-yaml",
    )
    assert declared_distributions({"X": "1"}) == ("x",)
    assert declared_distributions(None) == ()


@pytest.mark.parametrize("dependencies", ["httpx", [""], ["-x"], ["a/b"], [f"a{n}" for n in range(1_001)]])
def test_what_names_no_distribution_is_refused(dependencies):
    """The caller learns of it; nothing is guessed."""
    with pytest.raises(AgentInvalid):
        declared_distributions(dependencies)


def test_the_environment_agrees_with_importlib():
    """For everything installed here that importlib knows by the name of its directory."""
    environment = Environment()
    names = {name.lower().replace("_", "-") for name in ("msgspec", "redis", "psycopg", "uvicorn", "pytest")}

    found = environment.dependencies((), names)

    assert found == {name: importlib.metadata.version(name) for name in sorted(names)}
    assert environment.dependencies(["yaml", "msgspec"], ()) == {
        name: importlib.metadata.version(name) for name in ("msgspec", "pyyaml")
    }


def test_a_module_names_every_distribution_that_provides_it(tmp_path):
    """A namespace package has several, each of which may change what is imported."""
    install(tmp_path, "google-one", "1.0", "google")
    install(tmp_path, "google-two", "2.0", "google")
    (install(tmp_path, "Listed", "3.0") / "top_level.txt").write_text("listed_module\nother\n")
    (install(tmp_path, "single", "4.0") / "RECORD").write_text("single_file.py,,\n../../bin/tool,,\n")
    environment = Environment([str(tmp_path)])

    found = environment.dependencies(["google", "listed_module", "single_file", "unknown"], ["missing"])

    assert found == {"google-one": "1.0", "google-two": "2.0", "listed": "3.0", "missing": "", "single": "4.0"}


def test_the_first_of_the_path_counts(tmp_path):
    """As it does for the import."""
    install(tmp_path / "a", "x", "1", "x")
    install(tmp_path / "b", "x", "2", "x")

    assert Environment([str(tmp_path / "a"), str(tmp_path / "b")]).dependencies(["x"], ()) == {"x": "1"}


def test_eggs_and_their_development_form_have_versions(tmp_path):
    """The latter keeps its version inside; one without is known as such."""
    (tmp_path / "old-1.5-py3.11.egg-info").write_text("Name: old\nVersion: 1.5\n")
    (tmp_path / "dev.egg-info").mkdir()
    (tmp_path / "dev.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: dev\nVersion: 0.3\n")
    (tmp_path / "odd.egg-info").mkdir()
    (tmp_path / "~gone-1.dist-info").mkdir()

    found = Environment([str(tmp_path)]).dependencies((), ["old", "dev", "odd", "gone"])

    assert found == {"dev": "0.3", "gone": "", "odd": "unknown", "old": "1.5"}


def test_an_upgrade_is_seen_at_the_next_look(tmp_path):
    """Also one in the same tick of the file system's clock as the look before; in between nothing is read."""
    clock = FakeClock(wall=5_000.0)
    environment = Environment([str(tmp_path)], clock=clock, recheck_s=1.0)
    old = install(tmp_path, "x", "1", "x")
    os.utime(tmp_path, (5_000.0, 5_000.0))
    assert environment.dependencies(["x"], ()) == {"x": "1"}
    (old / "RECORD").unlink()
    old.rmdir()
    install(tmp_path, "x", "2", "x")
    os.utime(tmp_path, (5_000.0, 5_000.0))
    assert environment.dependencies(["x"], ()) == {"x": "1"}

    clock.advance(1.0)

    assert environment.dependencies(["x"], ()) == {"x": "2"}


def test_a_directory_that_did_not_change_is_not_listed_again(tmp_path):
    """A site-packages of hundreds of distributions is read once a process."""
    clock = FakeClock(wall=4e9)
    install(tmp_path, "x", "1", "x")
    environment = Environment([str(tmp_path)], clock=clock)
    environment.dependencies(["x"], ())
    listed = environment._directories
    clock.advance(5.0)

    environment.dependencies(["x"], ())

    assert environment._directories[str(tmp_path)] is listed[str(tmp_path)]


def test_a_path_that_is_not_there_is_empty(tmp_path):
    """sys.path holds zip files and missing folders on most machines."""
    (tmp_path / "a.zip").write_bytes(b"PK")
    environment = Environment([str(tmp_path / "missing"), str(tmp_path / "a.zip"), *sys.path[:0]])

    assert environment.dependencies(["x"], ["y"]) == {"y": ""}
