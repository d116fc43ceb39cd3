"""An agent that reads a web server's access log and says what happened: traffic, errors, bursts and growth.

    headrace agents run log_analyst --file log=examples/data/access.log

It understands the common and the combined format of Apache and nginx, and tab-separated lines under a header with at
least time, method, path, status and bytes. A line that it cannot read is counted and shown, and never stops the run.
All times are UTC.

Bursts: requests are counted in equal steps of time. A step is a burst when its count lies far above the median,
measured in spreads (1.4826 x the median absolute deviation) [1]. Growth: each step of the last third is compared with
its counterpart in the first third, and the median difference counts. Intuition: a median does not care how high a
spike is, so one bad minute neither hides the next one nor looks like growth. In a log of less than three days, where
the thirds hold different hours, the rhythm of day and night counts as growth too.

[1] Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993.
"""

import asyncio
import heapq
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from reprlib import repr as short
from statistics import median
from typing import Any, NamedTuple, Protocol, TypeVar

Item = TypeVar("Item")

LINE_CHARACTERS_MAX = 16_384
"""A longer line counts as malformed: servers refuse such requests, and no single line may hold up the event loop."""

TURN_CHARACTERS = 16_384
TURN_LINES = 1_000
TURN_ITEMS = 1_000
"""The event loop gets a turn after this much of the log, or this many entries of a list: one or two milliseconds."""

RESERVE_S = 0.25
"""When less time than this is left, reading stops and the report says how far it came: better than no answer."""

STEP_MINUTES = (1, 5, 10, 15, 30, 60, 360, 1_440)
"""Possible lengths of a step; each divides a day."""

STEP_REQUESTS_MIN = 10
"""A step should hold this many requests on average; thinner counts are mostly noise."""

STEPS_MIN = 12
"""With fewer steps than this a median says nothing, and neither do we."""

STEPS_MAX = 1_500

BURST_SPREADS = 5.0
"""The literature says 3.5 for symmetric data; counts lean to the right, and we look up to 1,500 times."""

GROWTH_RATIO_MIN = 1.25
"""A smaller change is called steady, however certain it is."""

HOURS_MAX = 400
HOURS_SHOWN_MAX = 24
SAMPLES_MAX = 5
TEXT_CHARACTERS_MAX = 160
NOT_HTTP = "(not an HTTP request)"


class Context(Protocol):
    """What this agent uses of the context that the host gives to every execution."""

    def remaining_s(self) -> float | None:
        """Seconds until the deadline, or None when there is none."""

    def progress(self, done: int, total: int, note: str = "") -> None:
        """Tell whoever watches how far the work is."""


class Agent:
    """Reads an access log and reports traffic, errors, bursts and growth."""

    def get_capabilities(self) -> dict[str, Any]:
        """What the agent does, what it takes (a JSON schema) and what it returns."""
        return {
            "name": "log_analyst",
            "description": "Reads an access log: traffic, errors, busiest paths and hours, bursts and growth.",
            "input": {
                "type": "object",
                "properties": {
                    "log": {"type": "string", "description": "Common or combined format, or TSV with a header."},
                    "top": {"type": "integer", "minimum": 1, "maximum": 100, "default": 10},
                },
                "required": ["log"],
                "additionalProperties": False,
            },
            "output": "title, summary and tables to show; requests, bytes, classes, error_rate, paths, errors, hours, "
            "busiest_hour, bursts, trend, malformed and more to compute with. `complete` is false when the deadline "
            "came before the end of the log.",
        }

    async def execute(self, input: dict[str, Any], context: Context) -> dict[str, Any]:
        """Analyse `input["log"]`; raise ValueError when the input does not follow the schema of `get_capabilities`."""
        log, top = read_input(input)
        pace = Pace(context, total=len(log))
        lines = Lines(log)
        tally = Tally()
        for number, line in enumerate(lines, start=1):
            tally.read(number, line)
            if not await pace.allows(lines.position):
                break
        facts = {"read_share": lines.position / len(log) if log else 1.0, "complete": lines.position == len(log)}
        facts |= await draw_conclusions(tally, top)
        return {"title": "Access log", "summary": summary(facts), "tables": tables(facts, top), **facts}


