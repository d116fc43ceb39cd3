"""A strict reader of both exposition formats: what Prometheus would refuse, this refuses with a reason."""

import math
import re
from dataclasses import dataclass, field

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf"({NAME})(?:\{{(.*)\}})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(,|$)')
NUMBER = re.compile(r"[+-]?(?:\d+(?:\.\d+)?(?:e[+-]?\d+)?|Inf|NaN)")
SUFFIXES = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


@dataclass
class Family:
    kind: str
    help: str
    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)


def read(text: str, *, openmetrics: bool = False) -> dict[str, Family]:
    """The families of an exposition, by name."""
    assert text.endswith("\n"), "the last line must be ended"
    lines = text[:-1].split("\n")
    if openmetrics:
        assert lines.pop() == "# EOF", "OpenMetrics ends with EOF"
    families: dict[str, Family] = {}
    current = None
    while lines:
        line = lines.pop(0)
        if line.startswith("# HELP "):
            _, _, name, words = line.split(" ", 3)
            assert name not in families, f"{name} appears in two places"
            assert re.fullmatch(NAME, name), name
            marker, kind_word, same, kind = lines.pop(0).split(" ")
            assert (marker, kind_word, same) == ("#", "TYPE", name), f"HELP of {name} without its TYPE"
            assert kind in SUFFIXES, kind
            current = families[name] = Family(kind, words)
        else:
            assert current is not None, f"a sample before any family: {line}"
            _take(name, current, line, openmetrics=openmetrics)
    for name, family in families.items():
        assert family.samples, f"{name} has no sample"
        if family.kind == "histogram":
            _check_histogram(name, family)
    return families


def _take(name: str, family: Family, line: str, *, openmetrics: bool) -> None:
    match = SAMPLE.fullmatch(line)
    assert match, f"not a sample: {line!r}"
    suffixes = ["_total"] if openmetrics and family.kind == "counter" else SUFFIXES[family.kind]
    assert match[1] in {name + suffix for suffix in suffixes}, f"{match[1]} does not belong to {name}"
    assert NUMBER.fullmatch(match[3]), f"not a number: {match[3]}"
    key = (match[1].removeprefix(name), _labels(match[2] or ""))
    assert key not in family.samples, f"twice: {line}"
    family.samples[key] = float(match[3])


def _labels(text: str) -> tuple[tuple[str, str], ...]:
    found, position = [], 0
    while position < len(text):
        match = LABEL.match(text, position)
        assert match, f"not labels: {text[position:]!r}"
        found.append((match[1], re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), match[2])))
        position = match.end()
    names = [name for name, _ in found]
    assert len(names) == len(set(names)), f"a label twice: {names}"
    return tuple(found)


def _check_histogram(name: str, family: Family) -> None:
    """Buckets rise, the last is +Inf and equals the count, and there is a sum."""
    series: dict[tuple[tuple[str, str], ...], list[tuple[float, float]]] = {}
    for (suffix, labels), value in family.samples.items():
        if suffix == "_bucket":
            bound = float(dict(labels)["le"].replace("Inf", "inf"))
            rest = tuple(pair for pair in labels if pair[0] != "le")
            series.setdefault(rest, []).append((bound, value))
    for labels, buckets in series.items():
        assert buckets == sorted(buckets), f"{name}{labels}: bounds or counts fall"
        assert [value for _, value in buckets] == sorted(value for _, value in buckets), f"{name}{labels}: counts fall"
        assert buckets[-1] == (math.inf, family.samples["_count", labels]), f"{name}{labels}: +Inf is not the count"
        assert ("_sum", labels) in family.samples, f"{name}{labels}: no sum"
