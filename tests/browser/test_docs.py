"""The page at /docs in a real browser: it lists every operation, and "Try it out" makes a job."""

from __future__ import annotations

import httpx

from img2img_server.testing.fake_engine import FakeEngine
from tests.browser_page import MARKS, browser, gateway, opened, playwright, stack_of

__all__ = ["browser"]  # `gateway` is a fixture.
pytestmark = MARKS


async def test_the_page_lists_every_operation_and_its_example_makes_a_job(
    browser: playwright.Browser,
) -> None:
    async with (
        stack_of(FakeEngine()) as stack,
        gateway(stack.api.address, stack.worker.blobs) as url,
        opened(browser, f"{url}docs") as page,
    ):
        async with httpx.AsyncClient(base_url=url) as http:
            document = (await http.get("/openapi.json")).json()
            described = [*document["paths"].values(), *document["webhooks"].values()]
        operations = page.locator(".opblock")
        await operations.first.wait_for()
        assert await operations.count() == sum(map(len, described))
        operation = operations.filter(has_text="/api/v1/enterprise/realtime/img2img").first
        await operation.locator(".opblock-summary").click()
        await operation.get_by_text("Responds when the job has ended").wait_for()
        await operation.get_by_role("button", name="Try it out").click()
        await operation.get_by_role("button", name="Execute").click()
        response = operation.locator(".live-responses-table")
        await response.get_by_text('"generationTime"').wait_for()
        assert (await response.locator(".response-col_status").last.inner_text()).startswith("200")