def read_input(input: Any) -> tuple[str, int]:
    """The log and the length of the top lists, checked."""
    if type(input) is not dict:
        raise ValueError(f"The input is {short(input)}, but must be an object: send {{'log': '...'}}.")
    unknown = sorted(set(input) - {"log", "top"})
    if unknown:
        raise ValueError(f"The input has the key {short(unknown[0])}; only `log` and `top` exist: remove it.")
    log = input.get("log")
    if type(log) is not str:
        raise ValueError(f"`log` is {short(log)}, but must be text: send the content of the file.")
    top = input.get("top", 10)
    if type(top) is not int or not 1 <= top <= 100:
        raise ValueError(f"`top` is {short(top)}, but must be an integer from 1 to 100: send 10, or leave it out.")
    return log.removeprefix("\ufeff"), top


class Pace:
    """Keeps a long loop polite: gives other tasks a turn, tells the progress, watches the deadline."""

    def __init__(self, context: Context, *, total: int) -> None:
        self._context = context
        self._total = total
        self._next_turn = TURN_CHARACTERS
        self._lines = 0

    async def allows(self, done: int) -> bool:
        """Whether there is time to go on after one more line, which ended at the character `done`."""
        self._lines += 1
        if done < self._next_turn and self._lines < TURN_LINES:
            return True
        self._next_turn = done + TURN_CHARACTERS
        self._lines = 0
        self._context.progress(done, self._total, "reading the log")
        await asyncio.sleep(0)
        remaining_s = self._context.remaining_s()
        return remaining_s is None or remaining_s > RESERVE_S


