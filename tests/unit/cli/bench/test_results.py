import msgspec

from headrace.cli.bench.results import to_json, write_json
from headrace.cli.bench.scenario import Measurement
from headrace.cli.bench.targets import API_P50
from tests.unit.cli.bench.circumstances import READS, results


def test_json_keeps_every_round_with_verdict_machine_and_evidence():
    """What the table shows can be computed again from the file, and it says where it was measured."""
    document = msgspec.json.decode(to_json(results()))

    assert document["machine"]["cpu"] == "Difference Engine"
    assert document["run"]["rounds"] == 3
    assert document["measurements"][0] == {
        "scenario": "reads",
        "target": "api-p50",
        "title": "API response time, p50",
        "case": "1,000/s",
        "limit": 100,
        "unit": "ms",
        "direction": "below",
        "measured": 12.25,
        "spread": [11.0, 14.5],
        "values": [12.25, 11.0, 14.5],
        "failed_share": 0.0,
        "state": "met",
        "note": "",
    }
    assert [each["state"] for each in document["measurements"]] == ["met", "missed", "not measured"]
    assert document["measurements"][2]["measured"] is None
    assert document["not_measured"] == ["api-p99"]
    assert document["failures"] == {"memory": "The server went away.\nIts output ended with:\nTraceback"}
    assert document["loads"][0]["report"]["latency_ms"]["max"] == 2.0


def test_json_does_not_hold_the_token():
    """A secret that was needed to measure is not part of the result."""
    assert b"secret-token" not in to_json(results())
    assert "secret-token" not in repr(results())


def test_a_file_is_replaced_as_a_whole(tmp_path):
    """The old file is there until the new one is complete, and nothing is left beside it."""
    file = tmp_path / "results.json"
    file.write_text("old")

    write_json(file, results())

    assert msgspec.json.decode(file.read_bytes())["format"] == 1
    assert list(tmp_path.iterdir()) == [file]


def test_all_is_met_only_when_everything_was_measured_and_holds():
    """What could not be measured is not met."""
    found = results()
    only_met = results()
    only_met.measurements = [(READS, Measurement(target=API_P50, case="", values=(1.0,)))]

    assert not found.all_met
    assert only_met.all_met
