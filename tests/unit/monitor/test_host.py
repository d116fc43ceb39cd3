"""Reading the machine and the container, on directory trees that look like those of the kernel."""

import os
from pathlib import Path

import psutil
import pytest

from headrace.monitor.host import (
    CpuTotals,
    HostProbe,
    HostTotals,
    MemoryNow,
    Pair,
    ProcessProbe,
    between,
    find_group,
    machine_cpu,
    machine_disk,
    machine_memory,
    machine_network,
)
from headrace.testing import FakeClock

GIB = 2**30
CPUS = float(len(os.sched_getaffinity(0)))


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def proc(tmp_path: Path, lines: str) -> Path:
    return tree(tmp_path / "proc", {"self/cgroup": lines})


@pytest.fixture
def v2(tmp_path):
    """A container of half a CPU and 256 MiB, in a slice of 2 GiB."""
    cgroup = tree(
        tmp_path / "cgroup",
        {
            "cgroup.controllers": "cpu memory io",
            "app.slice/cpu.max": "max 100000\n",
            "app.slice/memory.max": f"{2 * GIB}\n",
            "app.slice/memory.current": f"{GIB}\n",
            "app.slice/web/cpu.max": "50000 100000\n",
            "app.slice/web/cpu.stat": "usage_usec 3000000\nuser_usec 1\nnr_periods 100\nnr_throttled 25\n",
            "app.slice/web/memory.max": f"{256 * 2**20}\n",
            "app.slice/web/memory.current": f"{200 * 2**20}\n",
            "app.slice/web/memory.stat": f"anon 5\ninactive_file {80 * 2**20}\n",
            "app.slice/web/io.stat": "8:0 rbytes=1000 wbytes=50 rios=1 wios=1\n8:16 rbytes=24 wbytes=50 rios=1\n",
        },
    )
    return find_group(proc(tmp_path, "0::/app.slice/web\n"), cgroup), cgroup


def test_a_container_is_read_from_its_own_group(v2):
    """CPU within the quota, memory without the cache that can be dropped, disk of all devices."""
    group, _ = v2

    assert group.cpu() == CpuTotals(0.5, 3.0, 100, 25)
    assert group.memory() == MemoryNow(120 * 2**20, 256 * 2**20)
    assert group.disk() == Pair(1024, 100)


def test_the_tightest_limit_of_the_ancestors_binds(v2):
    """A slice with less memory than its container is what kills the container."""
    group, cgroup = v2
    tree(
        cgroup,
        {
            "app.slice/memory.max": str(128 * 2**20),
            "app.slice/memory.current": str(100 * 2**20),
            "app.slice/cpu.max": "20000 100000",
            "app.slice/cpu.stat": "usage_usec 9000000",
        },
    )

    assert group.memory() == MemoryNow(100 * 2**20, 128 * 2**20)
    assert group.cpu() == CpuTotals(0.2, 9.0)


def test_without_a_limit_the_machine_is_what_counts(tmp_path):
    """A group without quota and limit says nothing about how full we are."""
    cgroup = tree(
        tmp_path / "cgroup",
        {"cgroup.controllers": "cpu", "a/cpu.max": "max 100000", "a/memory.max": "max", "a/memory.current": "5"},
    )
    group = find_group(proc(tmp_path, "0::/a\n"), cgroup)

    assert (group.cpu(), group.memory(), group.disk()) == (None, None, None)


def test_a_limit_above_the_machine_is_none(v2):
    """More memory than there is cannot be used up."""
    group, cgroup = v2
    huge = str(psutil.virtual_memory().total + 1)
    tree(cgroup, {"app.slice/web/memory.max": huge, "app.slice/memory.max": huge})

    assert group.memory() is None


def test_a_container_that_sees_its_group_as_the_mount(tmp_path):
    """Under a path of the host that does not exist inside, the mount itself is our group."""
    cgroup = tree(
        tmp_path / "cgroup",
        {"cgroup.controllers": "cpu", "cpu.max": "150000 100000", "cpu.stat": "usage_usec 1000"},
    )

    group = find_group(proc(tmp_path, "0::/kubepods/pod7/web\n"), cgroup)

    assert group.cpu() == CpuTotals(min(1.5, CPUS), 0.001)


