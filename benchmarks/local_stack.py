"""Runs `img2img-server local` as a child process with its own state folder and ports."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 180.0


@dataclass(frozen=True)
class LocalStack:
    """Addresses of a running stack. `pid`: process id of the supervisor."""

    grpc_address: str
    http_url: str
    pid: int


@asynccontextmanager
async def local_stack(state_dir: Path, **environment: str) -> AsyncIterator[LocalStack]:
    """Starts the stack and waits until it is ready. Stops it with SIGTERM."""
    grpc_port, http_port = free_port(), free_port()
    names = {
        "IMG2IMG_STATE_DIR": str(state_dir),
        "IMG2IMG_GRPC_PORT": str(grpc_port),
        "IMG2IMG_HTTP_PORT": str(http_port),
        "IMG2IMG_METRICS_PORT": "0",
        "IMG2IMG_LOG_LEVEL": "warning",
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "img2img_server",
        "local",
        env={**os.environ, **names, **environment},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout
    try:
        async with asyncio.timeout(START_SECONDS):
            while b"ready" not in (line := await process.stdout.readline()):
                if not line:
                    raise RuntimeError("img2img-server local ended before it was ready")
        yield LocalStack(f"127.0.0.1:{grpc_port}", f"http://127.0.0.1:{http_port}", process.pid)
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
