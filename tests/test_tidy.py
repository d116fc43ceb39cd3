"""The style of this project, kept by a test: every file of the tree passes every rule of tests/tidy_rules.py."""

from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

from tests import tidy_rules

ROOT = Path(__file__).parents[1]


def project_files(directory: Path = ROOT) -> Iterator[Path]:
    """The files that belong to the project: all that .gitignore does not name."""
    for path in directory.iterdir():
        if any(fnmatch(path.name, pattern) for pattern in ignored()):
            continue
        if path.is_dir():
            yield from project_files(path)
        elif path.is_file():  # and not a socket or a dangling link
            yield path


@cache
def ignored() -> tuple[str, ...]:
    """The patterns of .gitignore, which are names here, and the folder of git itself."""
    return (".git", *(line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()))


@cache
def texts() -> dict[str, str]:
    """Every file of the project by its path from the root, with its text; what is not UTF-8 has none."""
    found = {}
    for path in project_files():
        try:
            found[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            found[path.relative_to(ROOT).as_posix()] = ""
    return found


@cache
def problems() -> dict[str, list[str]]:
    """What is wrong, by the rule's name. One file after the other, so that each is parsed once for all rules."""
    found: dict[str, list[str]] = {rule.__name__: [] for rule in tidy_rules.RULES}
    for path, text in texts().items():
        for rule in tidy_rules.RULES:
            found[rule.__name__] += rule(path, text)
    return found


@pytest.mark.parametrize("rule", tidy_rules.RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: tidy_rules.Rule) -> None:
    """No file of the project breaks this rule."""
    assert not problems()[rule.__name__], "\n".join(problems()[rule.__name__])


@pytest.mark.parametrize("rule", tidy_rules.TREE_RULES, ids=lambda rule: rule.__name__)
def test_the_tree_keeps_the_rule(rule: tidy_rules.TreeRule) -> None:
    """The files of the project together do not break this rule."""
    found = list(rule(texts()))

    assert not found, "\n".join(found)


def test_no_file_is_large() -> None:
    """A large file weighs on every clone for ever; it belongs beside the project."""
    large = [str(path) for path in project_files() if path.stat().st_size > tidy_rules.FILE_BYTES_MAX]

    assert not large, f"larger than {tidy_rules.FILE_BYTES_MAX} bytes: {', '.join(large)}"


def test_the_rules_see_the_project() -> None:
    """The walk finds sources, tests and documents, and nothing that git ignores."""
    assert {"src/headrace/errors.py", "tests/test_tidy.py", "pyproject.toml", "STYLE.md"} <= texts().keys()
    assert not [path for path in texts() if path.startswith((".git/", ".venv/")) or "__pycache__" in path]
