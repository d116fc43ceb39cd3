"""Each rule of tests/tidy_rules.py refuses bad text, says what to do instead, and lets good text pass."""

import pytest

from tests import tidy_rules
from tests.tidy_rules import Rule, TreeRule

LONG_FUNCTION = "def work() -> None:\n" + "    print()\n" * 60
OPEN_MARK = "# TO" + "DO: later\n"
TABLE = "| case | ours |\n|---|---|\n| hit | 43 ns |\n\n"

BAD = [
    (tidy_rules.file_is_short, "src/headrace/cache/cache.py", "x = 1\n" * 700, "700 lines, at most 600"),
    (tidy_rules.file_is_short, "src/headrace/server/dashboard/live.js", "\n" * 601, "601 lines"),
    (tidy_rules.functions_are_short, "src/headrace/app.py", LONG_FUNCTION, "app.py:1: work has 61 lines, at most 60"),
    (tidy_rules.functions_are_short, "tests/a.py", "async " + LONG_FUNCTION, "a.py:1: work has"),
    (tidy_rules.file_is_named_by_a_noun, "src/headrace/cache/utils.py", "", "'utils' names a drawer"),
    (tidy_rules.file_is_named_by_a_noun, "src/headrace/key_helper.py", "", "names a drawer"),
    (tidy_rules.file_is_named_by_a_noun, "src/headrace/common/keys.py", "", "names a drawer"),
    (tidy_rules.file_is_named_by_a_noun, "tests/base.py", "", "names a drawer"),
    (tidy_rules.file_is_named_by_a_noun, "tests/unit/test_helpers.py", "", "names a drawer"),
    (tidy_rules.module_has_docstring, "src/headrace/app.py", "import os\n", "no module docstring"),
    (tidy_rules.tests_have_docstrings, "tests/test_a.py", "def test_a():\n    assert 1\n", "test_a has no docstring"),
    (
        tidy_rules.tests_have_docstrings,
        "tests/test_a.py",
        "class TestA:\n async def test_a(self): ...\n",
        "test_a has",
    ),
    (
        tidy_rules.tests_wait_for_a_condition,
        "tests/a.py",
        "def test_a():\n with b:\n  time.sleep(1)\n",
        "a.py:3: test_a",
    ),
    (
        tidy_rules.tests_wait_for_a_condition,
        "tests/a.py",
        "async def test_a():\n await asyncio.sleep(0.1)\n",
        "test_a sleeps",
    ),
    (tidy_rules.nothing_is_left_open, "Makefile", OPEN_MARK, "is left open"),
    (tidy_rules.lines_are_narrow, "src/headrace/database/fence.sql", "-" * 120, "fence.sql:1: 120 columns"),
    (tidy_rules.lines_are_narrow, "Makefile", "\n" + "x" * 120, "Makefile:2: 120 columns"),
    (tidy_rules.exceptions_have_reasons, "a.py", "try: f()\nexcept Exception: g()\n", "a.py:2: catches everything"),
    (tidy_rules.exceptions_have_reasons, "a.py", "try: f()\nexcept: g()\n", "catches everything"),
    (tidy_rules.exceptions_have_reasons, "a.py", "try: f()\nexcept (OSError, Exception): g()\n", "catches everything"),
    (tidy_rules.exceptions_have_reasons, "a.py", "try: f()\nexcept Exception: g()  # BLE001\n", "catches every"),
    (tidy_rules.exceptions_have_reasons, "a.py", "import os  # noqa\n", "a bare noqa"),
    (tidy_rules.exceptions_have_reasons, "a.py", "import os  # noqa: F401\n", "a bare noqa"),
    (tidy_rules.paths_are_not_a_developers, "README.md", "cd /ho" + "me/ada/headrace", "one developer's machine"),
    (tidy_rules.paths_are_not_a_developers, "a.py", 'open("/wo' + 'rk/data")', "one developer's machine"),
    (tidy_rules.markdown_has_one_title, "docs/start.md", "## Start\n", "0 titles"),
    (tidy_rules.markdown_has_one_title, "docs/start.md", "# Start\n\n# Again\n", "2 titles"),
    (tidy_rules.documents_are_short, "STYLE.md", "\n" * 151, "151 lines, at most 150"),
    (tidy_rules.documents_are_short, "docs/decisions/0001-a.md", "\n" * 31, "31 lines, at most 30"),
    (tidy_rules.figures_can_be_repeated, "README.md", TABLE + "Fast.\n", "without its command, machine, date"),
    (tidy_rules.figures_can_be_repeated, "README.md", TABLE + "`make bench`, 2026-11-23\n", "without its machine"),
    (tidy_rules.figures_can_be_repeated, "README.md", TABLE + "`make bench` on 2 cores\n", "without its date"),
]

