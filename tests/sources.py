"""Importing a package from its sources although machine code lies beside them."""

import sys
from importlib.machinery import SOURCE_SUFFIXES, FileFinder, SourceFileLoader
from pathlib import Path


def prefer_sources(package: Path) -> None:
    """Make `import` see only `.py` files in `package` and below. What is imported already stays as it is."""

    def is_inside(directory: str) -> bool:
        return Path(directory).is_relative_to(package)

    def source_finder(directory: str) -> FileFinder:
        if not is_inside(directory):
            raise ImportError(f"{directory} is not in {package}: it is for the next path hook")
        return FileFinder(directory, (SourceFileLoader, SOURCE_SUFFIXES))

    sys.path_hooks.insert(0, source_finder)
    for directory in filter(is_inside, list(sys.path_importer_cache)):
        del sys.path_importer_cache[directory]
