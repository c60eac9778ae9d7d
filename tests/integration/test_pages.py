"""Runs the programs and commands of the first pages and of the cookbook unchanged, against the
whole service on this machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import numpy as np
import pytest
import pytest_asyncio
from aiohttp import web
from minio import Minio
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.local_stack import LocalStack, free_port, local_stack
from img2img_server.devstack import LocalServers
from tests.browser_page import CHROMIUM, opened, playwright
from tests.readme import ROOT, Block, blocks, titled
from tests.web_peers import every_request, serving

PAGE = ROOT / "docs/cookbook.md"
V1 = ROOT / "docs/v1-api.md"
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WAIT_SECONDS = 60.0
# Records the settings of a command instead of starting the service.
MAKE = """#!/bin/sh
test "$*" = serve && env | grep ^IMG2IMG_ > settings
"""


@dataclass(frozen=True)
class Reader:
    """Runs programs of the page as a reader does who saves them and starts them."""

    service: LocalStack
    folder: Path

    def local(self, text: str) -> str:
        """Returns a program or command with the addresses of this service."""
        text = text.replace("127.0.0.1:50051", self.service.grpc_address)
        text = text.replace("https://example.org/", f"{self.service.http_url}/playground/")
        return text.replace("http://127.0.0.1:8080", self.service.http_url)

    async def shell(self, block: Block, **environment: str) -> str:
        """Runs the commands of a page and returns their output."""
        text = self.local(block.text).replace(".venv/bin/", "")
        async with self.started("bash", "-euo", "pipefail", "-c", text, **environment) as process:
            return "\n".join(await finished(process))

    @asynccontextmanager
    async def started(
        self, *command: str, **environment: str
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """Starts a command and kills it at the end."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        names = {**os.environ, "PATH": path, "IMG2IMG_SERVER": self.service.grpc_address}
        process = await asyncio.create_subprocess_exec(
            *command, cwd=self.folder, env=names | environment, stdout=asyncio.subprocess.PIPE
        )
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()

    @asynccontextmanager
    async def program(
        self, name: str, *changes: tuple[str, str], **environment: str
    ) -> AsyncIterator[asyncio.subprocess.Process]:
        """Starts a Python program of the page."""
        text = self.local(titled(PAGE, name).text)
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (self.folder / name).write_text(text, encoding="utf-8")
        async with self.started(sys.executable, "-u", name, **environment) as process:
            yield process

    async def lines(self, name: str, **environment: str) -> list[str]:
        """Runs a Python program of the page and returns the lines that it prints."""
        async with self.program(name, **environment) as process:
            return await finished(process)


async def finished(process: asyncio.subprocess.Process) -> list[str]:
    """Returns the rest of the output of a process that succeeds."""
    async with asyncio.timeout(WAIT_SECONDS):
        output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode().splitlines()


async def line_of(process: asyncio.subprocess.Process) -> str:
    """Returns the next line of a process."""
    assert process.stdout
    async with asyncio.timeout(WAIT_SECONDS):
        return (await process.stdout.readline()).decode().strip()


def write_lora(path: Path) -> None:
    """Writes a LoRA for one layer of the model that ships."""
    random, rank, size = np.random.default_rng(1), 4, 128
    down = random.normal(0, 1, (rank, size)).astype(np.float32)
    up = random.normal(0, 1, (size, rank)).astype(np.float32)
    save_file({f"unet.{LAYER}.lora_A.weight": down, f"unet.{LAYER}.lora_B.weight": up}, path)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Reader]:
    folder = tmp_path_factory.mktemp("cookbook")
    (folder / "examples").symlink_to(ROOT / "examples")
    (folder / "photo.jpg").symlink_to(ROOT / "examples/cat.jpg")
    (folder / "loras").mkdir()
    write_lora(folder / "loras/ink.safetensors")
    settings: dict[str, str] = {}
    for block in blocks(PAGE, "sh"):
        if "make serve" in block.text:
            settings |= await settings_of(block, folder)
    assert set(settings) == {"IMG2IMG_WEBHOOK_SECRET", "IMG2IMG_LORA_DIR"}
    settings["IMG2IMG_LORA_DIR"] = str(folder / settings["IMG2IMG_LORA_DIR"])
    async with local_stack(folder / "state", **settings) as service:
        yield Reader(service, folder)


async def settings_of(block: Block, folder: Path) -> dict[str, str]:
    """Returns the settings with which the commands of a block start the service."""
    make = folder / "bin/make"
    make.parent.mkdir(exist_ok=True)
    make.write_text(MAKE)
    make.chmod(0o755)
    names = {"PATH": f"{make.parent}:{os.environ['PATH']}"}
    command = ("bash", "-euo", "pipefail", "-c", block.text)
    process = await asyncio.create_subprocess_exec(*command, cwd=folder, env=names)
    assert await process.wait() == 0
    lines = (folder / "settings").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)


pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_receiver_prints_each_webhook_once_and_refuses_forged_ones(
    reader: Reader,
) -> None:
    [command] = [each.text for each in blocks(PAGE, "sh") if "--webhook" in each.text]
    port = free_port()
    async with reader.program("receiver.py", ("9000", str(port))) as receiver:
        async with reader.started("bash", "-c", command.replace(":9000/", f":{port}/")) as caller:
            [name] = await finished(caller)
        status, order, link = (await line_of(receiver)).split()
        async with httpx.AsyncClient() as http:
            forged = await http.post(f"http://127.0.0.1:{port}/", content=b'{"id": 1}')
            image = await http.get(link)
    assert name.startswith("jobs/")
    assert (status, order, forged.status_code) == ("success", "order-7", 401)
    assert image.content.startswith(b"\x89PNG")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
async def test_the_page_shows_progress_and_resumes_a_broken_stream(reader: Reader) -> None:
    page_text = reader.local(titled(PAGE, "page.html").text)

    async def page_response(_: web.Request) -> web.Response:
        return web.Response(text=page_text, content_type="text/html")

    async with (
        serving(every_request(page_response)) as port,
        playwright.async_playwright() as driver,
    ):
        chromium = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        async with opened(chromium, f"http://127.0.0.1:{port}/page.html") as page:
            broken: list[str] = []

            async def break_first(route: playwright.Route) -> None:
                broken.append(route.request.url)
                await (route.abort() if len(broken) == 1 else route.continue_())

            await page.route("**/events?*", break_first)
            await page.locator("input").set_input_files(ROOT / "examples/cat.jpg")
            await page.get_by_text("The connection was lost.").wait_for()
            await page.get_by_text("Done.").wait_for(timeout=WAIT_SECONDS * 1000)
            loaded = "img => img.decode().then(() => [img.src, img.naturalWidth])"
            source, width = await page.locator("img").evaluate(loaded)
            steps = await page.locator("progress").evaluate("bar => [bar.value, bar.max]")
        await chromium.close()
    assert len(broken) == 2
    assert source.startswith(f"{reader.service.http_url}/generations/")
    assert width > 0
    assert steps[0] == steps[1] > 1


async def test_a_killed_program_continues_with_the_same_job_and_the_next_event(
    reader: Reader,
) -> None:
    async with reader.program("resume.py") as first:
        before = [await line_of(first) for _ in range(2)]
        first.kill()
    stored = json.loads((reader.folder / "job.json").read_text())["sequence"]
    *after, link = await reader.lines("resume.py")
    seen = [line.split()[:2] for line in (*before, *after)]
    assert {name for name, _ in seen} == {seen[0][0]}
    numbers = [int(number) for _, number in seen]
    # The event that was printed while the program was killed may be repeated; none is missing.
    assert stored in (numbers[1] - 1, numbers[1], numbers[1] + 1)
    steps = [line.split()[3] for line in (*before, *after)]
    assert sorted(set(map(int, steps))) == list(range(1, len(set(steps)) + 1))
    assert after[-1].split()[3] == after[-1].split()[5]
    assert link.startswith(reader.service.http_url)
    assert not (reader.folder / "job.json").exists()


async def test_images_are_stored_in_the_bucket_of_the_tenant(
    reader: Reader, engines: LocalServers
) -> None:
    bucket, endpoint = f"shop-{uuid.uuid4()}", engines.s3_endpoint_url
    keys = (engines.s3_access_key, engines.s3_secret_key)
    client = Minio(
        endpoint.removeprefix("http://"),
        access_key=keys[0],
        secret_key=keys[1],
        secure=False,
        region="us-east-1",
    )
    await asyncio.to_thread(client.make_bucket, bucket)
    names = {"AWS_ENDPOINT_URL": endpoint, "BUCKET": bucket, "PUBLIC_URL": f"{endpoint}/{bucket}"}
    names |= {"AWS_ACCESS_KEY_ID": keys[0], "AWS_SECRET_ACCESS_KEY": keys[1]}
    [link] = await reader.lines("own_bucket.py", **names)
    found = await asyncio.to_thread(lambda: list(client.list_objects(bucket, recursive=True)))
    assert [f"{endpoint}/{bucket}/{each.object_name}" for each in found] == [link]


async def test_the_program_with_openais_sdk_saves_the_image(reader: Reader) -> None:
    lines = await reader.lines("openai_sdk.py")
    assert [line.split()[0] for line in lines] == [
        *["image_edit.partial_image"] * 2,
        "image_edit.completed",
    ]
    with Image.open(reader.folder / "painting.png") as image:
        assert (image.format, f"{image.width}x{image.height}") == ("PNG", lines[-1].split()[1])


