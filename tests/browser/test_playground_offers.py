"""The playground offers the LoRAs and the defaults of a model, and shows the request as code that
runs.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.browser_page import MARKS, browser, playground, playwright, start
from tests.stack import Stack

__all__ = ["browser"]  # `gateway` is a fixture.
CAT = Path(__file__).parents[2] / "examples" / "cat.jpg"
PROMPT = """it's 50% "done" \\n %s é"""
pytestmark = MARKS


async def test_loras_are_offered_where_the_model_has_some(browser: playwright.Browser) -> None:
    async def with_lora(route: playwright.Route) -> None:
        body = await (await route.fetch()).json()
        body["models"][0]["loras"] = ["sketch"]
        await route.fulfill(json=body)

    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        await page.get_by_text("version").wait_for()
        lora = page.get_by_label("LoRA", exact=True)
        assert not await lora.is_visible()
        assert "lora" not in await page.locator("#code").inner_text()
        await page.route("**/v1/capabilities", with_lora)
        await page.reload()
        await lora.select_option("sketch")
        await page.get_by_label("LoRA scale").fill("0.5")
        text = await page.locator("#code").inner_text()
        assert 'loras={"sketch":0.5}' in text


async def test_the_models_own_strength_and_a_seed_of_64_bits_are_asked_for(
    browser: playwright.Browser,
) -> None:
    engine = FakeEngine(replace(FAKE_MODEL, default_strength=0.4, max_num_inference_steps=7))
    async with playground(browser, engine) as shown:
        page, seed = shown.page, 2**63 - 1
        await page.get_by_text("version").wait_for()
        assert await page.locator("#strength").input_value() == "0.4"
        assert await page.locator("#steps").get_attribute("max") == "7"
        assert "strength" not in await page.locator("#code").inner_text()
        await page.locator("#seed").fill(str(seed))
        assert f"seed={seed}," in await page.locator("#code").inner_text()
        await start(page, Width="256", Height="256")
        await page.get_by_text("Done in").wait_for()
        made = await params(shown.stack, max(await shown.stack.bus.jobs.list_ids("dev")))
        assert (made["strength"], made["seed"]) == (0.4, seed)
        await page.locator("#strength").fill("0.8")
        assert "strength=0.8" in await page.locator("#code").inner_text()


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not here")
async def test_the_request_as_code_is_the_same_request(
    browser: playwright.Browser, tmp_path: Path
) -> None:
    (tmp_path / "cat.jpg").write_bytes(CAT.read_bytes())
    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        await start(page, Prompt=PROMPT, Seed="7", Width="256", Height="256")
        await page.get_by_text("Done in").wait_for()
        first = max(await shown.stack.bus.jobs.list_ids("dev"))
        request = await params(shown.stack, first)
        for language, command in (
            ("python", [sys.executable, "-"]),
            ("curl", ["bash", "-eu"]),
            ("contract", ["bash", "-eu"]),
        ):
            await page.get_by_label("Language").select_option(language)
            text = (await page.locator("#code").inner_text()).partition("# The events of the job")[
                0
            ]
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=tmp_path,
                env={**os.environ, "IMG2IMG_API_KEY": "dev-key"},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            printed_text, _ = await process.communicate(text.encode())
            assert process.returncode == 0, printed_text.decode()
            made = max(await shown.stack.bus.jobs.list_ids("dev"))
            assert made > first, printed_text.decode()
            first = made
            known = await params(shown.stack, made)
            different = {name for name in request if request[name] != known[name]}
            more = {"scheduler"} if language == "contract" else set()
            assert different <= {"preview_interval_steps", "annotations", *more}, language


@pytest.mark.parametrize("name", ["cat.jpg", "-n it's %s \" $(id).jpg"])
async def test_the_request_as_curl_sends_the_prompt_and_the_file_as_they_are(
    browser: playwright.Browser, tmp_path: Path, name: str
) -> None:
    data = CAT.read_bytes()
    (tmp_path / name).write_bytes(data)
    curl = tmp_path / "curl"
    curl.write_text("#!/bin/sh\nexec cat\n")  # This curl prints the request instead of sending it.
    curl.chmod(0o755)
    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        file = {"name": name, "mimeType": "image/jpeg", "buffer": data}
        await page.locator("#file").set_input_files(file)  # type: ignore[arg-type]
        await page.get_by_text("451 x 300").wait_for()
        for prompt in ("%s", '"%s"', "%d %% $(id) `id` $HOME \\ '", "two\nlines \u2028"):
            await page.get_by_label("Prompt", exact=True).fill(prompt)
            await page.get_by_label("Language").select_option("curl")
            spec = json.loads(await printed(page, tmp_path))["spec"]
            assert (spec["prompt"], base64.b64decode(spec["init_image"]["data"])) == (prompt, data)
            await page.get_by_label("Language").select_option("contract")
            body = json.loads(await printed(page, tmp_path))
            assert (body["prompt"], base64.b64decode(body["init_image"])) == (prompt, data)


async def test_a_file_that_is_no_image_is_not_shown_as_a_broken_one(
    browser: playwright.Browser,
) -> None:
    async with playground(browser, FakeEngine()) as shown:
        page = shown.page
        file = {"name": "notes.md", "mimeType": "text/markdown", "buffer": b"# Notes\n\nNone."}
        await page.locator("#file").set_input_files(file)  # type: ignore[arg-type]
        await page.get_by_text("notes.md (this browser cannot display it)").wait_for()
        assert await page.locator("#chosen").is_hidden()
        assert await page.locator("#before").get_attribute("src") is None
        await page.get_by_role("button", name="Generate").click()
        await page.get_by_text("the data is plain text, not an image").wait_for()


async def printed(page: playwright.Page, folder: Path) -> bytes:
    """Returns the output of the code on the page; its `curl` is the one in the folder."""
    text = await page.locator("#code").text_content() or ""
    process = await asyncio.create_subprocess_exec(
        "bash",
        "-eu",
        cwd=folder,
        env={**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate(text.partition("# and the events")[0].encode())
    assert process.returncode == 0
    return out


async def params(stack: Stack, job_id: int) -> dict[str, object]:
    stored = await stack.bus.jobs.get("dev", job_id)
    assert stored is not None
    given = stored.job.params
    return {name: getattr(given, name) for name in given.__dataclass_fields__}
