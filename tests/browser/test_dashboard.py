"""The dashboard of a service that is up: what its reader sees, moves and can rely on."""

import itertools
import re

import msgspec
import pytest
from selenium.webdriver.common.keys import Keys

from headrace.monitor.snapshot import Snapshot
from tests.browser import scene as scripted
from tests.browser.page import MISSING, Page
from tests.browser.scene import GIB, Scene, busy, idle, latency

CHARTS = ["requests", "latency", "hits", "host"]

TEXTS = [
    *["#health-word", "#health-detail", "#health-span", "#connection-text", "#pause", "#ranges span"],
    *[".tile-label", ".tile-text", ".tile-unit", ".tile-note", ".card-note", ".legend-value"],
    *["#agents thead th", ".agent-name", ".agent-detail", ".status[data-level=warning]", "#workers tbody td"],
]

# Null for a text that is not seen.
CONTRAST = """
const node = document.querySelector(arguments[0]);
if (node?.checkVisibility() !== true) return null;
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
    const share = part / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const background = (node) => {
  const colour = getComputedStyle(node).backgroundColor;
  const alpha = colour.match(/[\\d.]+/g)[3];
  return alpha === undefined || Number(alpha) === 1 ? colour : background(node.parentElement);
};
const [light, dark] = [luminance(getComputedStyle(node).color), luminance(background(node))].sort((a, b) => b - a);
return (light + 0.05) / (dark + 0.05);
"""


def ill(at: float) -> Snapshot:
    """A service in trouble: slow, failing, hot, and without its shared cache."""
    well = busy(at)
    return msgspec.structs.replace(
        well,
        error_rate=0.074,
        errors_per_s=well.requests_per_s * 0.074,
        latency=latency(10_000, 88.0),
        host=msgspec.structs.replace(well.host, cpu_percent=93.2, memory_bytes=int(3.6 * GIB)),
        tiers=(well.tiers[0], msgspec.structs.replace(well.tiers[1], available=False)),
    )


@pytest.fixture
def dashboard(page: Page, scene: Scene) -> Page:
    """The dashboard of a busy service, live."""
    page.open(scene.url)
    page.wait_until_live()
    return page


def test_numbers_move_by_themselves(dashboard):
    """Figures follow the service without anybody doing anything."""
    before = {name: dashboard.tile(name) for name in ("requests", "executions", "hits")}

    for name, figure in before.items():
        dashboard.wait_until(lambda name=name, figure=figure: dashboard.tile(name) != figure, f"{name} moves")


def test_one_sentence_says_how_things_stand(dashboard):
    """A healthy service is said to be so, with its load, its speed and its errors; the tab's title says it too."""
    assert dashboard.find("#health").get_attribute("data-level") == "good"
    sentence = dashboard.text("#health")
    assert re.fullmatch(
        r"Healthy 1? ?\d{3} requests/s, 99 % answered within \d+ ms, "
        r"(<?0\.\d+ % errors|no errors)\. over the last 5 s",
        sentence,
    ), sentence
    assert dashboard.driver.title == "Healthy · headrace"


def test_every_figure_that_was_asked_for_is_there(dashboard):
    """Requests, three quantiles, errors, hits, executions, CPU and memory, each with its unit and a note."""
    shapes = {
        "requests": r"1? ?\d{3} /s",
        "p50": r"[\d.]+ ms",
        "p95": r"[\d.]+ ms",
        "p99": r"[\d.]+ ms",
        "errors": r"<?[\d.]+ %",
        "hits": r"9\d\.\d %",
        "executions": r"\d+ running",
        "cpu": r"[\d.]+ %",
        "memory": r"1\.\d\d GiB",
    }

    for name, shape in shapes.items():
        assert re.fullmatch(shape, dashboard.tile(name)), f"{name}: {dashboard.tile(name)}"
    assert dashboard.tile_note("p99") == "limit 500 ms"
    assert dashboard.tile_note("memory").endswith("of 4.00 GiB")
    assert re.fullmatch(r"[\d ]+/s started · 0\.20/s failing", dashboard.tile_note("executions"))


