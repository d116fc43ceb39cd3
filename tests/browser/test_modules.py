"""The dashboard's modules by themselves, in the browser that they are written for: the pure part of the page."""

from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from tests.browser.page import MISSING, Page
from tests.browser.scene import GIB, Scene, busy, idle, latency

Call = Callable[..., Any]


@pytest.fixture
def call(page: Page, scene: Scene) -> Iterator[Call]:
    """`call(module, body, *arguments)`: what a function body returns that sees the module's exports as `it`."""
    page.open(f"{scene.url}/assets/icon.svg")

    def run(module: str, body: str, *arguments: object) -> Any:
        script = f"const it = await import('{scene.url}/assets/{module}.js'); const args = arguments; {body}"
        plain = [msgspec.to_builtins(argument) for argument in arguments]
        return page.run(script, *plain)

    return run


def test_numbers_are_written_as_people_read_them(call):
    """Few digits, a narrow space between thousands, the unit that fits, and a dash for what is not known."""
    cases = {
        "count": [(0, "0"), (1240, "1 240"), (1_234_567, "1 234 567"), (None, MISSING)],
        "rate": [(0, "0"), (0.123, "0.12"), (12.34, "12.3"), (1240.4, "1 240"), (None, MISSING)],
        "durationText": [(0.42, "0.42 ms"), (4.25, "4.3 ms"), (84.4, "84 ms"), (999.6, "1.00 s"), (12_340, "12.3 s")],
        "percent": [(0, "0"), (0.0012, "<0.01"), (0.042, "0.04"), (5.25, "5.3"), (99.99, "100"), (None, MISSING)],
        "bytesText": [(0, "0 B"), (1023, "1.00 KiB"), (1.42 * GIB, "1.42 GiB"), (195 * 2**20, "195 MiB")],
        "short": [
            ("20.0", "20"),
            ("0.50 s", "0.5 s"),
            ("1.42 GiB", "1.42 GiB"),
            ("200 ms", "200 ms"),
            ("1.00 s", "1 s"),
        ],
        "age": [(0.4, "0 s"), (12, "12 s"), (119, "119 s"), (180, "3 min"), (7_300, "2 h"), (-3, "0 s")],
    }

    for name, pairs in cases.items():
        written = call("format", f"return args[0].map((value) => it.{name}(value));", [value for value, _ in pairs])
        assert [" ".join(text.split()) for text in written] == [text for _, text in pairs], name


def test_events_are_put_together_from_any_pieces(call):
    """Wherever the network cuts the stream, the same events come out; comments and retry are not events."""
    stream = (
        "retry: 2000\n\n: still here\n\nevent: snapshot\nid: 7\ndata: {\"a\":1}\n\n"
        "event: stale\r\ndata: one\r\ndata: two\r\n\r\ndata: plain\n\nevent: lost\n\nevent: unfinished\ndata: x\n"
    )  # fmt: skip
    body = """
        const outcomes = [];
        for (let size = 1; size <= args[0].length; size += 1) {
          const parser = new it.EventParser();
          const events = [];
          for (let at = 0; at < args[0].length; at += size) events.push(...parser.push(args[0].slice(at, at + size)));
          outcomes.push(JSON.stringify([parser.retry_ms, events]));
        }
        return [...new Set(outcomes)].map((outcome) => JSON.parse(outcome));
    """

    outcomes = call("events", body, stream)

    assert outcomes == [
        [
            2000,
            [
                {"event": "snapshot", "id": "7", "data": '{"a":1}'},
                {"event": "stale", "id": "7", "data": "one\ntwo"},
                {"event": "message", "id": "7", "data": "plain"},
            ],
        ]
    ]


def test_pauses_between_attempts_double_up_to_fifteen_seconds_with_jitter(call):
    """Each pause lies between half and all of 1, 2, 4, 8, 15, 15 … seconds; never less, never more."""
    body = "return [0, 0.5, 1].map((chance) => args[0].map((n) => it.pauseAfter(n, { random: () => chance })));"

    shortest, middle, longest = call("stream", body, [1, 2, 3, 4, 5, 6, 1_000])

    assert longest == [1_000, 2_000, 4_000, 8_000, 15_000, 15_000, 15_000]
    assert shortest == [pause / 2 for pause in longest]
    assert middle == [pause * 0.75 for pause in longest]


def point(at: float, requests_per_s: float | None = 1.0) -> dict[str, Any]:
    names = ["errors_per_s", "p50_ms", "p95_ms", "p99_ms", "hit_rate", "cpu_percent", "memory_bytes"]
    return {"at": at, "requests_per_s": requests_per_s, **dict.fromkeys(names)}


HISTORY = """
    const history = new it.History();
    for (const [verb, what] of args[0]) history[verb](what);
    const { at, requests_per_s } = history.columns(args[1] ?? 3600);
    return [at, requests_per_s];
"""


