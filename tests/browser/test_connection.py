"""The dashboard when something is wrong with the connection, the monitor or the right to look."""

import json
import re

import msgspec
import pytest

from headrace.monitor.snapshot import Snapshot
from tests.browser.page import MISSING, Page
from tests.browser.scene import Scene, busy


@pytest.fixture
def dashboard(page: Page, scene: Scene) -> Page:
    """The dashboard of a busy service, live."""
    page.open(scene.url)
    page.wait_until_live()
    return page


def is_greyed(page: Page) -> bool:
    """Whether charts and figures are shown as old: without colour and pale."""
    style = (
        "const style = getComputedStyle(document.querySelector(arguments[0])); return [style.filter, style.opacity];"
    )
    looks = [page.run(style, selector) for selector in (".chart", ".tiles")]
    return all(grey == "grayscale(1)" and float(opacity) < 0.8 for grey, opacity in looks)


def test_a_lost_stream_is_said_with_the_age_of_what_is_shown(dashboard, scene):
    """When the server dies the page says so, counts down to its next attempt, and greys what it shows."""
    figure = dashboard.tile("memory")
    colour = is_greyed(dashboard)

    scene.die()

    dashboard.wait_until(lambda: dashboard.text("#connection-text") == "Stream lost", "the loss is announced")
    said = r"Stream lost, retrying in \d+ s \N{EN DASH} data is \d+ s old"
    dashboard.wait_until(
        lambda: re.fullmatch(said, dashboard.text("#notice-text")) is not None, "the loss is explained"
    )
    assert not colour
    assert is_greyed(dashboard)
    assert dashboard.text("#health").startswith("Unknown")
    assert dashboard.tile("memory")[-3:] == figure[-3:], "the last figures stay readable"


def test_the_age_of_old_data_grows(dashboard, scene):
    """The page keeps counting while it waits."""
    scene.die()

    def data_age_s() -> int:
        found = re.search(r"data is (\d+) s old", dashboard.text("#notice-text"))
        return -1 if found is None else int(found.group(1))

    dashboard.wait_until(lambda: data_age_s() >= 1, "an age is shown")
    first = data_age_s()
    dashboard.wait_until(lambda: data_age_s() >= first + 2, "it grows")


def test_the_page_comes_back_by_itself(dashboard, scene):
    """Once the server is there again the page is live within its longest pause, without a click or a reload."""
    scene.die()
    dashboard.wait_until(lambda: dashboard.text("#connection-text") == "Stream lost", "the loss is announced")

    scene.revive()

    dashboard.wait_until(lambda: dashboard.text("#connection-text") == "Live", "the page is live again")
    dashboard.wait_until(lambda: not dashboard.shows("#notice"), "the notice is gone")
    dashboard.wait_until(lambda: not is_greyed(dashboard), "the colours are back")
    before = dashboard.tile("requests")
    dashboard.wait_until(lambda: dashboard.tile("requests") != before, "the numbers move again")


def test_a_refused_stream_is_a_lost_one_and_can_be_retried_at_once(page, scene):
    """With all places taken (503) the page waits; a click tries again now, without any pause coming to its end."""
    scene.refusing_streams = True
    page.open(scene.url)
    page.stop_timers_when("#connection-text", "Stream lost")
    assert re.fullmatch(r"Stream lost, retrying in \d+ s \N{EN DASH} no data yet", page.text("#notice-text"))
    scene.refusing_streams = False

    page.find("#retry").click()

    page.wait_until_live()


def test_a_silent_monitor_is_not_taken_for_a_calm_service(dashboard, scene):
    """While the server is there and its monitor is not, the page says how old its numbers are, and greys them."""
    scene.silence()

    dashboard.wait_until(lambda: dashboard.text("#connection-text") == "Monitor silent", "the silence is announced")
    words = dashboard.text("#notice-text")
    assert re.fullmatch(r"The monitor is silent \N{EN DASH} data is \d+ s old", words), words
    assert is_greyed(dashboard)
    assert dashboard.text("#health").startswith("Unknown")


def test_a_monitor_that_speaks_again_ends_the_notice(dashboard, scene):
    """The next report brings everything back."""
    scene.silence()
    dashboard.wait_until(lambda: dashboard.shows("#notice"), "the silence is announced")

    scene.speak()

    dashboard.wait_until(lambda: dashboard.text("#connection-text") == "Live", "the page is live again")
    dashboard.wait_until(lambda: not is_greyed(dashboard), "the colours are back")