@pytest.mark.parametrize("chart", CHARTS)
def test_charts_have_lines_in_them(dashboard, chart):
    """Each chart's canvas holds coloured pixels, from the history that the server kept."""
    dashboard.wait_until(lambda: dashboard.coloured_pixels(chart) > 300, f"{chart} is drawn")


def test_the_arrow_keys_move_one_cursor_over_all_charts(dashboard):
    """Without a mouse: Home goes to the oldest point, and every chart shows the same moment."""
    dashboard.find('[data-chart="requests"] .plot').send_keys(Keys.HOME)

    dashboard.wait_until(
        lambda: all(re.fullmatch(r"\d\d:\d\d:\d\d", note) for note in dashboard.chart_notes()), "a time is shown"
    )
    notes = dashboard.chart_notes()
    assert notes == [notes[0]] * len(CHARTS)


def test_escape_takes_the_cursor_away(dashboard):
    """After Escape the charts say their newest values and units again."""
    plot = dashboard.find('[data-chart="requests"] .plot')
    plot.send_keys(Keys.HOME)

    plot.send_keys(Keys.ESCAPE)

    assert dashboard.text('[data-chart="requests"] .card-note') == "per second"


def seconds_shown(dashboard: Page) -> int:
    """How far back the oldest point of a chart is, in seconds."""
    plot = dashboard.find('[data-chart="requests"] .plot')
    times = []
    for key in (Keys.HOME, Keys.END):
        plot.send_keys(key)
        hours, minutes, seconds = map(int, dashboard.text('[data-chart="requests"] .card-note').split(":"))
        times.append(hours * 3_600 + minutes * 60 + seconds)
    plot.send_keys(Keys.ESCAPE)
    return (times[1] - times[0]) % 86_400


@pytest.mark.parametrize(("label", "range_s"), [("5 min", 300), ("15 min", 900), ("1 h", 3_600)])
def test_the_range_decides_how_far_back_the_charts_go(dashboard, label, range_s):
    """5 minutes, 15 minutes or an hour, chosen with the keyboard or the mouse."""
    dashboard.find("#pause").click()  # or the charts would move on between two looks at them

    dashboard.find(f'#ranges input[value="{range_s}"]').send_keys(Keys.SPACE)

    dashboard.wait_until(lambda: abs(seconds_shown(dashboard) - range_s) <= 15, f"the charts span {label}")


def test_pause_freezes_what_is_shown_and_resume_catches_up(dashboard, scene):
    """A paused page stands still while the stream goes on; the button and the sign say so."""
    dashboard.find("#pause").click()
    frozen = dashboard.text("#overview")
    heard = []
    scene.snapshot_at = lambda at: heard.append(at) or busy(at)
    dashboard.wait_until(lambda: len(heard) > 5, "the stream goes on")
    still = dashboard.text("#overview")
    words = [dashboard.text("#connection-text"), dashboard.text("#notice-text"), dashboard.text("#pause")]
    pressed = dashboard.find("#pause").get_attribute("aria-pressed")

    dashboard.find("#pause").click()

    assert still == frozen
    assert words[0] == "Paused"
    assert re.match(r"Paused at \d\d:\d\d:\d\d\.", words[1])
    assert (words[2], pressed) == ("Resume", "true")
    dashboard.wait_until(lambda: dashboard.text("#overview") != frozen, "the numbers catch up")
    assert dashboard.text("#connection-text") == "Live"


def test_endpoints_stand_by_the_time_they_cost(dashboard):
    """The costliest route is first, with its share, rate, quantiles and errors; what is not known yet is a dash."""
    rows = dashboard.rows("endpoints")

    assert len(rows) == 5
    assert rows[0].startswith("POST /api/v1/agents/{agent_id}/execute 71.4 % ")
    shares = [float(re.search(r"([\d.]+) %", row).group(1)) for row in rows]
    assert shares == sorted(shares, reverse=True)
    deploy = next(row for row in rows if "deploy" in row)
    assert f"61 ms {MISSING} {MISSING}" in deploy
    why = dashboard.find("#endpoints tbody tr:nth-child(4) td:nth-child(6)").get_attribute("title")
    assert " ".join(why.split()) == "Collecting… p99 after 1 000 requests (now 34)"


