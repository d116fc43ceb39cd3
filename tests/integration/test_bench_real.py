"""`headrace bench` against what it is made for: a `headrace up` that it starts and stops itself."""

import subprocess
import sys

import msgspec
import pytest


@pytest.mark.slow
@pytest.mark.timeout(175)
def test_the_real_service_is_started_measured_and_stopped(tmp_path):
    """Every call that scenarios make is answered as they expect, and nothing is left running."""
    file = tmp_path / "results.json"
    quick = ["--rounds", "1", "--seconds", "0.5", "--connections", "8", "--workers", "1"]
    command = [sys.executable, "-m", "headrace", "bench", "--only", "agents", "--only", "memory", *quick]

    done = subprocess.run(
        [*command, "--json", str(file)], cwd=tmp_path, capture_output=True, text=True, timeout=165, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    document = msgspec.json.decode(file.read_bytes())
    assert document["failures"] == {}
    states = {each["target"]: each["state"] for each in document["measurements"]}
    assert states.keys() == {"agent-cold", "agent-warm", "server-memory"}
    assert "not measured" not in states.values()
