"""What the machine or the container does: CPU, memory, disk and network.

Inside a container the machine's own figures are the wrong ones, and alarms and kills follow from reading them. So a
cgroup's limit is looked for first (version 2, then version 1), from our own group upwards, because the limit that
binds may be an ancestor's; only what is not limited there is measured on the machine, over the CPUs that we may run
on.

Memory in use is the *working set*, as Kubernetes counts it: the page cache that the kernel can drop at once is not
counted, or every process that reads files would look full.
"""

import os
import resource
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

from headrace.clock import Clock
from headrace.monitor.snapshot import Host

# Version 1 writes "no limit" as the largest page-aligned 63-bit number.
_NO_LIMIT = 1 << 60
_UNREADABLE = (OSError, ValueError, IndexError)
# Time as a guest is in `user` and `nice` already.
_BUSY = frozenset(("user", "nice", "system", "irq", "softirq", "steal"))
_NO_SUCH_FIGURE = (OSError, NotImplementedError, RuntimeError, psutil.Error)


class Pair(NamedTuple):
    """Two counters of bytes: read and written, or received and sent."""

    inward: int
    outward: int


class CpuTotals(NamedTuple):
    """CPU time used within the group that limits us, and how often it was throttled."""

    cpus: float
    used_s: float
    periods: int = 0
    throttled: int = 0


class MemoryNow(NamedTuple):
    """Memory that counts against a limit, and the limit."""

    used: int
    limit: int


class HostTotals(NamedTuple):
    """The machine's counters at one instant; None where it does not tell."""

    at: float
    cpu: CpuTotals | None
    memory: MemoryNow | None
    disk: Pair | None
    network: Pair | None


def between(earlier: HostTotals | None, later: HostTotals) -> Host:
    """What the host did between two readings. Pure. Without an earlier one, rates and CPU are unknown, never zero."""
    elapsed = 0.0 if earlier is None else later.at - earlier.at
    cpu_percent = throttled = None
    if earlier is not None and elapsed > 0.0 and earlier.cpu is not None and later.cpu is not None:
        used = later.cpu.used_s - earlier.cpu.used_s
        if used >= 0.0:
            cpu_percent = min(100.0, 100.0 * used / (elapsed * later.cpu.cpus))
        periods = later.cpu.periods - earlier.cpu.periods
        if periods > 0:
            throttled = max(0, later.cpu.throttled - earlier.cpu.throttled) / periods
    disk = _rates(None if earlier is None else earlier.disk, later.disk, elapsed)
    network = _rates(None if earlier is None else earlier.network, later.network, elapsed)
    return Host(
        cpu_percent=cpu_percent,
        cpus=later.cpu.cpus if later.cpu is not None else float(len(_own_cpus())),
        memory_bytes=later.memory.used if later.memory is not None else None,
        memory_bytes_max=later.memory.limit if later.memory is not None else None,
        disk_read_bytes_per_s=disk[0],
        disk_write_bytes_per_s=disk[1],
        network_received_bytes_per_s=network[0],
        network_sent_bytes_per_s=network[1],
        cpu_throttled_ratio=throttled,
    )


def _rates(earlier: Pair | None, later: Pair | None, elapsed: float) -> tuple[float | None, float | None]:
    if earlier is None or later is None or elapsed <= 0.0:
        return None, None
    inward, outward = later.inward - earlier.inward, later.outward - earlier.outward
    # A disk or an interface that was removed takes its bytes with it.
    if inward < 0 or outward < 0:
        return None, None
    return inward / elapsed, outward / elapsed


