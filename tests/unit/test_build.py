"""The hot modules compile where they can, stay plain where they cannot, and it is always known which."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HISTOGRAM = '"""A hot module."""\n\n\ndef bucket(value: int) -> int:\n    return value.bit_length()\n'

# Prints the two answers, and how the module itself was found.
PROBE = """
import sys
from pathlib import Path
sys.path[:0] = ["src", {root!r}]
import headrace.build as build
if {plain}:
    from tests.sources import prefer_sources
    prefer_sources(Path(build.__file__).parent)
print(build.is_compiled(), build.is_stale())
import headrace.monitor.histogram as histogram
print(Path(histogram.__file__).suffix, histogram.bucket(9))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with one hot module, built by our own setup.py."""
    package = tmp_path / "src/headrace"
    (package / "monitor").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "monitor/__init__.py").touch()
    (package / "monitor/histogram.py").write_text(HISTOGRAM)
    shutil.copy(ROOT / "src/headrace/build.py", package)
    shutil.copy(ROOT / "setup.py", tmp_path)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "headrace"\nversion = "0"\n[tool.setuptools.packages.find]\nwhere = ["src"]\n'
    )
    return tmp_path


@pytest.fixture(scope="module")
def type_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("mypy"))


def build_in_place(project: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=project,
        env={**os.environ, "HEADRACE_COMPILE": "", **environment},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def probe(project: Path, *, plain: bool = False) -> list[str]:
    code = PROBE.format(root=str(ROOT), plain=plain)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True, timeout=100
    )
    return run.stdout.split()


def machine_code(project: Path) -> list[Path]:
    return list(project.rglob("*.so"))


def test_without_a_compiler_the_package_is_plain(project: Path) -> None:
    """With no C compiler on PATH the build succeeds, and says in one line why nothing is compiled."""
    result = build_in_place(project, PATH=str(project), CC="")

    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("headrace:")]
    assert line.startswith("headrace: the hot modules stay plain Python: there is no C compiler")
    assert probe(project) == ["False", "False", ".py", "4"]


def test_compiling_can_be_switched_off(project: Path) -> None:
    """HEADRACE_COMPILE=0 builds plain Python although a compiler may be there."""
    result = build_in_place(project, HEADRACE_COMPILE="0")

    assert result.returncode == 0
    assert "stay plain Python: HEADRACE_COMPILE=0" in result.stderr
    assert machine_code(project) == []


def test_compiling_can_be_demanded(project: Path) -> None:
    """HEADRACE_COMPILE=1 makes an error of what would otherwise fall back."""
    result = build_in_place(project, HEADRACE_COMPILE="1", PATH=str(project), CC="")

    assert result.returncode == 1
    assert "headrace: the hot modules cannot be compiled: there is no C compiler" in result.stderr


@pytest.mark.slow
def test_what_mypyc_refuses_stays_plain(project: Path, type_cache: str) -> None:
    """A hot module that mypyc does not accept is built as plain Python, and the line says so."""
    (project / "src/headrace/monitor/histogram.py").write_text(HISTOGRAM + "wrong: int = 'text'\n")

    result = build_in_place(project, MYPY_CACHE_DIR=type_cache)

    assert result.returncode == 0, result.stderr
    assert "headrace: the hot modules stay plain Python: mypyc refuses them" in result.stderr
    assert probe(project) == ["False", "False", ".py", "4"]


@pytest.mark.slow
def test_a_failing_compiler_leaves_nothing_behind(project: Path, type_cache: str) -> None:
    """When the C compiler itself fails the package is plain, with no half of a build in the tree."""
    result = build_in_place(project, MYPY_CACHE_DIR=type_cache, CC="false")

    assert result.returncode == 0, result.stderr
    assert "headrace: the hot modules stay plain Python: the C compiler failed" in result.stderr
    assert machine_code(project) == []


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_compiled_code_is_used_until_its_source_changes(project: Path, type_cache: str) -> None:
    """Machine code wins over its source, is called stale once the source is newer, and can be passed over."""
    result = build_in_place(project, MYPY_CACHE_DIR=type_cache, HEADRACE_COMPILE="1")
    source = project / "src/headrace/monitor/histogram.py"

    assert result.returncode == 0, result.stderr
    assert probe(project) == ["True", "False", ".so", "4"]
    assert probe(project, plain=True) == ["False", "False", ".py", "4"]

    later = max(path.stat().st_mtime for path in machine_code(project)) + 60
    os.utime(source, (later, later))
    assert probe(project) == ["True", "True", ".so", "4"]

    build_in_place(project, HEADRACE_COMPILE="0")
    assert probe(project) == ["False", "False", ".py", "4"]
