"""The playground in a real browser: following, cancelling and resuming a job, rejected requests,
and the API key.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from img2img_client import AsyncClient
from img2img_server.api.keys import KeyRing, new_key
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.testing.memory_blobs import MemoryBlobStore
from tests.browser_page import (
    MARKS,
    browser,
    gateway,
    opened,
    playground,
    playwright,
    stack_of,
    start,
)
from tests.stack import photo, running_api

__all__ = ["browser"]  # `gateway` is a fixture.
WRONG_KEY = "The API key is wrong"
CAT = Path(__file__).parents[2] / "examples" / "cat.jpg"
pytestmark = MARKS


@pytest.fixture
def engine() -> FakeEngine:
    """Yields an engine whose jobs stop after their first step until it is released."""
    return FakeEngine(hold_after=1)


async def test_a_job_shows_its_preview_and_then_the_image_next_to_the_init_image(
    browser: playwright.Browser, engine: FakeEngine
) -> None:
    async with playground(browser, engine) as shown:
        page = shown.page
        await start(page, Samples="2", Seed="7")
        await page.get_by_text("Step 2 of 4.").wait_for()
        after = page.get_by_alt_text("After: the generated image")
        # The event is a preview.
        assert (await after.get_attribute("src") or "").startswith("blob:")
        bar = page.get_by_role("progressbar", name="Denoising")
        assert await bar.evaluate("bar => bar.value") == pytest.approx(2 / 4)
        preview = await after.get_attribute("src")
        engine.release()
        await page.get_by_text("Done in").wait_for()
        assert await after.get_attribute("src") != preview
        assert await after.evaluate("image => image.decode().then(() => image.naturalWidth)") == 624
        await page.get_by_role("button", name="Image 2").click()
        await page.get_by_text("Seed8").wait_for()
        link = await page.get_by_role("link", name="Stored PNG").get_attribute("href")
        assert link is not None
        assert link.startswith(f"{shown.url}generations/")
        split = page.get_by_label("How much of the init image is shown")
        await split.press("Home")
        assert await split.input_value() == "0"
        assert await page.locator("#history li").count() == 1
        assert await page.get_by_text("Denoise", exact=True).is_visible()


async def test_errors_are_shown_at_their_fields_with_the_labels_of_the_page(
    browser: playwright.Browser, engine: FakeEngine
) -> None:
    async with playground(browser, engine) as shown:
        page = shown.page
        await start(page, Prompt="", Width="100", Steps="999")
        prompt = page.get_by_label("Prompt", exact=True)
        await page.get_by_text("Prompt is required").wait_for()
        assert await prompt.get_attribute("aria-invalid") == "true"
        assert await page.locator('[data-field="width"] .error').inner_text() == (
            "Width must be between 256 and 1024"
        )
        steps = await page.locator('[data-field="num_inference_steps"] .error').inner_text()
        assert steps.startswith("Steps must be between")
        await prompt.fill("a cat")  # A new value removes the error of its field.
        assert await prompt.get_attribute("aria-invalid") is None
        assert await page.get_by_text("Prompt is required").count() == 0
        assert await page.locator('[data-field="width"] .error').count() == 1
        assert await page.get_by_role("button", name="Generate").is_enabled()
        await page.set_viewport_size({"width": 360, "height": 800})
        assert await page.evaluate("document.documentElement.scrollWidth") == 360


async def test_a_running_job_is_cancelled(browser: playwright.Browser, engine: FakeEngine) -> None:
    async with playground(browser, engine) as shown:
        page = shown.page
        await start(page)
        await page.get_by_text("Step 1 of 2.").wait_for()
        await page.get_by_role("button", name="Cancel").click()
        await page.get_by_role("status").get_by_text("Cancelled.").wait_for()
        assert await page.get_by_role("button", name="Generate").is_enabled()
        await page.evaluate("sessionStorage.clear()")  # as in a tab that did not create the job
        await page.reload()
        place = page.locator("#history .thumb").filter(has_text="cancelled")
        box = await place.bounding_box()
        assert box is not None
        assert box["height"] == pytest.approx(box["width"], abs=1)


async def test_a_reload_keeps_the_gallery_and_the_running_jobs(
    browser: playwright.Browser, engine: FakeEngine
) -> None:
    async with playground(browser, engine) as shown:
        page = shown.page
        for seed in ("7", "8"):
            await start(page, Seed=seed, Prompt=f"a blue cat {seed}")
            await page.get_by_text("Step 1 of 2.").wait_for()
        await page.reload()
        await page.get_by_text("Step 1 of 2.").wait_for()
        assert await page.get_by_label("Prompt", exact=True).input_value() == "a blue cat 8"
        assert await page.get_by_role("button", name="Generate").is_enabled()
        await page.locator('#history [title^="a blue cat 7"]').get_by_text("1 / 2").wait_for()
        assert await page.locator("#history li").count() == 2
        engine.release()
        await page.get_by_text("Done in").wait_for()
        for _ in range(2):
            await page.locator('#history img[alt^="a blue cat 7"][alt*="Done in"]').wait_for()
            await page.reload()
            await page.locator('#history img[alt^="a blue cat 7"][alt*="Done in"]').click()
            for which in ("#before", "#after"):
                shown_image = page.locator(which)
                assert await shown_image.evaluate(
                    "image => image.decode().then(() => image.naturalWidth)"
                )
            assert await page.locator("#after").evaluate("image => image.naturalWidth") == 624
            assert await page.get_by_label("Seed", exact=True).input_value() == "7"


async def test_jobs_of_other_programs_are_listed_page_by_page(
    browser: playwright.Browser,
) -> None:
    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        async with AsyncClient(shown.stack.api.address, api_key="dev-key") as client:
            for number in range(26):
                await client.generate(f"cat {number}", CAT, width=256, height=256)
        await page.evaluate("sessionStorage.clear()")
        await page.reload()
        await page.locator('#history [title^="cat 25,"]').wait_for()
        assert await page.locator("#history li").count() == 24
        await page.get_by_role("button", name="Show older jobs").click()
        await page.locator('#history [title^="cat 0,"]').click()
        assert await page.locator("#history li").count() == 26
        assert await page.get_by_role("button", name="Show older jobs").is_hidden()
        await page.get_by_text("Done in").wait_for()
        after = page.locator("#after")
        assert await after.evaluate("image => image.decode().then(() => image.naturalWidth)") == 256
        assert (await after.get_attribute("src") or "").startswith("generations/")
        # Without the init image there is nothing to compare with: the image is shown whole.
        assert await after.evaluate("image => getComputedStyle(image).clipPath") == "none"
        assert await page.get_by_label("How much of the init image is shown").is_hidden()
        assert await page.locator("#compare").evaluate("place => place.className") == ""
        assert await page.get_by_label("Prompt", exact=True).input_value() == "cat 0"


async def test_an_image_whose_stored_file_is_gone_comes_from_the_events(
    browser: playwright.Browser,
) -> None:
    async def gone(route: playwright.Route) -> None:
        await route.fulfill(status=404)

    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        await start(page)
        await page.get_by_text("Done in").wait_for()
        await page.route("**/generations/**", gone)
        await page.reload()
        await page.locator('#after[src^="blob:"]').wait_for()
        await page.locator('#history img[src^="blob:"]').wait_for()


async def test_several_init_images_make_one_job_each(
    browser: playwright.Browser, engine: FakeEngine
) -> None:
    async with playground(browser, engine) as shown:
        page = shown.page
        await page.get_by_text("version").wait_for()
        files = [
            {"name": f"{number}.png", "mimeType": "image/png", "buffer": photo(256, side)}
            for number, side in enumerate((256, 320, 384))
        ]
        await page.locator("#file").set_input_files(files)  # type: ignore[arg-type]
        await page.get_by_text("3 images: one job for each.").wait_for()
        await page.get_by_role("button", name="Remove 1.png").click()
        await page.get_by_text("2 images: one job for each.").wait_for()
        await page.get_by_role("button", name="Generate").click()
        await page.locator("#history li").nth(1).wait_for()
        engine.release()
        for place in range(2):
            await page.locator("#history li").nth(place).locator('img[alt*="Done in"]').wait_for()
        ids = await shown.stack.bus.jobs.list_ids("dev")
        made = [await shown.stack.bus.jobs.get("dev", each) for each in ids]
        assert sorted(each.job.params.height for each in made if each) == [512, 624]


async def test_a_model_offers_what_it_can_do(browser: playwright.Browser) -> None:
    async def with_another(route: playwright.Route) -> None:
        body = await (await route.fetch()).json()
        body["models"].append(
            body["models"][0]
            | {"name": "z", "max_side_pixels": 2048, "side_multiple": 16}
            | {"takes_negative_prompt": False, "guidance": "GUIDANCE_NONE", "schedulers": ["flow"]}
        )
        await route.fulfill(json=body)

    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        await page.route("**/v1/capabilities", with_another)
        await page.reload()
        await page.get_by_text("256 to 1024, multiples of 8.").wait_for()
        await page.get_by_label("Negative prompt").fill("dogs")
        await page.get_by_label("Model", exact=True).select_option("z")
        await page.get_by_text("256 to 2048, multiples of 16.").wait_for()
        assert await page.get_by_label("Negative prompt").is_hidden()
        assert await page.get_by_label("Guidance").is_hidden()
        assert await page.get_by_label("Scheduler").input_value() == "flow"
        assert await page.locator("#width").get_attribute("max") == "2048"
        assert "dogs" not in await page.locator("#code").inner_text()


async def test_a_job_can_be_cancelled_after_a_reload(
    browser: playwright.Browser, engine: FakeEngine
) -> None:
    async with playground(browser, engine) as shown:
        page = shown.page
        await start(page)
        await page.get_by_text("Step 1 of 2.").wait_for()
        await page.reload()
        await page.get_by_role("button", name="Cancel").click()
        await page.get_by_role("status").get_by_text("Cancelled.").wait_for()


async def test_a_reload_forgets_jobs_that_no_longer_exist(browser: playwright.Browser) -> None:
    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        stored = '[{"id": "99", "spec": {"prompt": "p"}, "thumbnail": ""}]'
        for text in (stored, "of another version"):
            await page.evaluate("text => sessionStorage.setItem('img2img-jobs', text)", text)
            await page.reload()
            await page.get_by_text("version 0").wait_for()
            await page.get_by_text("The jobs of your key are listed here.").wait_for()


async def test_a_new_init_image_clears_the_error_of_the_one_before(
    browser: playwright.Browser,
) -> None:
    async def refuse(route: playwright.Route) -> None:
        error = {"status": "error", "message": "Request body too large"}
        await route.fulfill(json=error, status=413)

    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        await page.route("**/v1/jobs", refuse)
        await start(page)
        await page.get_by_role("alert").get_by_text("Request body too large").wait_for()
        await page.get_by_role("button", name="Use the example").click()
        await page.get_by_text("Ready.").wait_for()
        assert await page.get_by_role("alert").count() == 0


@pytest.mark.parametrize("height", [900, 720, 500])
async def test_the_buttons_cover_no_field_of_the_form(
    browser: playwright.Browser, height: int
) -> None:
    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        await page.set_viewport_size({"width": 1280, "height": height})
        await page.get_by_text("version").wait_for()
        names = ("Safety checker", "Enhance prompt", "Generate")
        for place in (
            *map(page.get_by_label, names[:2]),
            page.get_by_role("button", name=names[2]),
        ):
            assert await place.evaluate(
                "it => { const {x, y, width, height} = it.getBoundingClientRect();"
                "return document.elementFromPoint(x + width / 2, y + height / 2) === it; }"
            )
        model = page.get_by_label("Model", exact=True)
        await model.scroll_into_view_if_needed()
        assert await model.is_visible()
        assert height < 900 or await page.locator(".fields").evaluate(
            "fields => fields.scrollHeight <= fields.clientHeight"
        )


async def test_the_docs_are_authorized_with_the_development_key(
    browser: playwright.Browser,
) -> None:
    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        await page.goto(f"{shown.url}docs")
        call = page.locator("#operations-tag-jobs, .opblock").filter(has_text="/v1/capabilities")
        await call.first.locator(".opblock-summary-control").click()
        await page.get_by_role("button", name="Try it out").click()
        async with page.expect_response("**/v1/capabilities") as response:
            await page.get_by_role("button", name="Execute").click()
        assert (await response.value).status == 200


async def test_a_stream_that_breaks_is_resumed(
    browser: playwright.Browser, engine: FakeEngine
) -> None:
    async with stack_of(engine) as stack:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        address, blobs = stack.api.address, stack.worker.blobs
        async with gateway(address, blobs, port) as url:
            page = await browser.new_page()
            await page.goto(url)
            await start(page)
            await page.get_by_text("Step 1 of 2.").wait_for()
        await page.get_by_text("Connection lost; resuming after event").wait_for()
        engine.release()
        async with gateway(address, blobs, port):
            await page.get_by_text("Done in").wait_for()
        await page.close()


async def test_a_key_that_is_typed_while_the_page_loads_is_kept(
    browser: playwright.Browser,
) -> None:
    loading = asyncio.Event()

    async def later(route: playwright.Route) -> None:
        await loading.wait()
        await route.continue_()

    async with (
        stack_of(FakeEngine()) as stack,
        gateway(stack.api.address, stack.worker.blobs) as url,
    ):
        page = await browser.new_page()
        page.set_default_timeout(10_000)
        await page.route("**/playground/settings.json", later)
        await page.goto(url)
        field = page.get_by_label("API key")
        await field.fill("wrong")
        async with page.expect_response("**/playground/settings.json"):
            loading.set()
        await field.press("Tab")
        await page.get_by_text(WRONG_KEY).wait_for()
        assert await field.input_value() == "wrong"
        await page.close()


async def test_the_key_is_asked_for_and_kept_in_the_tab(
    browser: playwright.Browser, tmp_path: Path
) -> None:
    key, entry = new_key("shop", [])
    file = tmp_path / "keys.toml"
    file.write_text(entry)
    async with (
        running_api(memory_bus(), keys=KeyRing(file, dev_key=False)) as api,
        gateway(api.address, MemoryBlobStore(), api_keys_file=file) as url,
        opened(browser, url) as page,
    ):
        field = page.get_by_label("API key")
        assert await field.input_value() == ""
        for wrong in ("wrong", "schlüssel"):
            await field.fill(wrong)
            await field.press("Tab")
            await page.get_by_text(WRONG_KEY).wait_for()
        await field.fill(key)
        await field.press("Tab")
        await page.get_by_text("version").wait_for()
        await page.reload()
        await page.get_by_text("version").wait_for()
        assert await field.input_value() == key
        assert await page.evaluate("localStorage.length + document.cookie.length") == 0
        assert key not in await page.locator("#code").inner_text()