class HostProbe:
    """Reads the host again and again. Touches some ten small files; a thread's work."""

    def __init__(self, clock: Clock, *, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> None:
        self._clock = clock
        self._proc = proc
        self._cgroup = cgroup
        self._group: Group | None = None
        self._last: HostTotals | None = None

    def read(self) -> Host:
        """What happened since the last call; the first call knows no rates."""
        totals = self.totals()
        host = between(self._last, totals)
        self._last = totals
        return host

    def totals(self) -> HostTotals:
        """The counters now."""
        if self._group is None:
            self._group = find_group(self._proc, self._cgroup)
        return HostTotals(
            self._clock.monotonic(),
            self._group.cpu() or machine_cpu(),
            self._group.memory() or machine_memory(),
            self._group.disk() or machine_disk(),
            machine_network(),
        )


class Group:
    """The control groups that we are in. This one limits and knows nothing: none here, or none that we may read."""

    def cpu(self) -> CpuTotals | None:
        """Use of CPU within the tightest quota; None without one."""
        return None

    def memory(self) -> MemoryNow | None:
        """Use of memory within the tightest limit; None without one."""
        return None

    def disk(self) -> Pair | None:
        """Bytes read from and written to disks; None when not accounted for."""
        return None


class GroupV2(Group):
    """The unified hierarchy: our group and its ancestors."""

    def __init__(self, levels: tuple[Path, ...]) -> None:
        self._levels = levels

    def cpu(self) -> CpuTotals | None:
        """Use of CPU within the tightest quota."""
        quotas = []
        for level in self._levels:
            words = _text(level / "cpu.max").split()
            if len(words) == 2 and words[0] != "max":
                quotas.append((int(words[0]) / int(words[1]), level))
        if not quotas:
            return None
        quota, level = min(quotas)
        stat = _table(level / "cpu.stat")
        return _cpu_within(quota, stat.get("usage_usec", 0) / 1e6, stat)

    def memory(self) -> MemoryNow | None:
        """Use of memory within the tightest limit."""
        limits = [(int(text), level) for level in self._levels if (text := _text(level / "memory.max")).isdigit()]
        return _memory_within(limits, "memory.current", "inactive_file")

    def disk(self) -> Pair | None:
        """Bytes read from and written to disks by our group."""
        path = self._levels[0] / "io.stat"
        if not path.exists():
            return None
        words = [word.partition("=") for word in _text(path).split()]
        return Pair(
            sum(int(value) for name, _, value in words if name == "rbytes"),
            sum(int(value) for name, _, value in words if name == "wbytes"),
        )


class GroupV1(Group):
    """One hierarchy a controller."""

    def __init__(self, cpu: tuple[Path, ...], cpuacct: tuple[Path, ...], memory: tuple[Path, ...]) -> None:
        self._cpu = cpu
        self._cpuacct = cpuacct
        self._memory = memory

    def cpu(self) -> CpuTotals | None:
        """Use of CPU within the tightest quota."""
        quotas = []
        for level, accounting in zip(self._cpu, self._cpuacct, strict=False):
            quota, period = _number(level / "cpu.cfs_quota_us"), _number(level / "cpu.cfs_period_us")
            if quota is not None and period and quota > 0:
                quotas.append((quota / period, level, accounting))
        if not quotas:
            return None
        quota_cpus, level, accounting = min(quotas)
        return _cpu_within(quota_cpus, (_number(accounting / "cpuacct.usage") or 0) / 1e9, _table(level / "cpu.stat"))

    def memory(self) -> MemoryNow | None:
        """Use of memory within the tightest limit."""
        found = ((_number(level / "memory.limit_in_bytes"), level) for level in self._memory)
        limits = [(limit, level) for limit, level in found if limit is not None and limit < _NO_LIMIT]
        return _memory_within(limits, "memory.usage_in_bytes", "total_inactive_file")


def _cpu_within(quota: float, used_s: float, stat: dict[str, int]) -> CpuTotals:
    cpus = min(quota, float(len(_own_cpus())))
    return CpuTotals(cpus, used_s, stat.get("nr_periods", 0), stat.get("nr_throttled", 0))


def _memory_within(limits: Iterable[tuple[int, Path]], usage: str, droppable: str) -> MemoryNow | None:
    limit, level = min(limits, default=(0, None))
    if level is None or limit >= psutil.virtual_memory().total:
        return None
    used = _number(level / usage)
    if used is None:
        return None
    return MemoryNow(max(0, used - _table(level / "memory.stat").get(droppable, 0)), limit)


def find_group(proc: Path, cgroup: Path) -> Group:
    """The control groups of this process."""
    paths: dict[str, str] = {}
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    if (cgroup / "cgroup.controllers").exists():
        return GroupV2(_levels(cgroup, paths.get("", "/")))
    mounted = {name: mount for name in paths if (mount := _mount(cgroup, name)) is not None}
    if not {"cpu", "cpuacct", "memory"} <= mounted.keys():
        return Group()
    return GroupV1(*(_levels(mounted[name], paths[name]) for name in ("cpu", "cpuacct", "memory")))


def _mount(cgroup: Path, controller: str) -> Path | None:
    for name in (controller, "cpu,cpuacct", "cpuacct,cpu"):
        if controller and controller in name.split(",") and (cgroup / name).is_dir():
            return cgroup / name
    return None


def _levels(mount: Path, path: str) -> tuple[Path, ...]:
    """Our group and its ancestors. A container often sees its own group as the mount, under a path of the host."""
    leaf = mount / path.lstrip("/")
    if not leaf.is_dir():
        return (mount,)
    return tuple(level for level in (leaf, *leaf.parents) if level == mount or mount in level.parents)


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except _UNREADABLE:
        return None


def _table(path: Path) -> dict[str, int]:
    words = [line.split() for line in _text(path).splitlines()]
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}