def test_a_long_list_of_endpoints_opens_on_demand(page, scene):
    """Ten endpoints are shown; a button shows the rest, and folds them again."""

    def many(at: float) -> Snapshot:
        endpoint = busy(at).endpoints[1]
        endpoints = [
            msgspec.structs.replace(endpoint, route=f"/route/{number:02}", total_s=float(number))
            for number in range(14)
        ]
        return msgspec.structs.replace(busy(at), endpoints=tuple(endpoints))

    scene.snapshot_at = many
    page.open(scene.url)
    page.wait_until_live()
    shown = [len(page.rows("endpoints"))]
    for _ in range(2):
        page.find("#endpoints-more").click()
        shown.append(len(page.rows("endpoints")))

    assert shown == [10, 14, 10]
    assert page.rows("endpoints")[0].startswith("GET /route/13 ")
    assert page.text("#endpoints-more") == "Show all 14"


def test_workers_show_what_each_process_does(dashboard):
    """A line for each serving process: pid, rate, CPU, memory, loop lag."""
    rows = dashboard.rows("workers")

    assert len(rows) == 4
    assert re.fullmatch(r"41210 [\d.]+ [\d.]+ % 195 MiB [\d.]+ ms", rows[0]), rows[0]
    assert dashboard.text("#workers-note") == "4 serving"


def test_a_late_event_loop_is_flagged(page, scene):
    """A loop that wakes more than 100 ms late is marked with a sign and a reason, not by colour alone."""

    def late(at: float) -> Snapshot:
        first, *others = busy(at).workers
        return msgspec.structs.replace(busy(at), workers=(msgspec.structs.replace(first, loop_lag_ms=240.0), *others))

    scene.snapshot_at = late
    page.open(scene.url)
    page.wait_until_live()

    cell = page.find("#workers tbody tr:first-child td:last-child")
    assert cell.text == "240 ms"
    assert cell.get_attribute("title") == "the event loop woke more than 100 ms late"
    sign = page.run("return getComputedStyle(arguments[0], '::before').content", cell)
    assert "▲" in sign


def test_agents_show_their_versions_and_executions(dashboard):
    """A line for each agent; a failing one and one that fails often are marked."""
    dashboard.wait_until(lambda: len(dashboard.rows("agents")) == 4, "the agents are listed")

    rows = dashboard.rows("agents")
    assert rows[0] == "Log analyst log-analyst · 1.4.0 active 128 412 3 0"
    assert rows[3] == "Nightly report nightly-report · 1.0.0 failed 211 17 1"
    marked = [cell.text for cell in dashboard.driver.find_elements("css selector", "#agents [data-level=warning]")]
    assert marked == ["failed", "17"]
    assert dashboard.text("#agents-note") == "4 deployed"


def test_a_new_agent_appears_by_itself(dashboard, scene):
    """The list is asked for again every few seconds."""
    scene.agents = [{**scripted.AGENTS[0], "agent_id": "newcomer", "name": "Newcomer"}, *scripted.AGENTS]

    dashboard.wait_until(lambda: any(row.startswith("Newcomer") for row in dashboard.rows("agents")), "it appears")


def test_without_agents_the_page_says_how_to_deploy_one(page, scene):
    """An empty list is an invitation, with the command."""
    scene.agents = []

    page.open(scene.url)

    page.wait_until(lambda: page.shows("#agents-none"), "the invitation is shown")
    assert "headrace agents deploy" in page.text("#agents-none")
    assert not page.shows("#agents")


def test_an_idle_service_shows_what_it_is_waiting_for_and_never_a_zero_instead(page, scene):
    """Nothing measured is a dash with a reason; only what was counted as nothing is 0."""
    scene.snapshot_at = idle
    page.open(scene.url)
    page.wait_until_live()

    assert page.text("#health") == "Idle No requests in the last 5 s. over the last 5 s"
    assert page.tile("requests") == "0 /s"
    unknown = {name: page.tile(name) for name in ("p50", "p95", "p99", "errors", "hits", "cpu", "memory")}
    assert set(unknown.values()) == {MISSING}
    assert page.tile_note("hits") == "no cache in use"
    assert page.text("#endpoints-empty") == "No requests in the last 5 s."
    assert page.text('[data-chart="latency"] .plot-nothing') == (
        "Collecting… response times appear with the first 20 requests."
    )
    assert not page.shows('[data-chart="latency"] canvas')