def test_before_the_first_report_everything_says_that_it_is_collecting(page, scene):
    """A page that was opened too early shows dashes and what it waits for, and no chart of nothing."""
    scene.snapshot_at = None
    page.open(scene.url)

    page.wait_until(lambda: page.text("#connection-text") == "Monitor silent", "the state is announced")

    assert page.text("#notice-text") == "The monitor has not reported yet. Numbers appear with its first report."
    assert page.text("#health").startswith("Collecting")
    assert {page.tile(name) for name in ("requests", "p99", "executions", "memory")} == {MISSING}
    assert page.text('[data-chart="requests"] .plot-nothing').startswith("Collecting")
    assert not page.shows('[data-chart="requests"] .plot')


def test_values_that_are_missing_leave_a_gap_in_the_line(page, scene):
    """Two minutes without any request have no response time: the curve stops and starts again."""

    def pausing(at: float) -> Snapshot:
        latency = busy(at).latency
        if scene.opened_at - 180 < at < scene.opened_at - 60:
            latency = msgspec.structs.replace(latency, p50_ms=None, p95_ms=None, p99_ms=None)
        return msgspec.structs.replace(busy(at), latency=latency)

    scene.snapshot_at = pausing
    page.open(scene.url)
    page.wait_until_live()
    columns = """
        const canvas = document.querySelector('[data-chart="latency"] canvas');
        const { data, width, height } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const [red, green, blue] = [217, 131, 0];   // the p99 line, in the light scheme
        const drawn = [];
        for (let x = 0; x < width; x += 1) {
          let found = false;
          for (let y = 0; y < height; y += 1) {
            const i = (y * width + x) * 4;
            const near = Math.abs(data[i] - red) + Math.abs(data[i + 1] - green) + Math.abs(data[i + 2] - blue) < 90;
            if (near && data[i + 3] > 150) found = true;
          }
          drawn.push(found);
        }
        return drawn;
    """

    def drawn() -> str:
        """The columns from the first to the last that the line is in: 1 where it is, 0 where it is not."""
        return "".join("1" if column else "0" for column in page.run(columns)).strip("0")

    page.wait_until(lambda: len(drawn()) > 300, "the history is drawn")
    line = drawn()
    longest = max((len(gap) for gap in re.findall("0+", line)), default=0)
    assert 0.25 < longest / len(line) < 0.5, "about 120 of 300 seconds"


def test_a_server_with_a_token_asks_for_it(page, scene):
    """Without a token the page shows a form instead of numbers; with the right one it goes live."""
    scene.token = "correct horse"
    page.open(scene.url)
    page.wait_until(lambda: page.shows("#access"), "the form is shown")
    hidden = not page.shows("#content")

    page.find("#access-token").send_keys("correct horse\n")

    page.wait_until_live()
    page.wait_until(lambda: len(page.rows("agents")) == 4, "the agents are read with the token too")
    page.wait_until(lambda: page.coloured_pixels("latency") > 200, "so is the history")
    assert hidden
    assert not page.shows("#access")


def test_a_wrong_token_is_said_to_be_wrong(page, scene):
    """The form stays, says so, and is empty again."""
    scene.token = "correct horse"
    page.open(scene.url)
    page.wait_until(lambda: page.shows("#access"), "the form is shown")
    at_first = page.shows("#access-refused")

    page.find("#access-token").send_keys("battery staple\n")

    page.wait_until(lambda: page.shows("#access-refused"), "the refusal is shown")
    assert not at_first
    assert page.text("#access-refused") == "The server did not accept that token."
    assert page.find("#access-token").get_attribute("value") == ""
    assert page.run("return sessionStorage.length") == 0, "a token that does not work is not kept"


def test_the_token_stays_in_this_tab(page, scene):
    """It is kept in the tab's session storage and nowhere else, and a reload still has it."""
    scene.token = "correct horse"
    page.open(scene.url)
    page.wait_until(lambda: page.shows("#access"), "the form is shown")
    page.find("#access-token").send_keys("correct horse\n")
    page.wait_until_live()

    page.driver.refresh()

    page.wait_until_live()
    stored = page.run("return [JSON.stringify(sessionStorage), localStorage.length, document.cookie, location.href]")
    assert json.loads(stored[0]) == {"headrace.token": "correct horse"}
    assert stored[1:] == [0, "", scene.url]


