"""Where the recorded traces are, and how to read each as a list of keys.

They are not part of this repository. HEADRACE_TRACES names their folder; without it the folder `../shared/traces`
beside the checkout is tried. Sources and licences: web07 and web12 (cache2k, in ben-manes/caffeine, CC BY 4.0), oltp
(Megiddo and Modha, ARC, FAST 2003), sprite, multi3 and loop (the LIRS paper, in ben-manes/caffeine, Apache-2.0),
access_log (a public web site in May 2015, in elastic/examples, Apache-2.0).
"""

import array
import gzip
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path

SIZES = {
    "web07": (75, 300, 1000, 3000),
    "web12": (300, 1200, 2000, 3000),
    "sprite": (250, 500, 1000, 2000),
    "multi3": (200, 512, 1500, 3000),
    "oltp": (1000, 2000, 5000, 10_000),
    "loop": (64, 256, 512, 900),
    "access_log": (30, 100, 300, 1000),
}
"""Four sizes of cache for each trace, in entries: from well below a hundredth to about half of its keys."""


def directory() -> Path | None:
    """The folder of the traces, if there is one."""
    named = os.environ.get("HEADRACE_TRACES")
    folder = Path(named) if named else Path(__file__).resolve().parents[3] / "shared" / "traces"
    return folder if folder.is_dir() else None


def read(name: str) -> list[int]:
    """The keys of a trace in order."""
    folder = directory()
    if folder is None:
        raise FileNotFoundError("no traces: set HEADRACE_TRACES to a folder with web07.trace.xz and the others")
    return READERS[name](folder)


def _read_binary(file: str) -> Callable[[Path], list[int]]:
    def read_from(folder: Path) -> list[int]:
        keys = array.array("i", lzma.decompress((folder / file).read_bytes()))
        if sys.byteorder == "little":
            keys.byteswap()
        return keys.tolist()

    return read_from


def _read_lines(file: str) -> Callable[[Path], list[int]]:
    def read_from(folder: Path) -> list[int]:
        lines = gzip.decompress((folder / file).read_bytes()).decode().split()
        return [int(line) for line in lines if line != "*"]

    return read_from


def _read_ranges(folder: Path) -> list[int]:
    keys: list[int] = []
    for line in gzip.decompress((folder / "oltp.trace.gz").read_bytes()).decode().splitlines():
        start, count, *_ = map(int, line.split())
        keys.extend(range(start, start + count))
    return keys


def _read_requests(folder: Path) -> list[int]:
    lines = gzip.decompress((folder / "access_log.tsv.gz").read_bytes()).decode().splitlines()[1:]
    numbers: dict[str, int] = {}
    return [numbers.setdefault(line.split("\t")[2], len(numbers)) for line in lines]


READERS: dict[str, Callable[[Path], list[int]]] = {
    "web07": _read_binary("web07.trace.xz"),
    "web12": _read_binary("web12.trace.xz"),
    "sprite": _read_lines("sprite.trace.gz"),
    "multi3": _read_lines("multi3.trace.gz"),
    "oltp": _read_ranges,
    "loop": _read_lines("loop.trace.gz"),
    "access_log": _read_requests,
}
