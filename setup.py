"""Compiles the hot modules with mypyc where that is possible; everything else about the package is in pyproject.toml.

HEADRACE_COMPILE=0 leaves them plain Python; HEADRACE_COMPILE=1 makes a failure to compile an error. Without it,
whatever stands in the way (no compiler, no Python headers, a refusal by mypyc) is said in one line, and the package is
built as plain Python.
"""

import os
import runpy
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCE = Path("src")
WISH = os.environ.get("HEADRACE_COMPILE", "")
# Front ends run this file several times to ask questions. Only these commands need mypyc, which takes seconds.
BUILDS = {"build", "build_ext", "bdist_wheel", "editable_wheel"}
BUILDS_IN_PLACE = {"--inplace", "editable_wheel"}


def stay_plain(why: str) -> None:
    """Go on with plain Python, or stop when compiled code was demanded."""
    if WISH == "1":
        sys.exit(f"headrace: the hot modules cannot be compiled: {why}")
    print(f"headrace: the hot modules stay plain Python: {why}", file=sys.stderr)  # noqa: T201 - a build has no log


def obstacle() -> str | None:
    """What a C build lacks, if anything; asking first spares the type check that mypyc begins with."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if WISH == "0":
        return "HEADRACE_COMPILE=0"
    if shutil.which(compiler) is None:
        return f"there is no C compiler ({compiler})"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "there are no Python headers (on Debian: python3-dev)"
    return None


def hot_extensions(files: Sequence[Path]) -> list[Any]:
    """One extension for each hot module and one with the code of them all; empty when they stay plain."""
    if (why := obstacle()) is not None:
        stay_plain(why)
        return []
    from mypyc.build import mypycify  # here, because a plain build does not need it

    # `make check` is where the modules are checked strictly. Here nothing that they import may stop the build: an
    # isolated one has no drivers, and a missing stub must not cost the user the compiled core.
    options = ["--config-file=", "--follow-imports=silent", "--ignore-missing-imports"]
    try:
        extensions = mypycify([*options, *map(str, files)], group_name="headrace", debug_level="0")
    except SystemExit as refusal:
        stay_plain(f"mypyc refuses them: {refusal}")
        return []
    for extension in extensions:
        # A compiler newer than mypyc may warn of more than mypyc knew to switch off.
        extension.extra_compile_args = [flag for flag in extension.extra_compile_args if flag != "-Werror"]
    return extensions


def products_in_place(files: Sequence[Path]) -> list[Path]:
    """Where an in-place build by this interpreter puts machine code: next to the sources, so that import finds it."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return [SOURCE / f"headrace__mypyc{suffix}", *(path.with_suffix(suffix) for path in files)]


class BuildHotModules(build_ext):
    """Builds every hot module or none: some without the others would not even import."""

    def run(self) -> None:
        """Compile; after a failure forget what was compiled."""
        try:
            super().run()
        except (CCompilerError, ExecError, PlatformError) as error:
            for extension in self.extensions:
                Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = []
            stay_plain(f"the C compiler failed: {error}")


def main() -> None:
    """Run setuptools, with the extensions when something is to be built."""
    files = runpy.run_path(str(SOURCE / "headrace/build.py"))["hot_files"]()
    products = products_in_place(files) if BUILDS_IN_PLACE.intersection(sys.argv) else []
    for product in products:
        product.unlink(missing_ok=True)
    extensions = hot_extensions(files) if files and BUILDS.intersection(sys.argv) else []
    setup(ext_modules=extensions, cmdclass={"build_ext": BuildHotModules})
    for product in products:
        if product.exists():
            product.touch()  # newer than its source means current, also when the C code had not changed


main()
