"""The counters as Prometheus reads them: text exposition 0.0.4, or OpenMetrics 1.0 for those who ask for it.

Written from one fold, so any process answers for all of them. Gauges belong to a process and carry its slot as a
label. Histograms are told with classic buckets: powers of two from 122 us to 64 s, which are limits of our own
buckets, and the exact counts at 100 and 200 ms. Where two cells of one histogram were read at different instants, a
later bucket could count less than an earlier one by a request; it is lifted to it, because readers treat a falling
bucket as a broken series.

https://github.com/prometheus/docs/blob/main/docs/instrumenting/exposition_formats.md,
https://github.com/prometheus/OpenMetrics/blob/v1.0.0/specification/OpenMetrics.md
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Final, NamedTuple

from headrace.monitor.catalogue import HELP, PROCESSES_RETIRED, SERIES_REFUSED
from headrace.monitor.histogram import LIMITS_S, Distribution
from headrace.monitor.slots import Folded, Series

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# Each bound with its exponent; those that are counted exactly need none, though 0.5 and 1 s are powers of two as well.
_BOUNDS: Final = sorted(
    {**{math.ldexp(1.0, exponent): exponent for exponent in range(-13, 7)}, **dict.fromkeys(LIMITS_S)}.items()
)


class Family(NamedTuple):
    """All samples under one name."""

    kind: str
    lines: list[str]


def negotiate(accept: str) -> str:
    """The content type for a request's Accept header. OpenMetrics only for those who name it and do not refuse it."""
    for part in accept.split(","):
        words = [word.strip().lower() for word in part.split(";")]
        if words[0] == "application/openmetrics-text" and not {"q=0", "q=0.0", "version=0.0.1"} & set(words[1:]):
            return OPENMETRICS
    return TEXT


def exposition(folded: Folded, content_type: str = TEXT) -> bytes:
    """Everything that was counted, in one of the two formats."""
    is_open = content_type == OPENMETRICS
    parts: list[str] = []
    for name, family in sorted(_families(folded, is_open=is_open).items()):
        # OpenMetrics names the family of a counter without the suffix that its samples carry.
        title = name.removesuffix("_total") if is_open and family.kind == "counter" else name
        parts.append(f"# HELP {title} {_help(name, is_open=is_open)}\n# TYPE {title} {family.kind}\n")
        parts.extend(family.lines)
    if is_open:
        parts.append("# EOF\n")
    return "".join(parts).encode()


def _families(folded: Folded, *, is_open: bool) -> Mapping[str, Family]:
    families: dict[str, Family] = {}
    totals = {**folded.counters, Series(SERIES_REFUSED): folded.refused, Series(PROCESSES_RETIRED): folded.retired}
    for series, value in sorted(totals.items()):
        # In OpenMetrics a counter's sample must end in _total; whoever names one otherwise gets the suffix there.
        name = series.name if not is_open or series.name.endswith("_total") else f"{series.name}_total"
        _add(families, "counter", name, [_sample(name, series.labels, str(value))])
    for slot in folded.slots:
        for series, gauge in sorted(slot.gauges.items()):
            labels = (*series.labels, ("slot", str(slot.slot)))
            _add(families, "gauge", series.name, [_sample(series.name, labels, _number(gauge))])
    for series, distribution in sorted(folded.histograms.items(), key=_by_series):
        _add(families, "histogram", series.name, _histogram(series, distribution))
    return families


def _by_series(item: tuple[Series, Distribution]) -> Series:
    return item[0]


def _add(families: dict[str, Family], kind: str, name: str, lines: Iterable[str]) -> None:
    """A name has one kind. Processes of two versions may disagree; the first one counts and the rest stays out."""
    family = families.setdefault(name, Family(kind, []))
    if family.kind == kind:
        family.lines.extend(lines)


def _histogram(series: Series, distribution: Distribution) -> Iterator[str]:
    count = distribution.count
    reached = 0
    for bound, exponent in _BOUNDS:
        at_most = count - distribution.over(bound) if exponent is None else distribution.at_most(exponent)
        reached = min(count, max(reached, at_most))
        yield _sample(f"{series.name}_bucket", (*series.labels, ("le", _number(bound))), str(reached))
    yield _sample(f"{series.name}_bucket", (*series.labels, ("le", "+Inf")), str(count))
    yield _sample(f"{series.name}_sum", series.labels, _number(distribution.sum_s))
    yield _sample(f"{series.name}_count", series.labels, str(count))


def _sample(name: str, labels: Iterable[tuple[str, str]], value: str) -> str:
    inner = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels)
    return f"{name}{{{inner}}} {value}\n" if inner else f"{name} {value}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _help(name: str, *, is_open: bool) -> str:
    text = HELP.get(name, "Handed in by a room of the application.")
    return _escaped(text) if is_open else text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    """A float as both formats write it: shortest digits that read back the same, and NaN and infinities by name."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