GOOD = [
    (tidy_rules.file_is_short, "src/headrace/cache/cache.py", "x = 1\n" * 600),
    (tidy_rules.file_is_short, "src/headrace/server/dashboard/vendor/uplot.js", "\n" * 700),
    (tidy_rules.functions_are_short, "a.py", LONG_FUNCTION.removesuffix("    print()\n")),
    (tidy_rules.file_is_named_by_a_noun, "src/headrace/cache/timer_wheel.py", ""),
    (tidy_rules.file_is_named_by_a_noun, "src/headrace/database/shard_map.py", ""),
    (tidy_rules.file_is_named_by_a_noun, "tests/faults/test_whole_service.py", ""),
    (tidy_rules.module_has_docstring, "src/headrace/app.py", '"""Opens and closes the rooms."""\n'),
    (tidy_rules.tests_have_docstrings, "tests/a.py", 'def test_a():\n    """A is so."""\n\ndef other(): ...\n'),
    (tidy_rules.tests_wait_for_a_condition, "tests/a.py", "def test_a():\n while b():\n  time.sleep(0.01)\n"),
    (
        tidy_rules.tests_wait_for_a_condition,
        "tests/a.py",
        "async def test_a():\n async def slow():\n  await asyncio.sleep(1)\n await asyncio.sleep(0)\n",
    ),
    (tidy_rules.nothing_is_left_open, "a.py", "# The window is bounded by `lag_max`.\nmkstemp('fooXXXXXX')\n"),
    (tidy_rules.lines_are_narrow, "docs/start.md", "x" * 300),
    (tidy_rules.exceptions_have_reasons, "a.py", "try: f()\nexcept OSError: g()\n"),
    (tidy_rules.exceptions_have_reasons, "a.py", "try: f()\nexcept BaseException:\n    g()\n    raise\n"),
    (tidy_rules.exceptions_have_reasons, "a.py", "import os  # noqa: F401 - loading it registers the codec\n"),
    (
        tidy_rules.exceptions_have_reasons,
        "a.py",
        "try: f()\nexcept Exception: g()  # noqa: BLE001 - a loader is foreign code\n",
    ),
    (tidy_rules.paths_are_not_a_developers, "a.py", 'prefix = "https://example.org/wo' + 'rk/"; other = "./home/x"'),
    (tidy_rules.markdown_has_one_title, "docs/start.md", "# Start\n\n```sh\n# a comment\n```\n"),
    (tidy_rules.documents_are_short, "docs/concepts/tiers.md", "\n" * 200),
    (tidy_rules.figures_can_be_repeated, "README.md", TABLE + "`make bench` on 2 cores, Python 3.11, 2026-11-23\n"),
    (tidy_rules.figures_can_be_repeated, "README.md", "| what | target |\n|---|---|\n| p99 | 500 ms |\n"),
    (tidy_rules.figures_can_be_repeated, "README.md", "| option | meaning |\n|---|---|\n| ttl | seconds, 300 s |\n"),
]

ERRORS = "src/headrace/errors.py"
HEADRACE_ERROR = "class HeadraceError(Exception):\n    code: str = 'headrace-error'\n    fix: str = 'Report it.'\n\n"
PROJECT = '[project.scripts]\nheadrace = "headrace.cli:main"\n'

