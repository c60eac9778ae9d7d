"""Starts the whole service on this machine, turns a photo into a picture with it, stops it again.

`make demo` runs this. It does what a person would do in two terminals:

    img2img-server local
    img2img generate --prompt "an oil painting of a cat" --init-image examples/cat.jpg \
        --strength 0.7 --seed 1 --output demo/output.png

What the server prints goes to demo/server.log. Only the standard library is used here.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, STDOUT, Process
from collections import deque
from collections.abc import AsyncIterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
FOLDER = ROOT / "demo"
LOG = FOLDER / "server.log"
READY = "ready"  # the server's line that says it may be used contains this word
START_SECONDS = 120.0
STOP_SECONDS = 40.0
TAIL_LINES = 15


class DemoError(Exception):
    """The demo cannot go on; the sentence says why."""


@contextlib.asynccontextmanager
async def running(
    *command: str, stop: signal.Signals, output: int | None
) -> AsyncIterator[Process]:
    """One of our commands; when the block is left early it is asked to stop, then waited for.

    It gets a session of its own, so that Ctrl-C reaches this script only, which then stops
    everything in order.
    """
    process = await asyncio.create_subprocess_exec(
        BIN / command[0],
        *command[1:],
        cwd=ROOT,
        stdin=DEVNULL,
        stdout=output,
        stderr=STDOUT if output else None,
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
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


class ServerOutput:
    """What the server prints, on its way to the log."""

    def __init__(self, server: Process) -> None:
        self._server = server
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._ready = asyncio.Event()

    async def copy(self) -> None:
        """Writes the log until the output ends."""
        assert self._server.stdout is not None
        with LOG.open("wb") as log:
            async for line in self._server.stdout:
                log.write(line)
                log.flush()
                text = line.decode(errors="replace").rstrip()
                self._tail.append(text)
                if READY in text:
                    self._ready.set()

    async def wait_ready(self) -> None:
        """Returns when the server may be used. Raises TimeoutError after START_SECONDS."""
        await asyncio.wait_for(self._ready.wait(), START_SECONDS)

    def end(self) -> str:
        """Where the log is, and its last lines."""
        tail = "\n".join(f"    {line}" for line in self._tail)
        return f"The end of {LOG.relative_to(ROOT)}:\n{tail}"


async def generate() -> int:
    """Runs the client on this terminal, returns its exit status."""
    address = f"127.0.0.1:{os.environ.get('IMG2IMG_GRPC_PORT', '50051')}"
    command = ["img2img", "generate", "--server", address, "--api-key", "dev-key"]
    command += ["--prompt", "an oil painting of a cat", "--init-image", "examples/cat.jpg"]
    command += ["--strength", "0.7", "--seed", "1", "--output", "demo/output.png"]
    async with running(*command, stop=signal.SIGINT, output=None) as client:
        return await client.wait()


async def use(output: ServerOutput) -> None:
    """Waits for the server and makes the picture. Raises DemoError."""
    started = time.monotonic()
    try:
        await output.wait_ready()
    except TimeoutError:
        raise DemoError(f"not ready in {START_SECONDS:.0f} s. {output.end()}") from None
    print(f"Ready after {time.monotonic() - started:.1f} s.", flush=True)
    if status := await generate():
        raise DemoError(f"img2img ended with status {status}. {output.end()}")


async def demo() -> None:
    """The whole demo. Raises DemoError."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, _cancel, asyncio.current_task())
    command = ("img2img-server", "local")
    async with running(*command, stop=signal.SIGTERM, output=PIPE) as server:
        output = ServerOutput(server)
        copying = asyncio.create_task(output.copy())
        using = asyncio.create_task(use(output))
        try:
            await asyncio.wait([copying, using], return_when=asyncio.FIRST_COMPLETED)
            if not using.done():
                raise DemoError(f"the server ended: status {await server.wait()}. {output.end()}")
            using.result()
        finally:
            using.cancel()
            await asyncio.wait([using])
    await asyncio.wait([copying], timeout=STOP_SECONDS)


def _cancel(task: asyncio.Task[None] | None) -> None:
    assert task is not None
    task.cancel()


def main() -> int:
    """Returns the exit code: 0 with a picture in demo/output.png."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "output.png").unlink(missing_ok=True)
    print("Starting the service: NATS, an S3 server, worker, api and gateway ...", flush=True)
    try:
        asyncio.run(demo())
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("demo: stopped", file=sys.stderr)
        return 130
    print("The service is stopped. `make serve` keeps it running.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
