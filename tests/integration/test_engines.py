"""The supervisor of the local servers, with real processes and real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import psutil
import pytest

from img2img_server.devstack import LocalServers, LocalServersError, ServerExitedError
from img2img_server.devstack.child import Child
from img2img_server.domain.job import FIRST_JOB_ID
from img2img_server.nats.bus import connect_bus
from img2img_server.nats.connection import connect
from img2img_server.settings import Settings, SettingsError
from img2img_server.storage.s3_blobs import connect_blobs

LONG = 60.0
KEY = "generations/5f0c-0.png"


def settings_of(engines: LocalServers) -> Settings:
    return Settings(
        nats_url=engines.nats_url,
        s3_endpoint_url=engines.s3_endpoint_url,
        s3_access_key=engines.s3_access_key,
        s3_secret_key=engines.s3_secret_key,
    )


def running(state_dir: Path, parent: int | None = None) -> dict[str, psutil.Process]:
    """Returns the servers of a state folder by name: children of a process, by default of
    this one.
    """
    below = psutil.Process(parent).children(recursive=True)
    return {
        process.name(): process
        for process in below
        if process.name() in ("nats-server", "weed")
        and Path(process.cwd()).is_relative_to(state_dir)
    }


def sockets(engines: LocalServers) -> list[Path]:
    """Returns the remaining sockets of weed."""
    ports = engines._ports.values()
    return [file for port in ports for file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]


async def test_data_and_keys_survive_a_crash_and_a_clean_stop(state_dir: Path) -> None:
    async with LocalServers(state_dir) as engines:
        settings = settings_of(engines)
        async with connect_blobs(settings) as blobs, connect_bus(settings) as bus:
            await blobs.prepare()
            await blobs.put(KEY, b"image", "image/png")
            assert await bus.jobs.next_id("acme") == FIRST_JOB_ID
            async with connect([engines.nats_url]) as link:
                # The id expires; its number must not be used again after the restart.
                await link.js.purge_stream("IDS")
        for process in running(state_dir).values():
            process.kill()
    for number in (1, 2):
        async with LocalServers(state_dir) as engines:
            assert engines.s3_secret_key == settings.s3_secret_key.get_secret_value()
            settings = settings_of(engines)
            async with connect_blobs(settings) as blobs, connect_bus(settings) as bus:
                assert b"".join([chunk async for chunk in blobs.read(KEY)]) == b"image"
                assert await bus.jobs.next_id("acme") == FIRST_JOB_ID + number
    assert running(state_dir) == {}
    assert sockets(engines) == []


async def test_two_run_side_by_side_but_not_in_one_folder(
    engines: LocalServers, state_dir: Path
) -> None:
    async with LocalServers(state_dir) as second:
        assert second.nats_url != engines.nats_url
        assert second.s3_access_key != engines.s3_access_key
        with pytest.raises(LocalServersError, match="in use by another process"):
            async with LocalServers(state_dir):
                pass
        folder = state_dir / "engines"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for name in ("s3.json", "nats.conf", "nats.password"):
            assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600
        addresses = {
            open_socket.laddr.ip
            for process in running(state_dir).values()
            for open_socket in process.net_connections(kind="inet")
            if open_socket.status == psutil.CONN_LISTEN
        }
        assert addresses == {"127.0.0.1"}


async def test_who_lacks_the_password_gets_nothing_from_the_bus(engines: LocalServers) -> None:
    without = "nats://" + engines.nats_url.rpartition("@")[2]
    with pytest.raises(SettingsError, match="refused the user"):
        async with connect([without]):
            pass


@pytest.mark.parametrize("name", ["nats-server", "weed"])
async def test_a_death_is_reported_with_its_last_words(state_dir: Path, name: str) -> None:
    async with LocalServers(state_dir) as engines:
        watching = asyncio.create_task(engines.died())
        await asyncio.sleep(0)
        assert not watching.done()
        running(state_dir)[name].kill()
        async with asyncio.timeout(LONG):
            death = await watching
    assert (death.name, death.exit_code) == (name, -signal.SIGKILL)
    assert death.log_tail
    assert str(death).endswith(" ".join(death.log_tail.splitlines()[-1].split()))


SUPERVISOR = """
import asyncio, sys
from pathlib import Path
from img2img_server.devstack import LocalServers

async def main():
    async with LocalServers(Path(sys.argv[1])) as engines:
        print("up", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@asynccontextmanager
async def supervisor(state_dir: Path) -> Any:
    """Starts a process that runs the servers."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", SUPERVISOR, str(state_dir)),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(LONG):
            assert await process.stdout.readline() == b"up\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def gone(processes: dict[str, psutil.Process]) -> None:
    await asyncio.to_thread(psutil.wait_procs, list(processes.values()), timeout=LONG)
    assert [process for process in processes.values() if process.is_running()] == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child to its parent's death")
async def test_the_engines_die_with_a_killed_supervisor_and_start_again(state_dir: Path) -> None:
    async with supervisor(state_dir) as process:
        engines = running(state_dir, process.pid)
        assert sorted(engines) == ["nats-server", "weed"]
        process.kill()
        await process.wait()
        await gone(engines)
    async with LocalServers(state_dir):
        pass


async def test_ctrl_c_reaches_the_supervisor_only(state_dir: Path) -> None:
    async with supervisor(state_dir) as process:
        engines = running(state_dir, process.pid)
        groups = {name: os.getpgid(engine.pid) for name, engine in engines.items()}
        assert process.pid not in groups.values()
        # A terminal sends this signal to the whole group on Ctrl-C.
        os.killpg(process.pid, signal.SIGINT)
        await process.wait()
        await gone(engines)
    log = (state_dir / "engines" / "nats.log").read_text()
    assert "Initiating Shutdown" in log  # The servers get SIGTERM, not SIGKILL.


def shell(script: str, folder: Path, probe: Callable[[], Any]) -> Child:
    command = ["/bin/sh", "-c", script]
    return Child("shell", command, folder=folder, log=folder / "log", probe=probe, stop_seconds=0.2)


async def nothing() -> None:
    """A probe that always succeeds."""


async def never() -> None:
    raise OSError("no server listens")


async def test_a_child_that_ends_while_it_starts_is_reported_at_once(tmp_path: Path) -> None:
    with pytest.raises(ServerExitedError) as death:
        await shell("echo no such flag >&2; exit 3", tmp_path, never).start()
    assert str(death.value) == "shell ended with exit code 3; its last line: no such flag"


async def test_a_child_that_will_not_end_is_killed(tmp_path: Path) -> None:
    ready = tmp_path / "ready"

    async def probe() -> None:
        ready.read_text()

    child = shell(f"trap '' TERM; touch {ready}; while :; do sleep 0.05; done", tmp_path, probe)
    await child.start()
    await child.stop()
    assert (await child.ended()).exit_code == -signal.SIGKILL


async def test_a_child_gets_nothing_of_our_environment(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "ours")
    child = shell("env | cut -d= -f1; exec sleep 60", tmp_path, nothing)
    await child.start()
    await child.stop()
    names = set((await child.ended()).log_tail.split())
    assert names <= {"PATH", "HOME", "PWD", "SHLVL", "_", "OLDPWD", "LC_CTYPE"}


async def test_a_missing_program_is_named_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, state_dir: Path
) -> None:
    monkeypatch.setattr("img2img_server.devstack.child.distribution", _no_distribution)
    with pytest.raises(LocalServersError, match=r"nats-server is missing: .*pip install"):
        async with LocalServers(state_dir):
            pass


def _no_distribution(name: str) -> Any:
    raise PackageNotFoundError(name)