def _own_cpus() -> list[int]:
    try:
        return sorted(os.sched_getaffinity(0))
    except AttributeError:
        return list(range(os.cpu_count() or 1))


def machine_cpu() -> CpuTotals | None:
    """Busy time of the CPUs that we may run on, by whoever keeps them busy."""
    try:
        times = psutil.cpu_times(percpu=True)
    except _NO_SUCH_FIGURE:
        return None
    own = [times[index] for index in _own_cpus() if index < len(times)] or times
    # Added up, not what is left without the idle time: the rounding of that difference lets busy time go back.
    busy = sum(seconds for cpu in own for name, seconds in zip(cpu._fields, cpu, strict=True) if name in _BUSY)
    return CpuTotals(float(len(own)), busy)


def machine_memory() -> MemoryNow | None:
    """Memory of the machine that could not be given to someone else at once."""
    try:
        memory = psutil.virtual_memory()
    except _NO_SUCH_FIGURE:
        return None
    return MemoryNow(memory.total - memory.available, memory.total)


def machine_disk() -> Pair | None:
    """Bytes read from and written to all disks of the machine."""
    try:
        disks = psutil.disk_io_counters()
    except _NO_SUCH_FIGURE:
        return None
    return None if disks is None else Pair(disks.read_bytes, disks.write_bytes)


def machine_network() -> Pair | None:
    """Bytes received and sent in our network namespace, without what stays within the machine."""
    try:
        interfaces = psutil.net_io_counters(pernic=True)
    except _NO_SUCH_FIGURE:
        return None
    outer = [totals for name, totals in interfaces.items() if not name.startswith("lo")]
    return Pair(sum(totals.bytes_recv for totals in outer), sum(totals.bytes_sent for totals in outer))


class ProcessNow(NamedTuple):
    """What this process uses."""

    cpu_ratio: float | None
    """Of one core, since the last reading; None at the first."""
    memory_bytes: int | None


class ProcessProbe:
    """Reads this process again and again; made in the process that it reads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._process = psutil.Process()
        self._last: tuple[float, float] | None = None

    def read(self) -> ProcessNow:
        """CPU since the last call, and memory now."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        now, used = self._clock.monotonic(), usage.ru_utime + usage.ru_stime
        ratio = None
        if self._last is not None and now > self._last[0]:
            ratio = max(0.0, used - self._last[1]) / (now - self._last[0])
        self._last = (now, used)
        try:
            memory = int(self._process.memory_info().rss)
        except psutil.Error:
            memory = None
        return ProcessNow(ratio, memory)
