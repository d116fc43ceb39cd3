"""The style that ruff cannot see, as plain functions, after TigerBeetle's `tidy.zig`.

A file rule takes a path and its text, a tree rule takes every text by path; both return what is wrong and what to do
instead. `tests/test_tidy.py` applies them to this project, `tests/unit/test_tidy_rules.py` to bad text.
"""

import ast
import io
import re
import tokenize
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TypeVar

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 60
LINE_WIDTH_MAX = 119
DOCUMENT_LINES_MAX = {"STYLE.md": 150, "docs/decisions/*.md": 30}
FILE_BYTES_MAX = 1_000_000

Node = TypeVar("Node", bound=ast.AST)
Tree = Mapping[str, str]
Rule = Callable[[str, str], Iterator[str]]
TreeRule = Callable[[Tree], Iterator[str]]

CODE = {".py", ".js", ".css", ".html", ".sql", ".sh"}
LINK = re.compile(r"""\]\(\s*([^)\s]+)[^)]*\)|(?:src|href)="([^"]+)\"""")
DRAWERS = {"util", "helper", "common", "misc", "base", "manager", "handler", "service"}


def file_is_short(path: str, text: str) -> Iterator[str]:
    """Nobody holds a long file in mind."""
    lines = text.count("\n")
    if _suffix(path) in CODE and "vendor" not in path and lines > FILE_LINES_MAX:
        yield f"{path}: {lines} lines, at most {FILE_LINES_MAX}: split it where it changes for different reasons"


def functions_are_short(path: str, text: str) -> Iterator[str]:
    """A function is read on one screen."""
    for node in _functions(path, text):
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if lines > FUNCTION_LINES_MAX:
            yield (
                f"{path}:{node.lineno}: {node.name} has {lines} lines, at most {FUNCTION_LINES_MAX}: "
                "keep the branches here and move the work of each into a function of its own"
            )


def file_is_named_by_a_noun(path: str, text: str) -> Iterator[str]:
    """A drawer takes everything in, so nothing is found in it."""
    if _suffix(path) != ".py":
        return
    for part in PurePosixPath(path).with_suffix("").parts:
        # test_whole_service.py tells of a behaviour, test_service.py of a drawer
        words = [part.removeprefix("test_")] if part.startswith("test_") else part.split("_")
        if DRAWERS.intersection(word.removesuffix("s") for word in words):
            yield f"{path}: '{part}' names a drawer: name the thing of the domain that is inside"


def module_has_docstring(path: str, text: str) -> Iterator[str]:
    """The first line says what the file is for."""
    is_told_by_its_name = path.startswith("tests/")
    if _suffix(path) != ".py" or is_told_by_its_name:
        return
    (module,) = _nodes(path, text, ast.Module)
    if ast.get_docstring(module) is None:
        yield f"{path}: no module docstring: say in a sentence what this file is for"


def tests_have_docstrings(path: str, text: str) -> Iterator[str]:
    """Tests read as a specification."""
    if not path.startswith("tests/"):
        return
    for node in _functions(path, text):
        if node.name.startswith("test_") and not ast.get_docstring(node):
            yield f"{path}:{node.lineno}: {node.name} has no docstring: state the behaviour in one sentence"


def tests_wait_for_a_condition(path: str, text: str) -> Iterator[str]:
    """A test that sleeps is either slow or unlucky; a pause between two looks at a condition is neither."""
    if not path.startswith("tests/"):
        return
    for test in _functions(path, text):
        if test.name.startswith("test_"):
            for line in _sleeps(test.body):
                yield f"{path}:{line}: {test.name} sleeps: wait for the condition in a loop, or move a fake clock"


def nothing_is_left_open(path: str, text: str) -> Iterator[str]:
    """A mark in the code is a promise that nobody reads."""
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK|TB" + r"D)\b")
    for number, line in _numbered(text):
        if mark := marks.search(line):
            yield f"{path}:{number}: '{mark[0]}' is left open: do it, or say in a sentence what the limit is"


def lines_are_narrow(path: str, text: str) -> Iterator[str]:
    """What ruff does for Python, for the other languages."""
    narrow = (CODE - {".py"}) | {".toml", ".yml", ".yaml", ".vcl", ".conf"}
    if (_suffix(path) not in narrow and path not in {"Makefile", ".ci/run"}) or "vendor" in path:
        return
    for number, line in _numbered(text):
        if len(line) > LINE_WIDTH_MAX:
            yield f"{path}:{number}: {len(line)} columns, at most {LINE_WIDTH_MAX}: break the line"


def exceptions_have_reasons(path: str, text: str) -> Iterator[str]:
    """Whoever switches a check off, or catches everything and goes on, says why in the same line."""
    lines = text.splitlines()
    for node in _nodes(path, text, ast.ExceptHandler):
        names = {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"Exception"}
        is_broad = bool(names & {"Exception", "BaseException"}) and not isinstance(node.body[-1], ast.Raise)
        if is_broad and not re.search(r"#.*[a-z]{3,} [a-z]+", lines[node.lineno - 1]):
            yield f"{path}:{node.lineno}: catches everything without a reason: name what you can handle, or say why"
    for number, comment in _comments(path, text):
        if re.match(r"#\s*noqa\b", comment) and not re.match(r"#\s*noqa: [A-Z]+\d+(, ?[A-Z]+\d+)* - \w", comment):
            yield f"{path}:{number}: a bare noqa: write '# noqa: CODE - why this is right here'"


