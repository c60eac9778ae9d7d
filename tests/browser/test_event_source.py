"""An EventSource in a real browser watches a job with a token of it."""

from __future__ import annotations

import httpx

from img2img_server.testing.fake_engine import FakeEngine
from tests.browser_page import MARKS, browser, opened, playwright
from tests.browser_page import gateway as serving
from tests.http_stack import photo_base64
from tests.stack import running_stack, settings

__all__ = ["browser"]
pytestmark = MARKS
# Collects the kinds of the events, and "refused" if the browser gives up.
WATCH = """path => {
  window.kinds = [];
  let step;
  window.stepped = new Promise(resolve => { step = resolve; });
  window.ended = new Promise(resolve => {
    const source = new EventSource(path);
    for (const kind of ["snapshot", "queued", "started", "step", "succeeded"])
      source.addEventListener(kind, () => {
        window.kinds.push(kind);
        if (kind === "step") step();
        if (kind === "succeeded") { source.close(); resolve(window.kinds); }
      });
    source.onerror = () => {
      if (source.readyState === EventSource.CLOSED) resolve(["refused"]);
    };
  });
}"""


async def test_a_browser_watches_a_job_with_its_token(browser: playwright.Browser) -> None:
    engine = FakeEngine(hold_after=1)
    config = settings(stream_token_keys="k" * 32)
    async with (
        running_stack(engine, api_config=config) as stack,
        serving(stack.api.address, stack.worker.blobs) as url,
        httpx.AsyncClient(base_url=url, headers={"X-API-Key": "dev-key"}) as http,
        opened(browser, url) as page,
    ):
        sent = {"prompt": "a", "init_image": {"data": photo_base64()}, "num_inference_steps": 4}
        job = (await http.post("/v1/jobs", json={"spec": sent})).json()["job"]
        made = (await http.post(f"/v1/jobs/{job['id']}:token")).json()
        path = f"/v1/jobs/{job['id']}/events?token={made['token']}"
        await page.evaluate(WATCH, path)
        await page.evaluate("window.stepped")  # The event arrives before the end of the job.
        engine.release()
        kinds = await page.evaluate("window.ended")
        assert kinds[:3] == ["snapshot", "queued", "started"]
        assert kinds[-1] == "succeeded"
        await page.evaluate(WATCH, path[:-4])
        assert await page.evaluate("window.ended") == ["refused"]
