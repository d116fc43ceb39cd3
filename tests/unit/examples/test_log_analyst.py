"""What the log analyst reads, counts and finds."""

import math
import random
import re
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.examples.deployment import EXAMPLES, Context, check_report, load_agent

LOG = (EXAMPLES / "data" / "access.log").read_text(encoding="utf-8")
LINE = re.compile(r'\[(\d\d)/May/2024:(\d\d):(\d\d):(\d\d) \+0000\] "(\S+) ?(\S*).*?" (\d{3}) (\d+|-)')
analyst = load_agent("log_analyst")


async def analyse(log: str, **options: Any) -> dict[str, Any]:
    report = await analyst.Agent().execute({"log": log, **options}, Context())
    check_report(report)
    return dict(report)


def line(
    at: str = "14/May/2024:09:30:00 +0000", request: str = "GET /a HTTP/1.1", status: str = "200", size: str = "10"
) -> str:
    return f'203.0.113.9 - - [{at}] "{request}" {status} {size}'


def tsv(rows: list[tuple[str, str, int, str]], header: str = "time\tmethod\tpath\tstatus\tbytes") -> str:
    return "\n".join([header, *(f"{time}\tGET\t{path}\t{status}\t{size}" for time, path, status, size in rows)])


# -- the sample ---------------------------------------------------------------------------------------------------


async def test_sample_is_counted_as_by_hand():
    """Requests, bytes and classes of the sample agree with an independent count."""
    counted = [match for text in LOG.splitlines() if (match := LINE.search(text))]
    report = await analyse(LOG)
    assert report["format"] == "combined"
    assert report["requests"] == len(counted)
    assert report["bytes"] == sum(int(match[8]) for match in counted if match[8] != "-")
    assert report["classes"] == {f"{n}xx": sum(match[7][0] == str(n) for match in counted) for n in range(1, 6)}
    assert report["paths"][0]["path"] == "/api/v1/mills"
    assert report["paths"][0]["requests"] == sum(match[6].split("?")[0] == "/api/v1/mills" for match in counted)


async def test_sample_holds_a_burst_growth_and_warts():
    """The evening of guessed passwords, the growth over three days and the broken lines are found."""
    report = await analyse(LOG)
    assert [burst["from"] for burst in report["bursts"]] == ["2024-05-15 20:00"]
    assert report["errors"][0] == {"status": 401, "path": "/login", "requests": 140}
    assert report["trend"]["kind"] == "growing"
    assert 1.4 < report["trend"]["ratio"] < 1.9
    assert report["malformed"] == 3
    assert [sample["line"] for sample in report["malformed_samples"]] == [902, 1341, 1778]
    assert report["complete"] is True


async def test_sums_agree_with_each_other():
    """Hours and classes add up to the requests; the error rate is that of 4xx and 5xx."""
    report = await analyse(LOG, top=100)
    assert sum(hour["requests"] for hour in report["hours"]) == report["requests"]
    assert sum(report["classes"].values()) == report["requests"]
    assert sum(path["requests"] for path in report["paths"]) == report["requests"]
    errors = sum(error["requests"] for error in report["errors"])
    assert errors == sum(path["errors"] for path in report["paths"])
    assert report["error_rate"] == errors / report["requests"]
    assert report["busiest_hour"]["requests"] == max(hour["requests"] for hour in report["hours"])


async def test_the_same_traffic_as_tsv_gives_the_same_figures():
    """The format makes no difference to what is found."""
    rows = []
    for match in filter(None, map(LINE.search, LOG.splitlines())):
        day, hour, minute, second, method, path, status, size = match.groups()
        rows.append(f"2024-05-{day}T{hour}:{minute}:{second}Z\t{status}\t{size}\t{path or method}\t{method}")
    common = await analyse("\n".join(text for text in LOG.splitlines() if LINE.search(text) and "\\x16" not in text))
    other = await analyse("TIME\tStatus\tbytes\tpath\tmethod\n" + "\n".join(row for row in rows if "\\x16" not in row))
    assert other["format"] == "tsv"
    for key in ("requests", "bytes", "classes", "paths", "errors", "hours", "bursts", "trend"):
        assert other[key] == common[key], key


