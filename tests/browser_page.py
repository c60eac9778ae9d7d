"""A real browser and the gateway of a test. Modules that import this are skipped, with the reason,
if playwright or a Chromium is missing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import pytest_asyncio

from img2img_server.gateway.server import serve
from img2img_server.storage.interface import BlobStore
from img2img_server.testing.fake_engine import FakeEngine
from tests.http_stack import fetch_photo
from tests.stack import Stack, running_stack, settings

playwright = pytest.importorskip("playwright.async_api", reason="playwright is not installed")
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
MARKS = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(CHROMIUM is None, reason=f"none of {', '.join(NAMES)} is here"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[playwright.Browser]:
    async with playwright.async_playwright() as driver:
        started = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        await started.close()


@asynccontextmanager
async def gateway(
    address: str, blobs: BlobStore, port: int = 0, **changes: Any
) -> AsyncIterator[str]:
    """Runs a gateway for the api at `address` and yields its URL. `changes`: settings."""
    stop, started = asyncio.Event(), asyncio.get_running_loop().create_future()
    config = settings(
        api_address=address, http_port=port, drain_seconds=1, cors_origins="loopback", **changes
    )
    task = asyncio.create_task(serve(config, blobs, stop, started.set_result))
    try:
        yield f"http://{await started}/"
    finally:
        stop.set()
        await task


@asynccontextmanager
async def opened(browser: playwright.Browser, url: str) -> AsyncIterator[playwright.Page]:
    """Yields the page. An error in the browser's console fails the test."""
    complaints: list[str] = []
    page = await browser.new_page()
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("console", lambda line: complaints.append(line.text))
    page.set_default_timeout(10_000)
    await page.goto(url)
    yield page
    await page.close()
    assert [text for text in complaints if "Failed to load resource" not in text] == []


@asynccontextmanager
async def stack_of(engine: FakeEngine) -> AsyncIterator[Stack]:
    async with running_stack(engine, fetch=fetch_photo) as running:
        yield running


@dataclass(frozen=True)
class Playground:
    """The open page, its URL and the service."""

    page: playwright.Page
    url: str
    stack: Stack


@asynccontextmanager
async def playground(browser: playwright.Browser, engine: FakeEngine) -> AsyncIterator[Playground]:
    async with (
        stack_of(engine) as stack,
        gateway(stack.api.address, stack.worker.blobs) as url,
        opened(browser, url) as page,
    ):
        yield Playground(page, url, stack)


async def start(page: playwright.Page, **fields: str) -> None:
    """Fills the form with the example image and sends it."""
    await page.get_by_role("button", name="Use the example").click()
    await page.get_by_text("cat.jpg, 451 x 300").wait_for()
    for label, value in fields.items():
        await page.get_by_label(label, exact=True).fill(value)
    await page.get_by_role("button", name="Generate").click()