def test_a_late_refusal_does_not_undo_a_token_that_was_accepted_meanwhile(page, scene):
    """What was asked without the token may be refused after it was entered; the page stays live and keeps it."""
    agents = "/api/v1/agents"
    scene.token = "correct horse"
    scene.agents_gate.open.clear()
    scene.stream_gate.open.clear()  # once it is refused nothing more is asked for
    page.be_patient()
    page.open(scene.url)
    page.wait_until(lambda: scene.agents_gate.asked == 1, "the agents were asked for without a token")
    scene.stream_gate.open.set()
    page.wait_until(lambda: page.shows("#access"), "the form is shown")
    page.find("#access-token").send_keys("correct horse\n")
    page.wait_until_live()
    page.wait_until(lambda: scene.agents_gate.asked == 2, "the agents were asked for with the token")
    before = page.answers()

    scene.agents_gate.open.set()

    # The question with the token, and the one without it, which is asked again.
    page.wait_until(lambda: page.answers().count(f"{agents} 200") >= 2, "both questions are answered")
    page.wait_until(lambda: len(page.rows("agents")) == 4, "the agents are listed")
    assert not [answer for answer in before if answer.startswith(agents)]
    assert page.answers().count(f"{agents} 401") == 1, "the refusal came late"
    assert page.text("#connection-text") == "Live"
    assert not page.shows("#access")
    assert page.run("return sessionStorage.length") == 1


def test_a_token_that_is_revoked_brings_the_form_back(page, scene):
    """When the server changes its token, the page notices with its next question."""
    scene.token = "correct horse"
    page.open(scene.url)
    page.wait_until(lambda: page.shows("#access"), "the form is shown")
    page.find("#access-token").send_keys("correct horse\n")
    page.wait_until_live()

    scene.token = "battery staple"

    page.wait_until(lambda: page.shows("#access-refused"), "the form is back")
    page.wait_until(lambda: scene.streams == 0, "nothing is listened to any more")


def test_a_hidden_tab_does_not_listen(dashboard, scene):
    """Looking elsewhere ends the stream; looking again brings it back."""
    tab = dashboard.driver.current_window_handle
    listening = scene.streams

    dashboard.driver.switch_to.new_window("tab")
    dashboard.wait_until(lambda: scene.streams == 0, "the hidden page stops listening")
    dashboard.driver.close()
    dashboard.driver.switch_to.window(tab)

    dashboard.wait_until(lambda: scene.streams == 1, "the visible page listens")
    dashboard.wait_until(lambda: dashboard.text("#connection-text") == "Live", "the page is live again")
    assert listening == 1


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (404, "This server hosts no agents."),
        (503, "The agents cannot be read: the server answered 503. Asking again in 5 s."),
    ],
)
def test_agents_that_cannot_be_read_leave_the_rest_alone(page, scene, status, words):
    """A failing list of agents is explained in its own place; everything else goes on."""
    scene.agents_status = status
    page.open(scene.url)
    page.wait_until_live()

    page.wait_until(lambda: page.text("#agents-empty") == words, "the reason is shown")
    assert not page.shows("#agents-none")


def test_a_history_that_cannot_be_read_makes_the_charts_begin_now(page, scene):
    """Without its past the page draws what arrives."""
    scene.history_status = 500
    page.open(scene.url)
    page.wait_until_live()

    page.wait_until(lambda: page.coloured_pixels("hits") > 5, "the first points are drawn")

    assert page.text("#connection-text") == "Live"


def test_an_answer_that_cannot_be_read_is_reported_and_tried_again(page, scene):
    """A list of agents of the wrong shape is an error in the console and an excuse on the page, which goes on."""
    good, scene.agents = scene.agents, "nonsense"
    page.open(scene.url)
    page.wait_until_live()
    page.wait_until(lambda: "the answer is not what it should be" in page.text("#agents-empty"), "the excuse is shown")

    scene.agents = good

    page.wait_until(lambda: len(page.rows("agents")) == 4, "the next answer is shown")
    assert any("TypeError" in complaint for complaint in page.complaints())
