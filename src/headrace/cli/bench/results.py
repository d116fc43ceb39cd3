"""Everything that a run found out, and its JSON."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from headrace.cli.bench.context import BenchConfig, LoadRecord
from headrace.cli.bench.machine import Machine
from headrace.cli.bench.scenario import Measurement, Scenario, State
from headrace.cli.bench.targets import Target

FORMAT = 1
"""Raised when a key of the JSON changes its meaning or goes."""


@dataclass(slots=True, kw_only=True)
class Results:
    """Filled while scenarios run; what is there is true at any time."""

    machine: Machine
    """What it was measured on."""
    config: BenchConfig
    """How it was measured."""
    unmeasured: tuple[Target, ...]
    """Targets that no scenario of this run stands for."""
    measurements: list[tuple[Scenario, Measurement]] = field(default_factory=list)
    """In order of running."""
    failures: dict[str, str] = field(default_factory=dict)
    """Scenario to what kept it from measuring."""
    records: list[LoadRecord] = field(default_factory=list)
    """The load reports behind the measurements."""

    def add(self, scenario: Scenario, measurements: Sequence[Measurement]) -> None:
        """Keep what a scenario measured."""
        self.measurements += [(scenario, measurement) for measurement in measurements]

    def fail(self, scenario: Scenario, why: str) -> None:
        """Keep why a scenario could not measure; its targets are listed as not measured."""
        self.failures[scenario.name] = why
        note = why.splitlines()[0]
        self.add(scenario, [Measurement(target=t, case="", values=(), note=note) for t in scenario.targets])

    @property
    def all_met(self) -> bool:
        """Whether everything that this run was to measure was measured and holds."""
        return all(measurement.state is State.MET for _, measurement in self.measurements)


def to_json(results: Results) -> bytes:
    """For programs, and for comparing runs: every value of every round, with the evidence."""
    config = results.config
    document = {
        "format": FORMAT,
        "machine": results.machine,
        "run": {
            "rounds": config.rounds,
            "seconds": config.seconds,
            "warmup_s": config.warmup_s,
            "connections": config.connections,
            "workers": config.workers if config.url is None else None,
            "url": config.url,
        },
        "measurements": [_measurement(scenario, measurement) for scenario, measurement in results.measurements],
        "not_measured": [target.name for target in results.unmeasured],
        "failures": results.failures,
        "loads": results.records,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def write_json(path: Path, results: Results) -> None:
    """Write the whole file or leave the old one."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_bytes(to_json(results))
    draft.replace(path)


def _measurement(scenario: Scenario, measurement: Measurement) -> dict[str, Any]:
    target = measurement.target
    return {
        "scenario": scenario.name,
        "target": target.name,
        "title": target.title,
        "case": measurement.case,
        "limit": target.limit,
        "unit": target.unit,
        "direction": target.direction,
        "measured": measurement.measured,
        "spread": measurement.spread,
        "values": measurement.values,
        "failed_share": measurement.failed_share,
        "state": measurement.state,
        "note": measurement.note,
    }