# -- lines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "format"),
    [
        (line(), "common"),
        (line() + ' "-" "curl/8"', "combined"),
        (line() + ' "-" "curl/8" 0.003 extra', "combined"),
        (line() + " 0.003", "common"),
        (line() + "\r", "common"),
        ("\ufeff" + line(), "common"),
        ("\n\n# a remark\n" + line(), "common"),
    ],
)
async def test_format_is_told_from_the_first_line_that_can_be_read(text, format):
    """Common and combined lines, with or without more behind them, after blank lines and remarks."""
    report = await analyse(text)
    assert (report["format"], report["requests"]) == (format, 1)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hello",
        line(at="32/May/2024:09:30:00 +0000"),
        line(at="14/Mai/2024:09:30:00 +0000"),
        line(at="14/May/2024:25:30:00 +0000"),
        line(at="14/May/1969:09:30:00 +0000"),
        line(at="14/May/9999:09:30:00 +0000"),
        line(status="999"),
        line(status="20"),
        line(size="ten"),
        line(size="9" * 40),
        line(request='GET /" HTTP/1.1'),
        line()[:-20],
        line(request="GET /" + "a" * 20_000),
    ],
)
async def test_malformed_line_is_counted_and_never_fatal(text):
    """Whatever stands between two good lines, these two are counted."""
    report = await analyse(f"{line()}\n{text}\n{line()}")
    assert report["requests"] == 2
    assert report["malformed"] == (1 if text else 0)
    assert [sample["line"] for sample in report["malformed_samples"]] == ([2] if text else [])


async def test_samples_of_malformed_lines_are_few_and_short():
    """A log of nothing but junk is a report about junk, and a small one."""
    report = await analyse("\n".join(f"{n} " + "junk" * 1_000 for n in range(1_000)))
    assert (report["requests"], report["malformed"], report["format"]) == (0, 1_000, None)
    assert len(report["malformed_samples"]) == 5
    assert all(len(sample["text"]) == 160 for sample in report["malformed_samples"])


@pytest.mark.parametrize(
    ("request_line", "path"),
    [
        ("GET /a HTTP/1.1", "/a"),
        ("GET /a?b=c HTTP/1.1", "/a"),
        ("GET /a", "/a"),
        (r"GET /say\"hi\" HTTP/1.1", r"/say\"hi\""),
        ("GET http://mills.example/a HTTP/1.1", "http://mills.example/a"),
        (r"\x16\x03\x01", "(not an HTTP request)"),
        ("-", "(not an HTTP request)"),
        ("", "(not an HTTP request)"),
        ("GET /a b HTTP/1.1 x", "(not an HTTP request)"),
    ],
)
async def test_path_is_taken_from_the_request_line(request_line, path):
    """Without its query, with escaped quotation marks; what is no request at all is counted as that."""
    report = await analyse(line(request=request_line, status="400"))
    assert [(item["path"], item["errors"]) for item in report["paths"]] == [(path, 1)]


@pytest.mark.parametrize(
    ("at", "hour"),
    [
        ("14/May/2024:23:30:00 +0000", "2024-05-14 23:00"),
        ("14/May/2024:23:30:00 -0700", "2024-05-15 06:00"),
        ("14/May/2024:01:10:00 +0530", "2024-05-13 19:00"),
        ("29/Feb/2024:12:00:00 +0000", "2024-02-29 12:00"),
    ],
)
async def test_hours_are_utc(at, hour):
    """Offsets are taken into account, half hours and changes of the date included."""
    assert (await analyse(line(at=at)))["hours"] == [{"hour": hour, "requests": 1}]


@pytest.mark.parametrize(
    "time", ["2024-05-14T09:30:00Z", "2024-05-14 09:30:00", "2024-05-14T11:30:00+02:00", "1715679000", "1715679000.5"]
)
async def test_tsv_time_is_iso_or_seconds(time):
    """ISO 8601, UTC unless it says otherwise, or seconds since 1970."""
    report = await analyse(tsv([(time, "/a", 200, "-")]))
    assert (report["hours"], report["bytes"]) == ([{"hour": "2024-05-14 09:00", "requests": 1}], 0)