def test_a_quantile_says_how_many_requests_it_still_needs(page, scene):
    """Below 1 000 requests there is no p99, and the tile counts towards it."""
    scene.snapshot_at = lambda at: msgspec.structs.replace(busy(at), latency=latency(212))

    page.open(scene.url)
    page.wait_until_live()

    assert page.tile("p99") == MISSING
    assert page.tile_note("p99") == "Collecting… p99 after 1 000 requests (now 212)"
    assert page.tile("p95") == "41 ms"


def test_trouble_is_said_in_words_signs_and_colour(page, scene):
    """The worst comes first in the sentence, and each tile over its limit says so."""
    scene.snapshot_at = ill
    page.open(scene.url)
    page.wait_until_live()

    assert page.find("#health").get_attribute("data-level") == "critical"
    assert page.text("#health").startswith(
        "Critical CPU is at 93.2 %; 7.4 % of requests fail; p99 is 651 ms, over its limit of 500 ms; 2 more."
    )
    assert page.tile_note("cpu") == "critical · of 4 CPUs"
    assert page.tile_note("p95") == "high · limit 200 ms"
    assert page.tile_note("p50") == "limit 100 ms"
    assert page.driver.title == "Critical · headrace"


def test_names_from_outside_are_text_and_nothing_else(page, scene):
    """Markup in an agent's or a route's name is shown as it is written."""
    nasty = "<img src=x onerror=alert(1)>"
    scene.agents = [{**scripted.AGENTS[0], "name": nasty}]
    scene.snapshot_at = lambda at: msgspec.structs.replace(
        busy(at), endpoints=(msgspec.structs.replace(busy(at).endpoints[0], route=nasty),)
    )
    page.open(scene.url)
    page.wait_until_live()
    page.wait_until(lambda: len(page.rows("agents")) == 1, "the agent is listed")

    assert page.rows("agents")[0].startswith(nasty)
    assert f"POST {nasty} " in page.rows("endpoints")[0]
    assert page.run("return document.querySelectorAll('main img').length") == 0
    assert page.complaints() == []


def test_using_everything_leaves_the_console_empty(dashboard):
    """No error, no warning and no violation of the content security policy, in either scheme and at any width."""
    for scheme, width in itertools.product(("light", "dark"), (1280, 400)):
        dashboard.scheme(scheme)
        dashboard.size(width, 900)
        for value in ("900", "3600", "300"):
            dashboard.find(f'#ranges input[value="{value}"]').send_keys(Keys.SPACE)
        dashboard.find("#pause").click()
        dashboard.find("#pause").click()
        dashboard.find('[data-chart="latency"] .plot').send_keys(Keys.HOME, Keys.ARROW_RIGHT, Keys.ESCAPE)
        before = dashboard.tile("requests")
        dashboard.wait_until(lambda before=before: dashboard.tile("requests") != before, "the page goes on")

    assert dashboard.complaints() == []


def test_the_policy_stops_what_is_not_ours(dashboard):
    """Code, a style or a request that got into the page would not work: the browser enforces the policy."""
    dashboard.run("""
        window.broken = new Set();
        document.addEventListener("securitypolicyviolation", (event) => broken.add(event.effectiveDirective));
        const script = document.createElement("script");
        try { script.textContent = "window.intruded = true"; } catch (refusal) { broken.add(refusal.name); }
        const styled = document.createElement("p");
        styled.setAttribute("style", "color: rgb(1, 2, 3)");
        styled.id = "styled";
        document.body.append(script, styled);
        fetch("http://127.0.0.1:9/").catch((refusal) => broken.add(refusal.name));
    """)

    expected = ["TypeError", "connect-src", "require-trusted-types-for", "style-src-attr"]
    dashboard.wait_until(lambda: dashboard.run("return [...broken].sort()") == expected, "all of it is refused")
    assert dashboard.run("return window.intruded") is None
    assert dashboard.run("return getComputedStyle(styled).color") != "rgb(1, 2, 3)"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("state", [busy, idle, ill], ids=lambda state: state.__name__)
