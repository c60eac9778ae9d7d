"""Starts the whole service on this machine, turns a photo into an image, and stops the service.

`make demo` runs this. It runs these commands, which could be run in two terminals:

    img2img-server local
    img2img generate --prompt "an oil painting of a cat" --init-image examples/cat.jpg \
        --strength 0.7 --seed 1 --output demo/output.png

The output of the server goes to demo/server.log. The server listens on free ports and keeps its
state in .img2img/demo, so another service can run at the same time. Settings of the environment
take precedence, except keys and certificates. This script uses only the standard library.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
FOLDER = ROOT / "demo"
LOG = FOLDER / "server.log"
# The line on standard output that reports that the server is ready (its logs go to stderr):
# img2img is ready: gRPC 127.0.0.1:50051, HTTP http://127.0.0.1:8080 (docs at ...), API key dev-key
READY = re.compile(rb"ready: gRPC (?P<address>[^\s,]+)")
SETTINGS = {  # Settings of the server, unless the environment has them; port 0: any free port.
    "IMG2IMG_GRPC_PORT": "0",
    "IMG2IMG_HTTP_PORT": "0",
    "IMG2IMG_METRICS_PORT": "0",
    "IMG2IMG_STATE_DIR": ".img2img/demo",
}
# Keys and certificates of another service are left out: the demo uses its own key, without TLS.
LEFT_OUT = ("IMG2IMG_API_KEYS_FILE", "IMG2IMG_TLS_CERT_FILE", "IMG2IMG_TLS_KEY_FILE")
OUTPUT = FOLDER / "output.png"
START_SECONDS = 120.0
STOP_SECONDS = 40.0
TAIL_LINES = 15


class DemoError(Exception):
    """The demo cannot continue; the sentence says why."""


@contextlib.asynccontextmanager
async def running(
    *command: str,
    stop: signal.Signals,
    stdout: int | None = None,
    stderr: IO[bytes] | None = None,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Process]:
    """Runs a command of this project. At the end of the block it is stopped.

    The process has its own session, so that Ctrl-C reaches this script only, which then stops
    everything in order.
    """
    process = await asyncio.create_subprocess_exec(
        BIN / command[0],
        *command[1:],
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=DEVNULL,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(stop)
        try:
            await asyncio.wait_for(process.wait(), STOP_SECONDS)
        except TimeoutError:
            print(f"{command[0]} did not stop in {STOP_SECONDS:.0f} s: killed", file=sys.stderr)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def until_ready(server: Process, log: IO[bytes]) -> str:
    """Returns the address of the server once it is ready.

    Raises:
        DemoError: the server ended, or took longer than START_SECONDS.
    """
    assert server.stdout is not None
    try:
        async with asyncio.timeout(START_SECONDS):
            async for line in server.stdout:
                log.write(line)
                if ready := READY.search(line):
                    return ready["address"].decode()
    except TimeoutError:
        raise DemoError(f"the server was not ready in {START_SECONDS:.0f} s.") from None
    raise DemoError(f"the server ended with status {await server.wait()}.")


async def until_ended(server: Process, log: IO[bytes]) -> None:
    """Logs the output of the server. Raises DemoError when the server has ended."""
    assert server.stdout is not None
    async for line in server.stdout:
        log.write(line)
    raise DemoError(f"the server ended with status {await server.wait()}.")


async def generate(address: str) -> int:
    """Runs the client on this terminal, returns its exit status."""
    command = ["img2img", "generate", "--server", address, "--api-key", "dev-key"]
    command += ["--prompt", "an oil painting of a cat", "--init-image", "examples/cat.jpg"]
    command += ["--strength", "0.7", "--seed", "1", "--output", str(OUTPUT.relative_to(ROOT))]
    async with running(*command, stop=signal.SIGINT, stdout=PIPE) as client:
        assert client.stdout is not None
        async for line in client.stdout:
            if not line.lstrip().startswith(b"http"):
                # A link ends with the name of a file in the service.
                print(line.decode(), end="", flush=True)
        return await client.wait()


async def demo(log: IO[bytes]) -> None:
    """Starts the service, creates the image and stops the service. Raises DemoError."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _cancel, asyncio.current_task())
    started = time.monotonic()
    command = ("img2img-server", "local")
    env = {name: os.environ.get(name) or value for name, value in SETTINGS.items()}
    env |= dict.fromkeys(LEFT_OUT, "")
    async with running(*command, stop=signal.SIGTERM, stdout=PIPE, stderr=log, env=env) as server:
        address = await until_ready(server, log)
        print(f"Ready after {time.monotonic() - started:.1f} s.", flush=True)
        making = asyncio.create_task(generate(address))
        watching = asyncio.create_task(until_ended(server, log))
        try:
            await asyncio.wait([making, watching], return_when=asyncio.FIRST_COMPLETED)
            status = making.result() if making.done() else watching.result()
        finally:
            making.cancel()
            watching.cancel()
            await asyncio.wait([making, watching])
        if status:
            raise DemoError(f"img2img ended with status {status}.")


def log_end() -> str:
    """Returns the place of the log and its last lines."""
    lines = LOG.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"The end of {LOG.relative_to(ROOT)}:", *(f"    {line}" for line in lines)])


def _cancel(task: asyncio.Task[None] | None) -> None:
    assert task is not None
    task.cancel()


def main() -> int:
    """Returns the exit code: 0 with an image in demo/output.png."""
    FOLDER.mkdir(exist_ok=True)
    OUTPUT.unlink(missing_ok=True)
    print("Starting the service: NATS, an S3 server, worker, api and gateway ...", flush=True)
    try:
        with LOG.open("wb", buffering=0) as log:
            asyncio.run(demo(log))
    except DemoError as error:
        print(f"demo: {error} {log_end()}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("demo: stopped", file=sys.stderr)
        return 130
    print(f"The image is {OUTPUT}.")
    print("The service is stopped. `make serve` keeps it running, with links and a playground.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
