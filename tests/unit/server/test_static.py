"""The dashboard's files over HTTP, and the rules that the files themselves keep."""

import re
from collections.abc import AsyncIterator
from importlib.resources import files
from pathlib import Path

import httpx
import pytest

from headrace.errors import InvalidRequest
from headrace.server.static import dashboard_app

ROOT = Path(str(files("headrace").joinpath("server", "dashboard")))
ASSETS = ROOT / "assets"
ASSET_NAMES = sorted(path.relative_to(ASSETS).as_posix() for path in ASSETS.rglob("*") if path.is_file())
OWN_SOURCES = sorted([ROOT / "index.html", *ASSETS.glob("*.js"), *ASSETS.glob("*.css")])
FORBIDDEN = [
    *[r"innerHTML", r"outerHTML", r"insertAdjacentHTML", r"document\.write", r"\beval\(", r"new Function"],
    *[r" style=", r" on\w+=\"", r"<style", r"<script>", r"console\.", r"localStorage"],
]
MODULES = sorted(ASSETS.glob("*.js"))


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(dashboard_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://headrace") as client:
        yield client


async def test_the_page_comes_with_a_policy_that_runs_nothing_but_our_files(client):
    """The index is HTML with a strict CSP, no sniffing and no referrer."""
    answer = await client.get("/dashboard")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "'self' data:"
    assert policy["base-uri"] == policy["frame-ancestors"] == policy["form-action"] == "'none'"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("name", ASSET_NAMES)
async def test_every_asset_is_served_with_its_type(client, name):
    """Each file of the package is at /dashboard/assets/ with the media type of its ending."""
    types = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "txt": "text/plain"}

    answer = await client.get(f"/dashboard/assets/{name}")

    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith(types[name.rpartition(".")[2]])
    assert answer.content == (ASSETS / name).read_bytes()


async def test_a_file_that_the_browser_has_costs_one_304(client):
    """Answers must be revalidated, and the ETag that came with them is enough for that."""
    first = await client.get("/dashboard/assets/app.js")

    tags = [first.headers["etag"], f'"other", W/{first.headers["etag"]}', "*"]
    again = [await client.get("/dashboard/assets/app.js", headers={"If-None-Match": tag}) for tag in tags]
    other = await client.get("/dashboard/assets/app.js", headers={"If-None-Match": '"other"'})

    assert first.headers["cache-control"] == "no-cache"
    assert [answer.status_code for answer in again] == [304, 304, 304]
    assert all(answer.content == b"" and answer.headers["etag"] == first.headers["etag"] for answer in again)
    assert other.status_code == 200


async def test_head_has_the_headers_of_get_and_no_body(client):
    """HEAD works for pages, assets and for what is not there."""
    for path in ("/dashboard", "/dashboard/assets/app.js", "/dashboard/nothing"):
        got, head = await client.get(path), await client.head(path)

        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers == got.headers


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/nothing",
        "/dashboard/assets/",
        "/dashboard/assets/nothing.js",
        "/dashboard/assets/../index.html",
        "/dashboard/assets/%2e%2e/%2e%2e/live.py",
        "/dashboard/assets//etc/passwd",
        "/",
    ],
)
async def test_any_other_path_is_a_404_problem(client, path):
    """Only known names are files; everything else, whatever it tries, is problem+json."""
    answer = await client.get(httpx.URL("http://headrace", raw_path=path.encode()))

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["code"] == "path-not-found"


async def test_a_method_that_changes_things_is_refused(client):
    """POST is 405 and says what is allowed."""
    answer = await client.post("/dashboard")

    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET, HEAD"


async def test_the_slash_at_the_end_leads_to_the_one_address(client):
    """Relative links mean something else below a slash, so /dashboard/ redirects."""
    answer = await client.get("/dashboard/", follow_redirects=True)

    assert answer.url.path == "/dashboard"
    assert answer.status_code == 200


async def test_the_page_works_below_a_prefix(client):
    """Behind a proxy that adds a path the same files are found."""
    page = await client.get("/ops/eu/dashboard")
    asset = await client.get("/ops/eu/dashboard/assets/app.js")

    assert (page.status_code, asset.status_code) == (200, 200)


async def test_a_websocket_is_refused():
    """The dashboard's files speak http only."""
    with pytest.raises(InvalidRequest, match="websocket"):
        await dashboard_app()({"type": "websocket"}, None, None)


def test_all_links_of_the_page_are_relative_and_lead_to_files():
    """Every href and src of index.html names a file of the package."""
    html = (ROOT / "index.html").read_text()

    links = [link for link in re.findall(r'(?:href|src)="([^"]+)"', html) if not link.startswith("#")]

    assert len(links) > 5
    assert [link for link in links if not (ASSETS / link.removeprefix("dashboard/assets/")).is_file()] == []


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_every_import_names_a_module_that_exists_and_what_it_exports(module):
    """A module asks only for names that the other module exports."""
    for names, source in re.findall(r'import \{([^}]+)\} from "\./([^"]+)"', module.read_text()):
        exporting = (ASSETS / source).read_text()
        for name in (name.strip() for name in names.split(",")):
            assert re.search(rf"export (const|class|function|async function) {name}\b", exporting), f"{source}: {name}"


@pytest.mark.parametrize("source", OWN_SOURCES, ids=lambda path: path.name)
def test_sources_keep_the_rules_of_the_house(source):
    """No markup out of data, nothing inline, no code out of text, no chatter; lines and files stay short."""
    text = source.read_text()

    assert [pattern for pattern in FORBIDDEN if re.search(pattern, text)] == []
    assert [line for line in text.splitlines() if len(line) > 119] == []
    assert text.count("\n") <= 600


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.name)
def test_modules_say_what_they_are_for(module):
    """A module opens with a comment, and leaves nothing behind on the window."""
    text = module.read_text()

    assert text.startswith("/**\n")
    assert re.findall(r"\b(?:window|globalThis)\.\w+\s*=[^=]", text) == []


def test_the_vendored_library_comes_with_its_licence():
    """uPlot is MIT: its text travels with the code."""
    licence = (ASSETS / "vendor" / "uPlot.LICENSE.txt").read_text()

    assert "MIT License" in licence
    assert "Leon Sorokin" in licence