def paths_are_not_a_developers(path: str, text: str) -> Iterator[str]:
    """A path of one machine means nothing on another."""
    home = re.compile(r"(?<![\w.])/(wo" + r"rk|ro" + r"ot|(ho" + r"me|Us" + r"ers)/\w+)/|[A-Z]:\\Users")
    for number, line in _numbered(text):
        if found := home.search(line):
            yield f"{path}:{number}: '{found[0]}' is one developer's machine: make it relative or take it as an option"


def markdown_has_one_title(path: str, text: str) -> Iterator[str]:
    """A document is about one thing."""
    if _suffix(path) == ".md":
        titles = [line for _, line in _prose(text) if line.startswith("# ")]
        if len(titles) != 1:
            yield f"{path}: {len(titles)} titles, exactly one: start with '# ' and use '## ' below it"


def documents_are_short(path: str, text: str) -> Iterator[str]:
    """A line of documentation is a cost to each of its readers."""
    lines = text.count("\n")
    for pattern, lines_max in DOCUMENT_LINES_MAX.items():
        if PurePosixPath(path).match(pattern) and lines > lines_max:
            yield f"{path}: {lines} lines, at most {lines_max}: keep what a reader acts on"


def figures_can_be_repeated(path: str, text: str) -> Iterator[str]:
    """A measured figure is worth what its repetition is worth: a table of figures is followed by how it was made.

    A figure is a cell that holds a number with a unit and nothing else, in a column that is not headed as a wish. The
    paragraph after the table has a command in backticks, the number of cores of the machine, and the date.
    """
    if _suffix(path) != ".md":
        return
    lines = list(_prose(text))
    for index, (number, line) in enumerate(lines):
        ends = line.startswith("|") and (index + 1 == len(lines) or not lines[index + 1][1].startswith("|"))
        if not ends or not _has_figure(lines, index):
            continue
        after = " ".join(text for _, text in lines[index + 1 : index + 8])
        origin = {"command": r"`[^`]+ [^`]+`", "machine": r"\d+ cores?\b", "date": r"\d{4}-\d\d-\d\d"}
        if missing := [what for what, pattern in origin.items() if not re.search(pattern, after)]:
            yield f"{path}:{number}: a table of figures without its {', '.join(missing)}: name them right below it"


def errors_have_code_and_fix(tree: Tree) -> Iterator[str]:
    """Programs compare an error's code, people follow its fix: each class has its own of both."""
    family = {"HeadraceError"}
    owners: dict[str, str] = {}
    classes = [(path, node) for path in _package(tree) for node in _nodes(path, tree[path], ast.ClassDef)]
    for _ in classes:  # a subclass may come before its base when they stand in different files
        family |= {node.name for _, node in classes if family & {getattr(base, "id", "") for base in node.bases}}
    for path, node in classes:
        if node.name not in family:
            continue
        values = _class_constants(node)
        for field in {"code", "fix"} - values.keys():
            yield f"{path}:{node.lineno}: {node.name} inherits its {field}: give it one of its own"
        if (owner := owners.setdefault(values.get("code", node.name), node.name)) != node.name:
            yield f"{path}:{node.lineno}: {node.name} has the code of {owner}: choose another"


def modules_are_used(tree: Tree) -> Iterator[str]:
    """What nothing imports is dead, however well it is tested; unless a guide tells its users to."""
    entries = str(tomllib.loads(tree.get("pyproject.toml", "")).get("project", {}))
    guides = "".join(text for path, text in tree.items() if path.startswith("docs/guides/"))
    used = set(re.findall(r"headrace[\w.]*", entries))
    used |= {name.rpartition(".")[0] for name in re.findall(r"headrace[\w.]*\.\w+", guides)} | set(
        re.findall(r"headrace[\w.]*\w", guides)
    )
    prefixes: set[str] = set()
    for path in _package(tree):
        names, starts = _mentions(path, tree[path])
        used |= names - {_module(path)}
        prefixes |= starts
    for path in _package(tree):
        name = _module(path)
        is_door = path.endswith(("__init__.py", "__main__.py"))
        if not is_door and name not in used and f"{name.rpartition('.')[0]}." not in prefixes:
            yield f"{path}: no module imports it: use it or delete it"


def links_lead_somewhere(tree: Tree) -> Iterator[str]:
    """A relative link names a file or folder of the tree, and a heading that is there."""
    places = {str(parent) for path in tree for parent in PurePosixPath(path).parents} | tree.keys()
    for path in (path for path in tree if _suffix(path) == ".md"):
        for number, line in _prose(tree[path]):
            for link in LINK.findall(re.sub(r"`[^`]*`", "", line)):
                target, _, heading = "".join(link).partition("#")
                if re.match(r"[a-z+]+:|//", target):
                    continue
                place = _normal(PurePosixPath(path).parent / target) if target else path
                if place not in places:
                    yield f"{path}:{number}: '{target}' is not there: correct the link"
                elif heading and heading not in _anchors(tree.get(place, "")):
                    yield f"{path}:{number}: '{place}' has no heading '#{heading}': correct the link"