async def test_the_images_of_a_lora_differ_by_its_scale(reader: Reader) -> None:
    assert await reader.lines("lora.py") == ["atelier offers ink"]
    half, full = ((reader.folder / f"lora-{scale}.png").read_bytes() for scale in (0.5, 1.0))
    assert half != full


async def test_make_serve_starts_the_service_that_these_tests_use() -> None:
    command = ["make", "--dry-run", "--old-file=.venv/.local", "--no-print-directory", "serve"]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, stdout=asyncio.subprocess.PIPE
    )
    assert await finished(process) == ["exec .venv/bin/img2img-server local"]


async def test_the_requests_of_the_quickstart_give_images(reader: Reader) -> None:
    page = ROOT / "docs/quickstart.md"
    [generate] = [each for each in blocks(page, "sh") if "img2img generate" in each.text]
    [curl] = [each for each in blocks(page, "sh") if "curl" in each.text]
    [program] = blocks(page, "python")
    await reader.shell(generate)
    (reader.folder / "comic.py").write_text(reader.local(program.text))
    async with reader.started(sys.executable, "comic.py") as process:
        [link] = await finished(process)
    [edited] = json.loads(await reader.shell(curl))["data"]
    async with httpx.AsyncClient() as http:
        contents = [(await http.get(url)).content for url in (link, edited["url"])]
    contents += [(reader.folder / f"{name}.png").read_bytes() for name in ("watercolour", "comic")]
    assert [each[:4] for each in contents] == [b"\x89PNG"] * 4


async def test_the_commands_of_the_v1_page_create_the_same_job(reader: Reader) -> None:
    commands = [
        each
        for each in blocks(V1, "sh")
        if "oil+painting" in each.text.replace(" ", "+") and "upload=" not in each.text
    ]
    assert len(commands) == 3
    specs = [json.loads(await reader.shell(each))["job"]["spec"] for each in commands]
    assert [spec["prompt"] for spec in specs] == ["an oil painting of a cat"] * 3
    assert {(spec["width"], spec["height"]) for spec in specs[1:]} == {
        (specs[1]["width"], specs[1]["height"])
    }


async def test_the_commands_of_the_v1_page_store_an_upload_and_create_its_job(
    reader: Reader,
) -> None:
    store, create, announce = [each for each in blocks(V1, "sh") if "upload" in each.text]
    response = json.loads(await reader.shell(store))
    await reader.shell(announce)  # This file goes straight to the bucket.
    for name in ("cat.jpg", "coffee.jpg"):
        named = replace(create, text=create.text.replace("cat.jpg", name))
        job = json.loads(await reader.shell(named))["job"]
        assert (job["state"], job["spec"]["prompt"]) == ("STATE_QUEUED", "an oil painting of a cat")
    [shown] = [each for each in blocks(V1, "text") if "put_url" in each.text]
    example = json.loads(shown.text)
    assert response.keys() == example.keys()
    assert response["upload"].keys() == example["upload"].keys()
    assert response["upload"]["complete"] is True


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
async def test_an_event_source_watches_a_job_with_the_token_that_the_v1_page_asks_for(
    reader: Reader,
) -> None:
    [ask] = [each for each in blocks(V1, "sh") if ":token" in each.text]
    [script] = blocks(V1, "js")
    [shown] = [each for each in blocks(V1, "text") if "token" in each.text]
    create = next(each for each in blocks(V1, "sh") if "-F init_image" in each.text)
    number = json.loads(await reader.shell(create))["job"]["id"]
    response = json.loads(
        await reader.shell(replace(ask, text=ask.text.replace("10000001", number)))
    )
    assert response.keys() == json.loads(shown.text).keys()
    text = script.text.replace("https://img.example.com", reader.service.http_url)
    watch = f"""([id, token]) => new Promise((resolve) => {{
      const found = [], show = (part) => {{ found.push(part); if (part.samples) resolve(found); }};
      {text}
    }})"""
    async with playwright.async_playwright() as driver:
        chromium = await driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        async with opened(chromium, f"{reader.service.http_url}/healthz") as page:
            *_, job = await page.evaluate(watch, [number, response["token"]])
        await chromium.close()
    assert (job["id"], job["state"]) == (number, "STATE_SUCCEEDED")


async def test_the_command_of_the_compose_page_creates_an_image(reader: Reader) -> None:
    [generate] = [
        each for each in blocks(ROOT / "docs/compose.md", "sh") if "img2img generate" in each.text
    ]
    await reader.shell(generate, KEY="dev-key")
    assert (reader.folder / "painting.png").read_bytes().startswith(b"\x89PNG")


async def test_the_program_of_the_clients_page_runs(reader: Reader) -> None:
    [program] = blocks(ROOT / "client/README.md", "python")
    (reader.folder / "readme.py").write_text(reader.local(program.text))
    async with reader.started(sys.executable, "readme.py") as process:
        await finished(process)
    assert (reader.folder / "painting.png").read_bytes().startswith(b"\x89PNG")