def test_version_one_is_read_where_two_is_not(tmp_path):
    """The older hierarchies name and count the same things differently."""
    cgroup = tree(
        tmp_path / "cgroup",
        {
            "cpu,cpuacct/docker/7/cpu.cfs_quota_us": "30000\n",
            "cpu,cpuacct/docker/7/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/docker/7/cpu.stat": "nr_periods 10\nnr_throttled 1\nthrottled_time 5\n",
            "cpu,cpuacct/docker/7/cpuacct.usage": "2500000000\n",
            "memory/docker/7/memory.limit_in_bytes": str(64 * 2**20),
            "memory/docker/7/memory.usage_in_bytes": str(60 * 2**20),
            "memory/docker/7/memory.stat": f"cache 1\ntotal_inactive_file {20 * 2**20}\n",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "unified/cgroup.procs": "",
        },
    )
    lines = "4:memory:/docker/7\n2:cpu,cpuacct:/docker/7\n1:name=systemd:/\n0::/docker/7\n"

    group = find_group(proc(tmp_path, lines), cgroup)

    assert group.cpu() == CpuTotals(0.3, 2.5, 10, 1)
    assert group.memory() == MemoryNow(40 * 2**20, 64 * 2**20)
    assert group.disk() is None


def test_version_one_without_limits(tmp_path):
    """A quota of -1 and a limit of nearly 2^63 mean that there is none."""
    files = {
        "cpu/cpu.cfs_quota_us": "-1",
        "cpu/cpu.cfs_period_us": "100000",
        "cpuacct/cpuacct.usage": "1",
        "memory/memory.limit_in_bytes": "9223372036854771712",
    }
    group = find_group(proc(tmp_path, "3:memory:/\n2:cpuacct:/\n1:cpu:/\n"), tree(tmp_path / "cgroup", files))

    assert (group.cpu(), group.memory()) == (None, None)


def test_without_control_groups_nothing_limits(tmp_path):
    """A machine without cgroups, or a process that may not see them, is no error."""
    group = find_group(tmp_path / "no-proc", tmp_path / "no-cgroup")

    assert (group.cpu(), group.memory(), group.disk()) == (None, None, None)


def test_unreadable_files_are_unknown_figures(v2):
    """Garbage in one file costs that figure and no other."""
    group, cgroup = v2
    tree(cgroup, {"app.slice/web/memory.current": "what?", "app.slice/web/cpu.stat": ""})

    assert group.memory() is None
    assert group.cpu() == CpuTotals(0.5, 0.0)
    assert group.disk() == Pair(1024, 100)


EARLIER = HostTotals(10.0, CpuTotals(2.0, 5.0, 100, 10), MemoryNow(1, 2), Pair(1_000, 2_000), Pair(10, 20))


def test_rates_are_differences_over_true_time():
    """Two seconds of two CPUs, of which one was busy, and bytes per second."""
    later = HostTotals(12.0, CpuTotals(2.0, 7.0, 120, 15), MemoryNow(3, 4), Pair(1_500, 2_000), Pair(30, 100))

    host = between(EARLIER, later)

    assert (host.cpu_percent, host.cpus, host.cpu_throttled_ratio) == (50.0, 2.0, 0.25)
    assert (host.memory_bytes, host.memory_bytes_max) == (3, 4)
    assert (host.disk_read_bytes_per_s, host.disk_write_bytes_per_s) == (250.0, 0.0)
    assert (host.network_received_bytes_per_s, host.network_sent_bytes_per_s) == (10.0, 40.0)


def test_the_first_reading_knows_no_rates():
    """A CPU percentage since boot, or since nothing, would be meaningless; memory is known at once."""
    host = between(None, EARLIER)

    assert (host.cpu_percent, host.cpu_throttled_ratio) == (None, None)
    assert (host.disk_read_bytes_per_s, host.network_sent_bytes_per_s) == (None, None)
    assert host.memory_bytes == 1