BAD_TREES = [
    (
        tidy_rules.errors_have_code_and_fix,
        {ERRORS: HEADRACE_ERROR + "class NotOpen(HeadraceError):\n    code = 'not-open'\n"},
        "NotOpen inherits its fix",
    ),
    (
        tidy_rules.errors_have_code_and_fix,
        {
            "src/headrace/cache/early.py": "class Broken(LoadFailed):\n    fix = 'Repair it.'\n",
            ERRORS: HEADRACE_ERROR + "class LoadFailed(HeadraceError):\n    code = 'load'\n    fix = 'Wait.'\n",
        },
        "Broken inherits its code",
    ),
    (
        tidy_rules.errors_have_code_and_fix,
        {ERRORS: HEADRACE_ERROR + "class A(HeadraceError):\n    code = 'headrace-error'\n    fix = 'Wait.'\n"},
        "A has the code of HeadraceError",
    ),
    (
        tidy_rules.modules_are_used,
        {"src/headrace/cache/orphan.py": "import headrace.cache.orphan\n"},
        "no module imports",
    ),
    (
        tidy_rules.modules_are_used,
        {"src/headrace/cache/orphan.py": "", "tests/test_orphan.py": "import headrace.cache.orphan\n"},
        "no module imports it",
    ),
    (
        tidy_rules.links_lead_somewhere,
        {"docs/start.md": "[map](../MAP.md)"},
        "docs/start.md:1: '../MAP.md' is not there",
    ),
    (tidy_rules.links_lead_somewhere, {"README.md": '<img src="docs/shot.png">'}, "'docs/shot.png' is not there"),
    (tidy_rules.links_lead_somewhere, {"README.md": "# A\n[b](#bee)\n## Bea\n"}, "has no heading '#bee'"),
]

GOOD_TREES = [
    (
        tidy_rules.errors_have_code_and_fix,
        {ERRORS: HEADRACE_ERROR + "class NotOpen(HeadraceError):\n    code = 'not-open'\n    fix = 'Open it.'\n"},
    ),
    (
        tidy_rules.modules_are_used,
        {
            "pyproject.toml": PROJECT,
            "src/headrace/__init__.py": "",
            "src/headrace/cli/__init__.py": "from headrace.cli import up\n",
            "src/headrace/cli/up.py": "import headrace.supervisor\nspawn('headrace.worker:main')\n",
            "src/headrace/supervisor.py": "load(f'headrace.rules.{name}')\n",
            "src/headrace/worker.py": "",
            "src/headrace/rules/heap.py": "",
            "src/headrace/cache/django.py": "",
            "docs/guides/django.md": "Set `BACKEND` to `headrace.cache.django.HeadraceCache`.",
        },
    ),
    (
        tidy_rules.links_lead_somewhere,
        {
            "README.md": "[a](docs/start.md#first-steps-now) [d](docs/) [w](https://example.org) `[x](y)`\n",
            "docs/start.md": "# Start\n## First steps, now\n[up](../README.md)\n```\n[x](y)\n```\n",
        },
    ),
]


@pytest.mark.parametrize(("rule", "path", "text", "message"), BAD)
def test_bad_text_is_refused(rule: Rule, path: str, text: str, message: str) -> None:
    """A text that breaks a rule is refused once, with its path and what to do."""
    (problem,) = rule(path, text)

    assert problem.startswith(path)
    assert message in problem


@pytest.mark.parametrize(("rule", "path", "text"), GOOD)
def test_good_text_passes(rule: Rule, path: str, text: str) -> None:
    """A text at the limit, or one that only looks like a breach, passes."""
    assert list(rule(path, text)) == []


@pytest.mark.parametrize(("rule", "tree", "message"), BAD_TREES)
def test_a_bad_tree_is_refused(rule: TreeRule, tree: dict[str, str], message: str) -> None:
    """Files that together break a rule are refused, with the path of the one to change."""
    (problem,) = rule(tree)

    assert problem.startswith(tuple(tree))
    assert message in problem


@pytest.mark.parametrize(("rule", "tree"), GOOD_TREES)
def test_a_good_tree_passes(rule: TreeRule, tree: dict[str, str]) -> None:
    """Files that keep a rule together pass it."""
    assert list(rule(tree)) == []


def test_every_rule_is_proven_both_ways() -> None:
    """No rule stands in the tuple without a text that it refuses and one that it lets pass."""
    file_rules, tree_rules = set(tidy_rules.RULES), set(tidy_rules.TREE_RULES)

    assert {rule for rule, *_ in BAD} == file_rules == {rule for rule, *_ in GOOD}
    assert {rule for rule, *_ in BAD_TREES} == tree_rules == {rule for rule, *_ in GOOD_TREES}