RULES: tuple[Rule, ...] = (
    file_is_short,
    functions_are_short,
    file_is_named_by_a_noun,
    module_has_docstring,
    tests_have_docstrings,
    tests_wait_for_a_condition,
    nothing_is_left_open,
    lines_are_narrow,
    exceptions_have_reasons,
    paths_are_not_a_developers,
    markdown_has_one_title,
    documents_are_short,
    figures_can_be_repeated,
)

TREE_RULES: tuple[TreeRule, ...] = (errors_have_code_and_fix, modules_are_used, links_lead_somewhere)


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix


def _numbered(text: str) -> Iterator[tuple[int, str]]:
    return enumerate(text.splitlines(), start=1)


def _nodes(path: str, text: str, kind: type[Node]) -> Iterator[Node]:
    if _suffix(path) == ".py":
        yield from (node for node in _tree(path, text) if isinstance(node, kind))


@lru_cache(maxsize=1)
def _tree(path: str, text: str) -> list[ast.AST]:
    """Every node of a file; kept for the next rule, to which the same file is put."""
    return list(ast.walk(ast.parse(text, path)))


def _functions(path: str, text: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    yield from _nodes(path, text, ast.FunctionDef)
    yield from _nodes(path, text, ast.AsyncFunctionDef)


def _sleeps(body: Sequence[ast.AST]) -> Iterator[int]:
    """The lines of sleeps that are outside of any loop and any function within the test."""
    for node in body:
        match node:
            case ast.For() | ast.AsyncFor() | ast.While() | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                continue
            case ast.Expr(value=ast.Await(value=call) | (ast.Call() as call)):
                function = ast.unparse(call).partition("(")
                if function[0] in {"time.sleep", "asyncio.sleep"} and function[2] != "0)":
                    yield node.lineno
        yield from _sleeps(list(ast.iter_child_nodes(node)))


def _comments(path: str, text: str) -> Iterator[tuple[int, str]]:
    """The comments of a file in which a check is switched off."""
    if _suffix(path) == ".py" and "noqa" in text:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        yield from ((token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT)


def _prose(text: str) -> Iterator[tuple[int, str]]:
    """The numbered lines of a Markdown text outside its code fences."""
    fence = ""
    for number, line in _numbered(text):
        mark = re.match(r"\s*(```+|~~~+)", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1].startswith(fence):
            fence = ""
        elif not fence:
            yield number, line


def _has_figure(lines: list[tuple[int, str]], last: int) -> bool:
    first = last
    while first > 0 and lines[first - 1][1].startswith("|"):
        first -= 1
    rows = [[cell.strip(" *") for cell in line.strip("| ").split("|")] for _, line in lines[first : last + 1]]
    unit = r"(ns|us|µs|ms|s|%|x|points|[kM]?/s|[kM]? ?\w+/s|[kKMG]i?B|B)"
    figure = re.compile(rf"[~<>≤≥±]?\s*\d[\d.,]*\s?{unit}")
    wish = re.compile(r"target|limit|default|asked|wanted|floor|bound", re.IGNORECASE)
    return any(
        figure.fullmatch(cell) and not wish.search(title)
        for row in rows[2:]
        for title, cell in zip(rows[0][1:], row[1:], strict=False)
    )


def _package(tree: Tree) -> list[str]:
    return [path for path in tree if path.startswith("src/") and _suffix(path) == ".py"]


def _module(path: str) -> str:
    return ".".join(PurePosixPath(path).with_suffix("").parts[1:]).removesuffix(".__init__")


def _class_constants(node: ast.ClassDef) -> dict[str, str]:
    constants = {}
    for statement in node.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        value = getattr(statement, "value", None)
        if isinstance(targets[0], ast.Name) and isinstance(value, ast.Constant):
            constants[targets[0].id] = str(value.value)
    return constants


def _mentions(path: str, text: str) -> tuple[set[str], set[str]]:
    """The modules that a file imports or names in a string, and the beginnings of names that it completes later."""
    names: set[str] = set()
    prefixes: set[str] = set()
    for node in _nodes(path, text, ast.AST):
        match node:
            case ast.Import(names=aliases):
                names |= {alias.name for alias in aliases}
            case ast.ImportFrom(module=str(module), names=aliases):
                names |= {module, *(f"{module}.{alias.name}" for alias in aliases)}
            case ast.JoinedStr(values=[ast.Constant(value=str(start)), *_]):
                prefixes.add(start)
            case ast.Constant(value=str(value)):
                names |= set(re.findall(r"\bheadrace\.[\w.]+", value))
    return names, prefixes


def _normal(path: PurePosixPath) -> str:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts:
            parts.pop()
        else:
            parts.append(part)
    return str(PurePosixPath(*parts))


def _anchors(text: str) -> set[str]:
    titles = (line.lstrip("#").strip() for _, line in _prose(text) if line.startswith("#"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