@pytest.mark.parametrize(
    "row",
    [
        ("yesterday", "/a", 200, "1"),
        ("-5", "/a", 200, "1"),
        ("99999999999", "/a", 200, "1"),
        ("1715679000", "/a", 700, "1"),
        ("1715679000", "/a", 200, "1.5"),
        ("1715679000", "/a\tb", 200, "1"),
    ],
)
async def test_malformed_tsv_row_is_counted(row):
    """A row that breaks a rule of a column, or has one column too many, is malformed."""
    report = await analyse(tsv([row, ("1715679000", "/a", 200, "1")]))
    assert (report["requests"], report["malformed"]) == (1, 1)


async def test_top_limits_the_lists():
    """`top` is the length of the lists of paths and errors; equals stand in the order of the log."""
    log = "\n".join(line(request=f"GET /{n} HTTP/1.1", status="404") for n in (*range(9), 7, 7, 3))
    report = await analyse(log, top=4)
    assert [path["path"] for path in report["paths"]] == ["/7", "/3", "/0", "/1"]
    assert [error["path"] for error in report["errors"]] == ["/7", "/3", "/0", "/1"]


# -- the deadline -------------------------------------------------------------------------------------------------


async def test_reading_stops_when_the_deadline_is_near():
    """With little time left the report covers what was read, and says how much that is."""
    log = LOG * 3
    report = await analyst.Agent().execute({"log": log}, Context(remaining_s=1.0, step_s=0.1))
    check_report(report)
    assert report["complete"] is False
    assert 0 < report["requests"] < 2_001
    assert math.isclose(report["read_share"], report["requests"] / (3 * 2_001), abs_tol=0.02)
    assert ["Read", f"{report['read_share']:.0%} of the log, then the deadline was near"] in report["summary"]


async def test_distant_deadline_changes_nothing():
    """A deadline that does not come near leaves no trace."""
    report = await analyst.Agent().execute({"log": LOG}, Context(remaining_s=30.0))
    assert report == await analyse(LOG)


# -- bursts and growth --------------------------------------------------------------------------------------------


def arrivals(rng: random.Random, mean: float) -> int:
    """Independent arrivals: a count with the Poisson distribution (Knuth's method)."""
    limit, count, product = math.exp(-mean), 0, rng.random()
    while product > limit:
        count += 1
        product *= rng.random()
    return count


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mean", [10, 40, 200])
def test_chance_is_neither_a_burst_nor_growth(seed, mean):
    """Steady independent arrivals raise no alarm in a thousand steps."""
    rng = random.Random(seed)
    counts = [arrivals(rng, mean) for _ in range(1_000)]
    assert analyst.find_bursts(counts) == []
    assert analyst.find_trend(counts, 1_440).kind == "steady"


@given(level=st.integers(0, 10_000), steps=st.integers(12, 300))
@settings(max_examples=50)
def test_equal_counts_are_quiet(level, steps):
    """Where nothing changes there is nothing to report."""
    assert analyst.find_bursts([level] * steps) == []
    assert analyst.find_trend([level] * steps, 1_440).kind == "steady"


@given(level=st.integers(10, 500), before=st.integers(12, 100), length=st.integers(1, 5), times=st.integers(4, 50))
@settings(max_examples=100)
def test_planted_burst_is_found_where_it_is(level, before, length, times):
    """Neighbouring high steps are one burst, with its sum and its peak."""
    counts = [level] * before + [level * times] * length + [level] * 12
    assert analyst.find_bursts(counts) == [(before, before + length - 1, length * level * times, level * times)]
    assert analyst.find_trend(counts, 1_440).kind == "steady"


def test_two_bursts_stay_two():
    """A quiet step separates bursts, and the higher one does not hide the lower one."""
    counts = [20] * 20 + [400] + [20] * 3 + [90, 100] + [20] * 20
    assert [(burst.first, burst.last) for burst in analyst.find_bursts(counts)] == [(20, 20), (24, 25)]