def test_counters_that_went_back_are_unknown():
    """A disk that was removed or a group that was made anew yields None, not a negative rate."""
    host = between(EARLIER, HostTotals(12.0, CpuTotals(2.0, 1.0), None, Pair(5, 9_000), Pair(10, 5)))

    assert (host.cpu_percent, host.memory_bytes) == (None, None)
    assert (host.disk_read_bytes_per_s, host.disk_write_bytes_per_s) == (None, None)
    assert (host.network_received_bytes_per_s, host.network_sent_bytes_per_s) == (None, None)


def test_two_readings_at_one_instant_know_no_rates():
    """Nothing is divided by zero seconds."""
    assert between(EARLIER, EARLIER).cpu_percent is None


def test_figures_that_the_machine_does_not_tell_are_none():
    """A platform without disk or CPU counters is told as unknown."""
    nothing = HostTotals(12.0, None, None, None, None)

    host = between(EARLIER, nothing)

    assert (host.cpu_percent, host.cpus, host.disk_read_bytes_per_s) == (None, CPUS, None)


def test_the_machine_itself_is_readable():
    """On the machine that runs this test, all figures are there and plausible."""
    clock = FakeClock()
    probe = HostProbe(clock)
    first = probe.read()
    clock.advance(1.0)
    second = probe.read()

    assert first.cpu_percent is None
    assert 0.0 <= second.cpu_percent <= 100.0
    assert 0 < second.memory_bytes < second.memory_bytes_max
    assert second.network_received_bytes_per_s >= 0.0
    assert 0 < machine_cpu().cpus <= (os.cpu_count() or 1)
    assert 0 < machine_memory().used < machine_memory().limit
    assert machine_network().inward >= 0


@pytest.mark.parametrize(
    ("figure", "read"),
    [
        ("cpu_times", machine_cpu),
        ("virtual_memory", machine_memory),
        ("disk_io_counters", machine_disk),
        ("net_io_counters", machine_network),
    ],
)
def test_a_figure_that_the_machine_refuses_is_none(monkeypatch, figure, read):
    """Hardened containers deny some of /proc; the monitor goes on without."""

    def refused(**_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(psutil, figure, refused)

    assert read() is None


def test_a_machine_without_disks(monkeypatch):
    """Diskless machines have no counters at all."""
    monkeypatch.setattr(psutil, "disk_io_counters", lambda: None)

    assert machine_disk() is None


def test_an_idle_machines_busy_time_stands_still(monkeypatch):
    """A second in which nothing ran is 0 %, not unknown because rounding let the sum of large figures go back."""
    at_first = psutil.cpu_times(percpu=True)[0]._replace(
        user=259_402.67, nice=53_081.73, system=18_297.63, idle=193_264.87
    )
    other = {"iowait": 240.83, "irq": 0.0, "softirq": 133.71, "steal": 8.61}
    at_first = at_first._replace(**{name: seconds for name, seconds in other.items() if name in at_first._fields})
    readings = [[at_first], [at_first._replace(idle=at_first.idle + 1.0)]]
    monkeypatch.setattr("headrace.monitor.host._own_cpus", lambda: [0])
    monkeypatch.setattr(psutil, "cpu_times", lambda **_options: readings.pop(0))

    earlier, later = machine_cpu(), machine_cpu()

    assert later == earlier


def test_a_process_knows_its_own_use():
    """CPU only from the second reading on; a second's worth of work is seen."""
    clock = FakeClock()
    probe = ProcessProbe(clock)
    first = probe.read()
    clock.advance(0.5)
    begun_s = probe._process.cpu_times().user
    while probe._process.cpu_times().user < begun_s + 0.05:
        sum(range(10_000))
    second = probe.read()

    assert first.cpu_ratio is None
    assert second.cpu_ratio > 0.0
    assert second.memory_bytes > 1_000_000
