"""Runs roles as real processes and sends them real signals."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import aiohttp

from benchmarks.local_stack import free_port

START_SECONDS = 120.0
STOP_SECONDS = 30.0


class Role:
    """A process `img2img-server NAME` with an environment. Its probe shows whether it is ready."""

    def __init__(self, name: str, environment: dict[str, str], log: Path) -> None:
        self.name = name
        self.log = log
        self._metrics_port = free_port()
        clean = {key: value for key, value in os.environ.items() if "IMG2IMG" not in key}
        chosen = {"IMG2IMG_METRICS_PORT": str(self._metrics_port)}
        self._environment = {**clean, **environment, **chosen}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Starts the role and returns when it is ready. Raises AssertionError with its log on a
        timeout.
        """
        await self.launch()
        await self.until("/readyz")

    async def launch(self) -> None:
        """Starts the role and returns at once."""
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "img2img_server",
                self.name,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    async def until(self, path: str) -> None:
        """Returns when a probe succeeds."""
        assert self._process is not None
        url = f"http://127.0.0.1:{self._metrics_port}{path}"
        async with asyncio.timeout(START_SECONDS), aiohttp.ClientSession() as session:
            while True:
                assert self._process.returncode is None, self.log.read_text()
                with suppress(aiohttp.ClientError):
                    async with session.get(url) as answer:
                        if answer.status == 200:
                            return
                await asyncio.sleep(0.02)

    def freeze(self) -> None:
        """Sends SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Sends SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    async def kill(self) -> None:
        """Sends SIGKILL."""
        assert self._process is not None
        self._process.kill()
        await self._process.wait()

    async def ended(self) -> int:
        """Waits until the role ends by itself and returns its exit code."""
        assert self._process is not None
        async with asyncio.timeout(START_SECONDS):
            return await self._process.wait()

    async def stop(self) -> int:
        """Sends SIGTERM and returns the exit code. Does nothing if the role has ended."""
        if self._process is None:
            return 0
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(STOP_SECONDS):
            return await self._process.wait()
