"""The dashboard of a real service under real load, in a real browser."""

import asyncio
import itertools
import os
import threading
from pathlib import Path

import pytest

from tests.browser.page import MISSING
from tests.running import execute_steadily, running

SCREENSHOT = os.environ.get("HEADRACE_TEST_SCREENSHOT")
SECONDS_A_RATE = 3.0
# A p99 takes 1 000 requests within the window, and a slow machine may answer few a second.
WINDOW_S = 300
LOAD_S_MAX = 100.0
EXAMPLES = Path(__file__).parents[2] / "examples" / "agents"


@pytest.fixture
def service(tmp_path):
    """A whole service with the sample agents."""
    with running(tmp_path, "--workers", "2", environment={"HEADRACE_MONITOR_WINDOW_S": str(WINDOW_S)}) as service:
        for sample in ("log_analyst", "csv_profiler", "text_summariser"):
            service.deploy(sample, (EXAMPLES / f"{sample}.py").read_text())
        service.deploy("echo", "async def Agent(input, context): return input")
        yield service


@pytest.fixture
def load(service):
    """One to three hundred executions a second in turn, for as long as the test runs."""
    stop = threading.Event()

    async def execute():
        for rate in itertools.cycle((300, 100, 200)):
            if stop.is_set():
                break
            over = asyncio.Event()
            executing = asyncio.create_task(execute_steadily(service.port, "echo", rate=rate, stop=over))
            await asyncio.to_thread(stop.wait, SECONDS_A_RATE)
            over.set()
            await executing

    thread = threading.Thread(target=lambda: asyncio.run(execute()))
    thread.start()
    yield
    stop.set()
    thread.join()


@pytest.mark.timeout(400)
def test_the_dashboard_moves_while_load_runs(service, load, page):
    """Requests, percentiles, endpoints, workers and agents are those of the load, and they change."""
    page.open(f"{service.url}/dashboard")
    page.wait_until(lambda: "POST /api/v1/agents/{agent_id}/execute" in " ".join(page.rows("endpoints")), "it is seen")
    page.wait_until(lambda: len(page.rows("workers")) == 2, "both workers are listed")
    page.wait_until(lambda: len(page.rows("agents")) == 4, "the agents are listed")
    page.wait_until(lambda: page.tile("p99") != MISSING, "there are enough requests for a p99", wait_s=LOAD_S_MAX)
    seen = set()
    page.wait_until(lambda: seen.add(page.tile("requests")) or len(seen) >= 3, "the rate moves")
    page.wait_until(lambda: page.coloured_pixels("requests") > 0, "the chart is drawn")
    if SCREENSHOT:
        threading.Event().wait(float(os.environ.get("HEADRACE_TEST_SCREENSHOT_AFTER_S", "0")))
        height = page.run("return document.documentElement.scrollHeight")
        page.size(1280, height)
        page.driver.save_screenshot(SCREENSHOT)
