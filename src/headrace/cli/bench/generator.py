"""The load generator as a process of its own: a LoadSpec on stdin, a LoadReport on stdout, both JSON.

    python -m headrace.cli.bench.generator < spec.json

A process of its own, because whatever else runs on the generator's event loop would show up as the server's latency.
"""

import gc
import resource
import sys

import msgspec
import uvloop

from headrace.cli.bench.load import LoadReport, LoadSpec
from headrace.cli.bench.open_loop import Load

DESCRIPTORS_BESIDES = 64
"""Open files of the process that are not connections, generously."""


async def generate(spec: LoadSpec) -> LoadReport:
    """Run the load on the running loop."""
    return await Load(spec).run()


def allow_descriptors(count: int) -> None:
    """Raise the soft limit of open files as far as it may go; what is still missing shows as failed connections."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    """Read, run, write."""
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=LoadSpec)
    allow_descriptors(spec.connections + DESCRIPTORS_BESIDES)
    # A run makes no cycles worth collecting, and a full collection would be a pause in the middle of the schedule.
    gc.disable()
    report = uvloop.run(generate(spec))
    sys.stdout.buffer.write(msgspec.json.encode(report))


if __name__ == "__main__":
    main()