@pytest.mark.parametrize(("ratio", "kind"), [(2.0, "growing"), (1.5, "growing"), (0.5, "shrinking"), (1.1, "steady")])
def test_slow_change_is_found(ratio, kind):
    """A level that creeps up or down over the log is a trend, if it is more than a quarter."""
    rng = random.Random(3)
    counts = [arrivals(rng, 50 * (1 + (ratio - 1) * step / 300)) for step in range(300)]
    assert analyst.find_trend(counts, 1_440).kind == kind
    assert analyst.find_bursts(counts) == []


@pytest.mark.parametrize("days", [3, 5, 7])
def test_rhythm_of_the_day_is_no_growth(days):
    """Nights and days that repeat are steady, wherever in the day the log begins."""
    rng = random.Random(days)
    for start in range(0, 24, 6):
        counts = [arrivals(rng, 40 + 35 * math.sin((start + hour) / 24 * 2 * math.pi)) for hour in range(24 * days)]
        assert analyst.find_trend(counts, 24).kind == "steady"


def test_short_log_has_no_opinion():
    """Fewer than twelve steps give neither bursts nor a trend; twelve do."""
    assert analyst.find_bursts([1] * 10 + [500]) == []
    assert analyst.find_trend([1] * 10 + [500], 24) == ("unknown", None)
    assert analyst.find_bursts([1] * 11 + [500]) == [(11, 11, 500, 500)]
    assert analyst.find_trend([10] * 4 + [50] * 4 + [90] * 4, 24) == ("growing", 9.0)


def test_uncertain_change_is_steady():
    """A third more, but in a few small and scattered counts, may be chance."""
    assert analyst.find_trend([6, 13, 9, 10, 11, 8, 14, 7, 15, 9, 13, 13], 24) == ("steady", 1.37)


async def test_burst_is_reported_in_times_of_the_day():
    """Steps begin at round times; a burst names its first minute, the minute after it, and how unusual it was."""
    rows = [f"2024-05-14T{9 + minute // 60:02}:{minute % 60:02}:00" for minute in range(7, 247) for _ in range(2)]
    rows += ["2024-05-14T11:17:30"] * 180 + ["2024-05-14T11:44:59"] * 80
    report = await analyse("time\tmethod\tpath\tstatus\tbytes\n" + "".join(f"{at}\tGET\t/\t200\t1\n" for at in rows))
    assert report["step_minutes"] == 5
    assert report["bursts"] == [
        {"from": "2024-05-14 11:15", "to": "2024-05-14 11:20", "requests": 190, "times_median": 19.0},
        {"from": "2024-05-14 11:40", "to": "2024-05-14 11:45", "requests": 90, "times_median": 9.0},
    ]


@given(requests=st.integers(1, 10_000_000), span=st.integers(1, 121_000_000))
def test_steps_are_bounded_in_number(requests, span):
    """However long the log, there are at most 1,500 steps, and no step is empty of meaning."""
    length = analyst.choose_step(requests, span)
    assert math.ceil(span / length) <= 1_500
    assert length >= 1


@given(st.lists(st.integers(0, 7_258_118_399).map(lambda seconds: datetime.fromtimestamp(seconds, UTC)), max_size=40))
@settings(max_examples=60)
async def test_every_time_is_counted_in_its_hour(moments):
    """Whatever the times, in whatever order, each request is in its hour and in one step."""
    log = "time\tmethod\tpath\tstatus\tbytes\n" + "".join(f"{at.isoformat()}\tGET\t/\t200\t1\n" for at in moments)
    report = await analyse(log)
    hours = Counter(f"{at:%Y-%m-%d %H:00}" for at in moments)
    assert {hour["hour"]: hour["requests"] for hour in report["hours"]} == hours
    assert report["requests"] == len(moments)


@given(st.text(max_size=2_000))
@settings(max_examples=200)
async def test_any_text_is_a_log(text):
    """Every line that is not blank is a request, a header or malformed."""
    report = await analyse(text)
    lines = [part for part in text.removeprefix("\ufeff").split("\n") if part.strip()]
    assert report["requests"] + report["malformed"] + (report["format"] == "tsv") == len(lines)
