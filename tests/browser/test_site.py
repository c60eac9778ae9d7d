"""The documentation site in a real browser: its search, and no request to another host."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tests.browser_page import MARKS, browser, playwright
from tests.readme import ROOT

__all__ = ["browser"]
SITE = ROOT / "site"
pytestmark = [
    *MARKS,
    pytest.mark.skipif(not (SITE / "index.html").exists(), reason="`make docs` builds the site"),
]
PAGES = ("index.html", "reference/grpc.html", "cookbook.html", "architecture.html")


class Quiet(SimpleHTTPRequestHandler):
    """A server of files that logs nothing."""

    def log_message(self, *_: object) -> None:
        """Logs nothing."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    handler = functools.partial(Quiet, directory=str(SITE))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.parametrize("width", [1280, 390], ids=["desktop", "phone"])
async def test_pages_load_nothing_of_other_hosts_and_fit_the_screen(
    browser: playwright.Browser, site: str, width: int
) -> None:
    page = await browser.new_page(viewport={"width": width, "height": 844})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    for name in PAGES:
        await page.goto(site + name)
        await page.wait_for_load_state("networkidle")
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
    await page.close()
    other = [url for url in requests if not url.startswith((site, "data:", "blob:"))]
    assert (other, errors) == ([], [])


@pytest.mark.parametrize("form", ["served", "files"])
async def test_the_search_finds_a_field_of_the_protocol(
    browser: playwright.Browser, site: str, form: str
) -> None:
    page = await browser.new_page()
    await page.goto(site if form == "served" else (SITE / "index.html").as_uri())
    await page.get_by_placeholder("Search").click()
    await page.keyboard.type("preview_interval_steps")
    result = page.locator(".md-search-result__link").first
    await result.wait_for()
    links = await page.locator(".md-search-result__link").evaluate_all(
        "links => links.map((link) => link.href)"
    )
    await page.close()
    assert any("/reference/grpc.html" in link for link in links)
