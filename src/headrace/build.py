"""How this installation was built: whether its hot modules run as machine code.

The hot modules are ordinary typed Python. Where a C compiler is at hand mypyc compiles them as they are, and `import`
prefers the result; where none is, the same files are interpreted. `setup.py` runs this file by its path, before
anything is installed, so it imports the standard library alone.
"""

from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
from pathlib import Path

HOT = ("cache/memory.py", "cache/policies/*.py", "cache/timer_wheel.py", "monitor/counters.py", "monitor/histogram.py")
"""What a request touches many times, as globs below the package. Nothing else names these modules."""


def hot_files() -> tuple[Path, ...]:
    """The files that `HOT` matches, sorted; a package's `__init__` only gathers names and stays as it is."""
    package = Path(__file__).parent
    return tuple(sorted(path for glob in HOT for path in package.glob(glob) if path.name != "__init__.py"))


def is_compiled() -> bool:
    """Whether every hot module would be imported as machine code. It looks for them and imports none."""
    return all(_machine_code(source) for source in hot_files())


def is_stale() -> bool:
    """Whether machine code would be imported that is older than its source, so that an edit has no effect."""
    built = ((_machine_code(source), source) for source in hot_files())
    return any(code is not None and code.stat().st_mtime < source.stat().st_mtime for code, source in built)


def _machine_code(source: Path) -> Path | None:
    # PathFinder asks the same path hooks as `import` does, without importing the parent packages first.
    spec = PathFinder.find_spec(source.stem, [str(source.parent)])
    if spec is None or spec.origin is None or not spec.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        return None
    return Path(spec.origin)
