"""`headrace bench` as a whole, against a small server that speaks the API's paths."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
from click.testing import CliRunner, Result

from headrace.cli.bench import bench
from headrace.cli.bench.search import RateSearch
from headrace.cli.bench.targets import Target
from tests.unit.cli.bench import stand_in

ROOT = Path(__file__).parents[2]
MEASURES_FOR_A_MINUTE = """
import sys
from headrace.cli.bench.catalogue import chosen
from headrace.cli.bench.context import BenchConfig
from headrace.cli.bench.screen import measure

def command(directory):
    return [sys.executable, sys.argv[1], "up", "--workers", "1", "--directory", str(directory), "--port", "0"]

measure(chosen(("api-status",)), BenchConfig(seconds=60), is_complete=False, command=command)
"""


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A stand-in for `headrace up`, running."""
    up = [sys.executable, stand_in.__file__, "up", "--directory", "unused", "--port", "0", "--workers", "1"]
    with subprocess.Popen(up, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield line.rpartition(" ")[2].strip()
        process.terminate()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(bench, arguments, catch_exceptions=False)


def run_quickly(url: str, *arguments: str) -> Result:
    return run("--url", url, "--rounds", "1", "--seconds", "0.3", "--connections", "8", *arguments)


def test_list_shows_targets_with_what_measures_them_and_measures_nothing():
    """Those without a scenario are honest about it."""
    result = run("--list")

    assert result.exit_code == 0
    assert "API response time, p99.9" in result.stdout
    assert "api-status, api-execute" in result.stdout
    assert "not measured yet" in result.stdout


def test_an_unknown_name_is_a_usage_error_with_a_suggestion():
    """Nothing is started for a slip of the pen."""
    result = run("--only", "api-statsu")

    assert result.exit_code == 2
    assert "'api-statsu' is neither a scenario nor a group" in result.stderr
    assert "Did you mean 'api-status'?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--url", "https://example.org"), "not plain HTTP"),
        (("--json", "no/such/directory/out.json"), "does not exist"),
        (("--rounds", "0"), "not in the range"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(arguments, complaint):
    """A run of minutes does not end in a typing error."""
    result = run(*arguments)

    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())


@pytest.mark.slow
def test_latency_is_measured_at_every_rate_with_table_json_and_progress(url, tmp_path):
    """The table on stdout, the progress on stderr, every value in the file."""
    file = tmp_path / "results.json"

    result = run_quickly(url, "--only", "api-status", "--only", "api-execute", "--json", str(file))

    assert result.exit_code == 0
    assert "status, 10,000/s" in result.stdout
    assert "1 of 2 api-status: status, 1,000/s, round 1 of 1" in result.stderr
    document = msgspec.json.decode(file.read_bytes())
    assert len(document["measurements"]) == 24
    assert [each["report"]["offered_per_s"] for each in document["loads"]] == [1_000, 5_000, 10_000] * 2
    assert {each["target"] for each in document["measurements"]} == {"api-p50", "api-p95", "api-p99", "api-p99.9"}
    slowest_rate = document["loads"][0]["report"]
    assert slowest_rate["ok"] == slowest_rate["requests"] == 300


def test_starts_and_memory_are_measured(url, monkeypatch):
    """Fresh agents, warm agents, and what the worker processes hold; with all targets met, --strict is content."""
    monkeypatch.setattr(Target, "is_met_by", lambda target, value: value > 0)  # on the slowest machine, too

    result = run_quickly(url, "--only", "agents", "--only", "memory", "--strict")

    assert result.exit_code == 0
    for case in ("slowest of 20", "slowest of 200", "PSS, 1 worker after load", "RSS, 1 worker after load"):
        assert case in result.stdout
    assert "missed" not in result.stdout
    assert "not measured" not in result.stdout


@pytest.mark.slow
def test_throughput_is_searched_and_then_held(url, tmp_path, monkeypatch):
    """The peak is the highest rate that holds for a moment, the sustained rate one that holds for a while."""
    monkeypatch.setattr("headrace.cli.bench.api.holds", lambda report: report.ok > 0 and report.offered_per_s <= 700)
    file = tmp_path / "results.json"

    result = run_quickly(url, "--only", "api-throughput", "--json", str(file))

    assert result.exit_code == 0
    peak, sustained = msgspec.json.decode(file.read_bytes())["measurements"]
    assert (peak["target"], sustained["target"]) == ("api-peak", "api-sustained")
    assert 700 / RateSearch().precision <= peak["measured"] <= 700
    assert sustained["measured"] == peak["measured"]


def test_a_server_that_is_not_there_is_not_measured_and_fails_the_command():
    """Exit code 1 means that something could not be measured, with or without --strict."""
    result = run_quickly("http://127.0.0.1:1", "--only", "agent-warm-start")

    assert result.exit_code == 1
    assert "not measured" in result.stdout
    assert "agent-warm-start: No connection to 127.0.0.1:1" in result.stderr


def test_strict_fails_when_a_target_is_missed_and_only_then(url, monkeypatch):
    """Without --strict, a missed target is a finding and not a failure."""
    monkeypatch.setattr("headrace.cli.bench.scenario.FAILED_SHARE_MAX", -1.0)

    lenient = run_quickly(url, "--only", "agent-warm-start")
    strict = run_quickly(url, "--only", "agent-warm-start", "--strict")

    assert "missed" in lenient.stdout
    assert (lenient.exit_code, strict.exit_code) == (0, 1)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_and_the_server_that_it_started(signal_number):
    """Ctrl-C and SIGTERM leave nothing behind, whatever was going on."""
    command = [sys.executable, "-c", MEASURES_FOR_A_MINUTE, stand_in.__file__]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "round 1 of 3" not in process.stderr.readline():
            assert process.poll() is None
        family = psutil.Process(process.pid).children(recursive=True)

        process.send_signal(signal_number)
        process.communicate(timeout=60)

    assert len(family) >= 1
    assert process.returncode != 0
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