def test_within_a_step_the_newest_snapshot_stands(call):
    """Snapshots of one five-second step replace each other; older ones are ignored."""
    points = [point(100, 1), point(101, 2), point(104.9, 3), point(102, 9), point(105, 4)]

    at, values = call("history", HISTORY, [["append", each] for each in points])

    assert (at, values) == ([104.9, 105], [3, 4])


def test_what_is_missing_is_a_gap(call):
    """Points further apart than two and a half steps have a row of nulls between them; nulls stay nulls, never 0."""
    points = [point(100), point(105, None), point(110), point(200)]

    at, values = call("history", HISTORY, [["replace", points]])

    assert at == [100, 105, 110, 115, 200]
    assert values == [1, None, 1, None, 1]


def test_the_servers_history_replaces_the_past_and_keeps_what_is_newer(call):
    """After a loss the server fills in what was missed; what arrived live after it stays."""
    live = [["append", point(at, 1)] for at in (100, 105, 160, 165)]
    recalled = ["replace", [point(at, 2) for at in range(95, 161, 5)]]

    at, values = call("history", HISTORY, [*live, recalled])

    assert at == [*range(95, 161, 5), 165]
    assert values == [2] * 14 + [1]


def test_only_the_last_hour_is_kept_and_only_the_range_is_shown(call):
    """An hour of points is the most that the page holds; a range shows its part and one step to the left of it."""
    points = ["replace", [point(at) for at in range(0, 7_201, 5)]]

    everything, _ = call("history", HISTORY, [points], 36_000)
    five_minutes, _ = call("history", HISTORY, [points], 300)

    assert (everything[0], everything[-1]) == (3_600, 7_200)
    assert (five_minutes[0], five_minutes[-1]) == (6_895, 7_200)


def test_the_hit_rate_is_what_any_tier_answered_of_all_that_was_asked(call):
    """The remote tier sees only what the memory tier missed, so the questions are counted once."""
    tiers = [
        {"tier": "memory", "hits_per_s": 80, "misses_per_s": 20},
        {"tier": "remote", "hits_per_s": 15, "misses_per_s": 5},
    ]
    unused = [{**tiers[0], "hits_per_s": 0, "misses_per_s": 0}]

    body = "return args[0].map((tiers) => it.hitRate(tiers).rate);"
    both, remote, silent, none = call("measures", body, [tiers, tiers[1:], unused, []])

    assert (both, remote, silent, none) == (0.95, 0.75, None, None)


AT = 1_700_000_000.0

HEALTH = "const { level, detail } = it.health(args[0]); return [level, detail];"


@pytest.mark.parametrize(
    ("facts", "level", "words"),
    [
        ({}, "good", "99 % answered within"),
        ({"latency": latency(300)}, "good", "95 % answered within 41 ms"),
        ({"latency": latency(5)}, "good", "requests/s, 0.0"),
        ({"errors_per_s": 0.0, "error_rate": 0.0}, "good", "no errors."),
        ({"error_rate": 0.05}, "good", "5.0 % errors"),
        ({"error_rate": 0.051}, "warning", "5.1 % of requests fail."),
        ({"error_rate": 0.1}, "critical", "10.0 % of requests fail."),
        ({"latency": latency(10_000, 68.0)}, "warning", "p99 is 503 ms, over its limit of 500 ms."),
        ({"latency": latency(300, 60.0)}, "warning", "p95 is 216 ms, over its limit of 200 ms."),
        ({"latency": latency(30, 101.0)}, "warning", "p50 is 101 ms, over its limit of 100 ms."),
    ],
)
def test_health_is_judged_by_the_services_limits(call, facts, level, words):
    """Each limit turns the verdict exactly when it is passed, and the sentence names the figure."""
    judged = call("health", HEALTH, msgspec.structs.replace(busy(AT), **facts))

    assert judged[0] == level
    assert words in " ".join(judged[1].split())


def test_health_of_an_idle_service_is_neither_good_nor_bad(call):
    """No requests is a state of its own."""
    assert call("health", HEALTH, idle(AT)) == ["idle", "No requests in the last 5 s."]


def test_a_low_hit_rate_needs_enough_lookups_to_count(call):
    """Under a hundred lookups in the window nobody is alarmed; above, 80 % is the limit."""
    tier = busy(AT).tiers[0]

    def judge(hits_per_s: float, misses_per_s: float) -> list[str]:
        tiers = (msgspec.structs.replace(tier, hits_per_s=hits_per_s, misses_per_s=misses_per_s),)
        return call("health", HEALTH, msgspec.structs.replace(busy(AT), tiers=tiers))

    assert judge(5, 14)[0] == "good"
    assert judge(50, 50) == ["warning", "only 50.0 % of cache lookups hit."]
    assert judge(80, 20)[0] == "good"