class Lines:
    """The lines of a text, one after the other: str.splitlines would cut up everything at once, without a turn."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.position = 0
        """Where the next line begins."""

    def __iter__(self) -> Iterator[str]:
        while self.position < len(self._text):
            end = self._text.find("\n", self.position)
            start, end = self.position, end if end >= 0 else len(self._text)
            self.position = min(end + 1, len(self._text))
            yield self._text[start:end].removesuffix("\r")


# -- from a line to a request -------------------------------------------------------------------------------------


class Request(NamedTuple):
    """What a line says, in any format."""

    minute: int
    """Minutes since 1970-01-01 UTC."""
    path: str
    """Without the query: /search?q=a and /search?q=b are one path."""
    status: int
    bytes: int


class Reader(NamedTuple):
    """A format, and how to read it."""

    format: str
    read: Callable[[str], Request | None]
    """None for a line that does not follow the format."""


COMMON_LINE = re.compile(
    r"\S+ \S+ \S+ "  # client, identity, user
    r"\[(\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d):\d\d ([+-]\d{4})\] "
    r'"([^"\\]*(?:\\.[^"\\]*)*)" '  # the request line, in which \" stands for a quotation mark
    r"([1-5]\d\d) (\d{1,18}|-)"
    r'(?: (")?|$)',  # a quoted referrer follows in the combined format
    re.ASCII,
)
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
TSV_COLUMNS = ("time", "path", "status", "bytes")
TSV_STATUS = re.compile(r"[1-5]\d\d", re.ASCII)
TSV_BYTES = re.compile(r"\d{1,18}|-", re.ASCII)
EPOCH = re.compile(r"\d{1,11}(?:\.\d{1,9})?", re.ASCII)


def choose_reader(line: str) -> Reader | None:
    """The format of a log, told from one line: a TSV header, or a line in the common format."""
    if len(line) > LINE_CHARACTERS_MAX:
        return None
    names = [name.strip().lower() for name in line.split("\t")]
    if {"method", *TSV_COLUMNS} <= set(names):
        return Reader("tsv", tsv_reader(names))
    match = COMMON_LINE.match(line)
    return Reader("combined" if match[6] else "common", read_common) if match else None


def read_common(line: str) -> Request | None:
    """One line in the common or combined format."""
    match = COMMON_LINE.match(line)
    if match is None:
        return None
    stamp, offset, request_line, status, size, _ = match.groups()
    minute = common_minute(stamp, offset)
    if minute is None:
        return None
    return Request(minute, requested_path(request_line), int(status), 0 if size == "-" else int(size))


@lru_cache(maxsize=4_096)  # hundreds of lines share a minute
def common_minute(stamp: str, offset: str) -> int | None:
    """Minutes since 1970 of `10/Oct/2000:13:55` at `-0700`; None when there is no such time."""
    date, hour, minute = stamp.split(":")
    day, month, year = date.split("/")
    east_minutes = int(offset[:3]) * 60 + int(offset[0] + offset[3:])
    try:
        local = datetime(int(year), MONTHS.index(month) + 1, int(day), int(hour), int(minute), tzinfo=UTC)
    except ValueError:
        return None
    return whole_minute(local.timestamp() / 60 - east_minutes)


def requested_path(request_line: str) -> str:
    """The path of `GET /path?query HTTP/1.1`. Scanners send anything at all, which servers log and answer with 400."""
    words = request_line.split(" ")
    if len(words) not in (2, 3) or not words[0].isalpha() or not words[1]:
        return NOT_HTTP
    return words[1].partition("?")[0]


def tsv_reader(names: list[str]) -> Callable[[str], Request | None]:
    """A reader of lines whose columns stand in the order of `names`."""
    time_at, path_at, status_at, bytes_at = (names.index(name) for name in TSV_COLUMNS)

    def read(line: str) -> Request | None:
        cells = line.split("\t")
        if len(cells) != len(names):
            return None
        status, size, minute = cells[status_at], cells[bytes_at], tsv_minute(cells[time_at])
        if minute is None or not TSV_STATUS.fullmatch(status) or not TSV_BYTES.fullmatch(size):
            return None
        return Request(minute, cells[path_at].partition("?")[0], int(status), 0 if size == "-" else int(size))

    return read


def tsv_minute(text: str) -> int | None:
    """Minutes since 1970 of an ISO 8601 time (UTC unless it says otherwise) or of seconds since 1970."""
    if EPOCH.fullmatch(text):
        return whole_minute(float(text) / 60)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return whole_minute((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() / 60)


def whole_minute(minute: float) -> int | None:
    """The minute in which this time lies, if it is in the years 1970 to 2199: the rest are broken clocks."""
    return math.floor(minute) if 0 <= minute < 120_968_640 else None


# -- from requests to sums ----------------------------------------------------------------------------------------


class Traffic:
    """The sums of one path."""

    __slots__ = ("bytes", "errors", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.errors = 0
        self.bytes = 0


class Tally:
    """The sums over all lines read so far."""

    def __init__(self) -> None:
        self.reader: Reader | None = None
        self.requests = 0
        self.bytes = 0
        self.statuses: Counter[int] = Counter()
        self.errors: Counter[tuple[int, str]] = Counter()
        self.paths: dict[str, Traffic] = {}
        self.minutes: Counter[int] = Counter()
        self.hours: Counter[int] = Counter()
        self.first_minute = 0
        self.last_minute = 0
        self.malformed = 0
        self.samples: list[dict[str, Any]] = []

    def read(self, number: int, line: str) -> None:
        """Take in one line; `number` counts from 1."""
        if not line or line.isspace():
            return
        if self.reader is None:
            self.reader = choose_reader(line)
            if self.reader is not None and self.reader.format == "tsv":
                return  # this was the header
        request = self.reader.read(line) if self.reader and len(line) <= LINE_CHARACTERS_MAX else None
        if request is not None:
            self.add(request)
            return
        self.malformed += 1
        if len(self.samples) < SAMPLES_MAX:
            self.samples.append({"line": number, "text": clean(line)})

    def add(self, request: Request) -> None:
        """Count one request."""
        self.first_minute = min(self.first_minute, request.minute) if self.requests else request.minute
        self.last_minute = max(self.last_minute, request.minute)
        self.requests += 1
        self.bytes += request.bytes
        self.statuses[request.status] += 1
        self.minutes[request.minute] += 1
        self.hours[request.minute // 60] += 1
        traffic = self.paths.get(request.path)
        if traffic is None:
            traffic = self.paths[request.path] = Traffic()
        traffic.requests += 1
        traffic.bytes += request.bytes
        if request.status >= 400:
            traffic.errors += 1
            self.errors[request.status, request.path] += 1


class Steps(NamedTuple):
    """Requests in equal steps of time from the first request to the last, quiet steps included."""

    minutes: int
    """The length of a step."""
    origin: int
    """The minute with which the first step begins."""
    counts: list[int]


def choose_step(requests: int, span_minutes: int) -> int:
    """The shortest length, in minutes, with enough requests in a step and not too many steps."""
    for minutes in STEP_MINUTES:
        if span_minutes / minutes <= STEPS_MAX and requests * minutes / span_minutes >= STEP_REQUESTS_MIN:
            return minutes
    return max(STEP_MINUTES[-1], math.ceil(span_minutes / STEPS_MAX))


async def count_steps(tally: Tally) -> Steps:
    """Sum up the minutes in steps whose length follows from how much traffic there is."""
    if not tally.requests:
        return Steps(STEP_MINUTES[0], 0, [])
    length = choose_step(tally.requests, tally.last_minute - tally.first_minute + 1)
    origin = tally.first_minute - tally.first_minute % length
    counts = [0] * ((tally.last_minute - origin) // length + 1)
    for index, (minute, requests) in enumerate(tally.minutes.items(), start=1):
        counts[(minute - origin) // length] += requests
        if index % TURN_ITEMS == 0:
            await asyncio.sleep(0)
    return Steps(length, origin, counts)


# -- bursts and growth --------------------------------------------------------------------------------------------


class Burst(NamedTuple):
    """Neighbouring steps with far more requests than the median step."""

    first: int
    last: int
    """Indices of steps; both belong to the burst."""
    requests: int
    peak: int
    """The requests of its busiest step."""


class Trend(NamedTuple):
    """How the last third of the log compares with the first."""

    kind: str
    """growing, shrinking or steady; unknown when there is too little to say."""
    ratio: float | None
    """The median step of the last third over that of the first."""


def spread(values: Sequence[float], *, variance_min: float) -> float:
    """The robust standard deviation: 1.4826 x the median absolute deviation from the median.

    Where most values are equal that is zero, and every small difference would look like an alarm. So it is never less
    than chance alone explains (the variance of independent arrivals is their mean), nor less than one request.
    """
    centre = median(values)
    return max(1.4826 * median(abs(value - centre) for value in values), math.sqrt(variance_min), 1.0)


def find_bursts(counts: list[int]) -> list[Burst]:
    """The bursts among the requests per step, in order of time."""
    if len(counts) < STEPS_MIN:
        return []
    usual = median(counts)
    limit = usual + BURST_SPREADS * spread(counts, variance_min=usual)
    bursts: list[Burst] = []
    for index, count in enumerate(counts):
        if count <= limit:
            continue
        if bursts and bursts[-1].last == index - 1:
            before = bursts.pop()
            bursts.append(Burst(before.first, index, before.requests + count, max(before.peak, count)))
        else:
            bursts.append(Burst(index, index, count, count))
    return bursts


def find_trend(counts: list[int], steps_per_day: int) -> Trend:
    """Whether traffic creeps up or down over the log.

    The thirds are cut to whole days where they can be, so that counterparts lie at the same time of day. A change
    counts when it exceeds three standard errors; a median of n values errs by 1.2533 spreads / sqrt(n).
    """
    if len(counts) < STEPS_MIN:
        return Trend("unknown", None)
    third = len(counts) // 3
    if third > steps_per_day:
        third -= third % steps_per_day
    first, last = counts[:third], counts[-third:]
    before, after = median(first), median(last)
    differences = [late - early for early, late in zip(first, last, strict=True)]
    change = median(differences)
    certain = 3 * 1.2533 * spread(differences, variance_min=before + after) / math.sqrt(third)
    ratio = round(after / before, 2) if before else None
    if change > certain and after >= GROWTH_RATIO_MIN * before:
        return Trend("growing", ratio)
    if change < -certain and before >= GROWTH_RATIO_MIN * after:
        return Trend("shrinking", ratio)
    return Trend("steady", ratio)


# -- the report ---------------------------------------------------------------------------------------------------


async def draw_conclusions(tally: Tally, top: int) -> dict[str, Any]:
    """Everything that was found, for programs."""
    paths = await largest(tally.paths.items(), top, lambda item: (item[1].requests, item[1].bytes))
    errors = await largest(tally.errors.items(), top, lambda item: item[1])
    hours = await largest(tally.hours.items(), HOURS_MAX, lambda item: item[1])
    steps = await count_steps(tally)
    classes = {f"{n}xx": sum(m for status, m in tally.statuses.items() if status // 100 == n) for n in range(1, 6)}
    return {
        "format": tally.reader.format if tally.reader else None,
        "requests": tally.requests,
        "bytes": tally.bytes,
        "classes": classes,
        "error_rate": (classes["4xx"] + classes["5xx"]) / tally.requests if tally.requests else None,
        "paths": [
            {"path": clean(path), "requests": traffic.requests, "errors": traffic.errors, "bytes": traffic.bytes}
            for path, traffic in paths
        ],
        "errors": [{"status": status, "path": clean(path), "requests": n} for (status, path), n in errors],
        "hours": [{"hour": time_text(hour * 60), "requests": n} for hour, n in sorted(hours)],
        "busiest_hour": {"hour": time_text(hours[0][0] * 60), "requests": hours[0][1]} if hours else None,
        "step_minutes": steps.minutes,
        "bursts": [describe_burst(burst, steps) for burst in find_bursts(steps.counts)],
        "trend": find_trend(steps.counts, max(1, STEP_MINUTES[-1] // steps.minutes))._asdict(),
        "malformed": tally.malformed,
        "malformed_samples": tally.samples,
    }


async def largest(items: Iterable[Item], count: int, key: Callable[[Item], Any]) -> list[Item]:
    """The `count` largest items, largest first and the earlier first among equals; the event loop gets its turns."""
    best: list[Item] = []
    rest = iter(items)
    while batch := list(islice(rest, TURN_ITEMS)):
        best = heapq.nlargest(count, best + batch, key=key)
        await asyncio.sleep(0)
    return best


def describe_burst(burst: Burst, steps: Steps) -> dict[str, Any]:
    """A burst in times of the day and in comparison with the usual."""
    usual = median(steps.counts)
    return {
        "from": time_text(steps.origin + burst.first * steps.minutes),
        "to": time_text(steps.origin + (burst.last + 1) * steps.minutes),
        "requests": burst.requests,
        "times_median": round(burst.peak / usual, 1) if usual else None,
    }


def summary(facts: dict[str, Any]) -> list[list[Any]]:
    """The figures that one wants to see first."""
    classes, trend, busiest = facts["classes"], facts["trend"], facts["busiest_hour"]
    rows = [
        ["Format", facts["format"] or "not recognised"],
        ["Requests", facts["requests"]],
        ["Bytes sent", facts["bytes"]],
        ["Errors", f"{facts['error_rate'] or 0:.1%} (4xx: {classes['4xx']:,}, 5xx: {classes['5xx']:,})"],
        ["Busiest hour (UTC)", f"{busiest['hour']}, {busiest['requests']:,} requests" if busiest else "none"],
        ["Bursts", len(facts["bursts"])],
        ["Trend", trend["kind"] if trend["ratio"] is None else f"{trend['kind']}, x {trend['ratio']}"],
        ["Malformed lines", facts["malformed"]],
    ]
    if not facts["complete"]:
        rows.append(["Read", f"{facts['read_share']:.0%} of the log, then the deadline was near"])
    return rows


def tables(facts: dict[str, Any], top: int) -> list[dict[str, Any]]:
    """The lists that one looks into next; empty ones are left out."""
    hours = facts["hours"]
    few = len(hours) <= HOURS_SHOWN_MAX
    lists = {
        "Status classes": [
            {"class": name, "requests": n, "share": f"{n / facts['requests']:.1%}"}
            for name, n in facts["classes"].items()
            if n
        ],
        "Top paths": facts["paths"],
        "Top errors": facts["errors"],
        "Requests per hour (UTC)": hours if few else [],
        "Busiest hours (UTC)": [] if few else heapq.nlargest(top, hours, key=lambda row: row["requests"]),
        "Bursts (UTC)": facts["bursts"],
        "Malformed lines": facts["malformed_samples"],
    }
    return [
        {"title": title, "columns": list(rows[0]), "rows": [list(row.values()) for row in rows]}
        for title, rows in lists.items()
        if rows
    ]


def time_text(minute: int) -> str:
    """`2024-05-14 09:00`, in UTC."""
    return f"{datetime.fromtimestamp(minute * 60, UTC):%Y-%m-%d %H:%M}"


def clean(text: str) -> str:
    """The text, short and fit to be shown: strangers write into a log, and can put terminal commands into a path."""
    shown = text if len(text) <= TEXT_CHARACTERS_MAX else text[: TEXT_CHARACTERS_MAX - 1] + "…"
    return "".join(character if character.isprintable() else "\ufffd" for character in shown)
