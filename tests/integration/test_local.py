"""`img2img-server local` rejects unsafe settings, reports errors and stops cleanly."""

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.local_stack import local_stack
from img2img_client import AsyncClient
from img2img_server.local import local_settings
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.settings import Settings
from tests.tiny_models import write_sd

PHOTO = Path(__file__).parents[2] / "examples" / "cat.jpg"


@asynccontextmanager
async def started(folder: Path, **settings: object) -> AsyncIterator[asyncio.subprocess.Process]:
    """Starts the command with a clean environment. Its stdout and stderr share one pipe."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("IMG2IMG_")}
    chosen = {"state_dir": folder / "state", "grpc_port": 0, "http_port": 0, "metrics_port": 0}
    names = {f"IMG2IMG_{key.upper()}": str(value) for key, value in {**chosen, **settings}.items()}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "img2img_server",
        "local",
        env={**clean, **names},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def said(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    """Returns the exit code and the complete output."""
    async with asyncio.timeout(120):
        output, _ = await process.communicate()
    return process.returncode, output.decode()


@pytest.mark.parametrize(
    ("has_keys", "allow", "is_listed"),
    [
        (False, "", True),
        (False, "none", False),
        (False, "files.internal", False),
        (True, "", False),
        (True, "none", False),
        (True, "127.0.0.1", True),
    ],
)
def test_addresses_of_this_machine_are_allowed_only_without_keys(
    tmp_path: Path, has_keys: bool, allow: str, is_listed: bool
) -> None:
    keys_file = tmp_path / "keys.toml" if has_keys else None
    ports = {"grpc_port": 0, "http_port": 0, "metrics_port": 0}
    given = Settings(api_keys_file=keys_file, outbound_allow=allow, **ports)
    found, _ = local_settings(given)
    assert found.dev_key is not has_keys
    policy = OutboundPolicy.of(found)
    assert policy.lists_host("http://127.0.0.1:9333/") is is_listed
    for host in ("[::1]", "localhost"):
        assert policy.lists_host(f"http://{host}:9333/") is (is_listed and not allow)


@pytest.mark.parametrize("setting", ["grpc_host", "http_host"])
async def test_it_refuses_to_listen_beyond_loopback_without_keys(
    tmp_path: Path, setting: str
) -> None:
    async with started(tmp_path, **{setting: "0.0.0.0"}) as process:
        code, text = await said(process)
    assert code == 2
    assert "refusing to listen on 0.0.0.0 with the well-known development key" in text
    assert "IMG2IMG_API_KEYS_FILE" in text
    assert not (tmp_path / "state" / "engines").exists()  # The command has started no server.


async def test_it_names_every_wrong_setting_at_once(tmp_path: Path) -> None:
    async with started(tmp_path, http_port="many", modle="x") as process:
        code, text = await said(process)
    assert code == 2
    assert "IMG2IMG_HTTP_PORT" in text
    assert "IMG2IMG_MODLE: there is no such setting" in text
    assert "Traceback" not in text


async def test_it_says_that_a_port_is_taken_and_how_to_choose_another(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with started(tmp_path, grpc_port=port) as process:
            code, text = await said(process)
    assert code == 2
    assert f"IMG2IMG_GRPC_PORT: 127.0.0.1:{port} is in use" in text


async def test_it_says_that_the_model_is_not_there(tmp_path: Path) -> None:
    async with started(tmp_path, model=tmp_path / "nowhere") as process:
        code, text = await said(process)
    assert code == 2
    assert "IMG2IMG_MODEL" in text
    assert "Traceback" not in text


async def test_it_says_plainly_that_an_engine_died_and_stops_the_rest(tmp_path: Path) -> None:
    model = write_sd(tmp_path / "tiny", tiny_vae=True)
    async with started(tmp_path, model=model) as process:
        # The servers already serve at this time.
        api = await eventually(lambda: role(process.pid, "api"))
        found = await eventually(lambda: engine(process.pid, "nats-server"))
        found.send_signal(signal.SIGKILL)
        code, text = await said(process)
    assert code == 1
    assert "nats-server ended with exit code -9" in text
    assert not api.is_running()


async def test_it_makes_an_image_and_stops_cleanly_with_all_its_children(tmp_path: Path) -> None:
    model = write_sd(tmp_path / "tiny", tiny_vae=True)
    async with local_stack(tmp_path / "state", IMG2IMG_MODEL=str(model)) as stack:
        children = psutil.Process(stack.pid).children(recursive=True)
        assert len(children) >= 5  # The children are two servers and three roles.
        async with AsyncClient(stack.grpc_address, api_key="dev-key") as client:
            result = await client.generate(
                "a cat", PHOTO, width=256, height=256, strength=0.5, num_inference_steps=4
            )
            models = [model.name for model in (await client.capabilities()).models]
        assert result.job.samples[0].url.startswith(stack.http_url)
        for file in ("storage.key", "worker.env"):
            assert (tmp_path / "state" / file).stat().st_mode & 0o777 == 0o600
        assert models == ["tiny"]
    assert [child for child in children if child.is_running()] == []


async def test_a_restarted_worker_serves_the_model_that_took_the_place_of_the_default_one(
    tmp_path: Path,
) -> None:
    link = tmp_path / "current"
    link.symlink_to(write_sd(tmp_path / "before", tiny_vae=True))
    async with local_stack(tmp_path / "state", IMG2IMG_MODEL=str(link)) as stack:
        link.unlink()
        link.symlink_to(write_sd(tmp_path / "after", tiny_vae=True))
        old = role(stack.pid, "worker")
        assert old is not None
        async with AsyncClient(stack.grpc_address, api_key="dev-key") as client:
            await client.admin.restart_server()
            await asyncio.to_thread(old.wait, 60)
            new = await eventually(lambda: role(stack.pid, "worker"))
            while (await client.capabilities()).models[0].name != "after":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            result = await client.generate(
                "a cat", PHOTO, width=256, height=256, strength=0.5, num_inference_steps=4
            )
        assert new.pid != old.pid
        assert result.job.spec.model == "after"


async def eventually(find: Callable[[], psutil.Process | None]) -> psutil.Process:
    """Polls until the process exists, since no event announces it."""
    async with asyncio.timeout(60):
        while not (found := find()):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return found


def engine(parent: int, name: str) -> psutil.Process | None:
    return _child(parent, lambda line: bool(line) and Path(line[0]).name == name)


def role(parent: int, name: str) -> psutil.Process | None:
    return _child(parent, lambda line: line[-2:] == ["img2img_server", name])


def _child(parent: int, wanted: object) -> psutil.Process | None:
    for child in psutil.Process(parent).children(recursive=True):
        try:
            if wanted(child.cmdline()):  # type: ignore[operator]
                return child
        except psutil.NoSuchProcess:
            continue
    return None