def test_text_is_legible_in_both_schemes(dashboard, scene, scheme, state):
    """Every kind of text has a contrast of at least 4.5 to 1 (WCAG 2.2, AA), in good times and in bad ones."""
    scene.snapshot_at = state
    expected = {busy: "good", idle: "idle", ill: "critical"}[state]
    dashboard.wait_until(lambda: dashboard.find("#health").get_attribute("data-level") == expected, "the state shows")
    dashboard.scheme(scheme)
    dashboard.wait_until(lambda: len(dashboard.rows("agents")) > 0, "the agents are listed")

    contrasts = {text: dashboard.run(CONTRAST, text) for text in TEXTS}
    assert {text: contrast for text, contrast in contrasts.items() if contrast is not None and contrast < 4.5} == {}
    assert contrasts["#health-word"] is not None, "some of them are seen"


def test_the_page_follows_the_readers_scheme_and_repaints_the_charts(dashboard):
    """Dark and light differ in the page and in what is drawn on the canvases."""
    sample = """
        const canvas = document.querySelector('[data-chart="requests"] canvas');
        const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
        const seen = new Set();
        for (let i = 0; i < pixels.length; i += 4) if (pixels[i + 3] === 255) seen.add(pixels.slice(i, i + 3).join());
        return [getComputedStyle(document.body).backgroundColor, [...seen].sort().join(" ")];
    """
    light = dashboard.run(sample)

    dashboard.scheme("dark")

    dashboard.wait_until(lambda: dashboard.run(sample)[0] != light[0], "the page turns dark")
    dashboard.wait_until(lambda: dashboard.run(sample)[1] != light[1], "the charts are painted anew")


@pytest.mark.parametrize("width", [1280, 900, 620, 400])
def test_nothing_is_cut_off_at_any_width(dashboard, width):
    """Down to 400 pixels the page itself never scrolls sideways."""
    dashboard.wait_until(lambda: len(dashboard.rows("agents")) == 4, "the agents are listed")

    dashboard.size(width, 900)

    fits = "return document.documentElement.scrollWidth <= innerWidth && innerWidth === arguments[0]"
    dashboard.wait_until(lambda: dashboard.run(fits, width), f"the page fits into {width} pixels")
    widths = (
        "return [...document.querySelectorAll('canvas')].map((c) => c.getBoundingClientRect().right <= innerWidth)"
    )
    dashboard.wait_until(lambda: all(dashboard.run(widths)), "the charts fit")


def test_on_a_phone_the_endpoints_fold_into_blocks_with_their_columns_names(dashboard):
    """At 400 pixels every number of an endpoint can be read without scrolling sideways."""
    dashboard.size(400, 900)

    script = """
        return [...document.querySelectorAll("#endpoints tbody tr:first-child td")].map((cell) => [
          getComputedStyle(cell, "::after").content, cell.getBoundingClientRect().right <= innerWidth]);
    """
    labels = ["Share of time", "Requests/s", "p50", "p95", "p99", "Errors/s"]
    expected = [[f'"{label}"', True] for label in labels]
    dashboard.wait_until(lambda: dashboard.run(script) == expected, "each number has its name and is in the page")


def test_everything_is_reached_with_the_tab_key(dashboard):
    """The order is: the way past the bar, the range, pause, then the charts and tables."""
    reached = []
    for _ in range(10):
        dashboard.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(
            dashboard.run("""
                const now = document.activeElement;
                const chart = now.closest("[data-chart]")?.dataset.chart;
                return chart || now.id || now.name || now.getAttribute("aria-labelledby") || now.className;
            """)
        )

    tables = ["endpoints-title", "agents-title", "workers-title"]
    assert reached == ["skip", "range", "pause", *CHARTS, *tables]


def test_the_connection_is_announced_and_the_numbers_are_not(dashboard):
    """Screen readers are told when the connection changes, and are not read a number every second."""
    live = dashboard.driver.find_elements("css selector", "[aria-live]")

    assert [region.get_attribute("id") for region in live] == ["connection"]
    assert live[0].get_attribute("aria-live") == "polite"
