"""Decodes images in a few processes, each with a memory limit and a CPU deadline.

The kernel enforces both limits, so no file keeps a decoder busy for longer than its pixels justify.
A process that ends is replaced; see docs/adr/0015-decoding-in-processes.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import structlog

from img2img_server.budget import Budget, Share
from img2img_server.domain.params import Limits
from img2img_server.domain.violations import Violation
from img2img_server.errors import OperatorError, ServerBusyError, UnavailableError
from img2img_server.imaging import frames
from img2img_server.imaging.base import (
    CheckedImage,
    InvalidImageError,
    Pixels,
    not_an_image,
    too_slow,
)
from img2img_server.imaging.prepare import Fit
from img2img_server.settings import Settings

MIN_PROCESSES: Final = 2  # One tenant leaves one of them to the others.
MAX_PROCESSES: Final = 4
# Longest time until a new process has imported its modules.
START_SECONDS: Final = 60.0
RESTART_PAUSE_SECONDS: Final = 1.0
# Time from the loss of the socket to the end of a process that ends by itself.
END_SECONDS: Final = 1.0
# A process that does not even use CPU time, for example because it is stopped, is ended after this
# time. A machine that is far too busy takes less.
STUCK_SECONDS: Final = 300.0
# The share of the memory that one tenant may use.
_TENANT_MEMORY: Final = 7 / 8
_CRASHES: Final = frozenset({signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE})
# The environment of a decoder: it needs no credential, and numpy no thread.
_KEPT_VARIABLES: Final = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
_ENVIRONMENT: Final = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

log = structlog.get_logger()


class _LostError(Exception):
    """The process has ended, or it sends nonsense."""


class _Process:
    """A running decoder process."""

    def __init__(
        self, process: asyncio.subprocess.Process, connection: socket.socket, shared: int
    ) -> None:
        self._process = process
        self._connection = connection
        self._shared = shared

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls) -> Self:
        """Starts a process and returns once it is ready. Raises OSError, _LostError."""
        ours, its = frames.socket_pair()
        shared = frames.open_shared()
        ours.setblocking(False)
        kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
        with contextlib.ExitStack() as unless_started, its:
            unless_started.callback(ours.close)
            unless_started.callback(_close, shared)
            process = await asyncio.create_subprocess_exec(
                # -P: modules are not imported from the current folder.
                *(sys.executable, "-P", "-m", "img2img_server.imaging.pool_process"),
                *map(str, (its.fileno(), shared, os.getpid())),
                pass_fds=[each for each in (its.fileno(), shared) if each != frames.NO_SHARED],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=kept | _ENVIRONMENT,
                start_new_session=True,
            )
            unless_started.pop_all()
        started = cls(process, ours, shared)
        try:
            async with asyncio.timeout(START_SECONDS):
                await started.receive()
        except _LostError:
            code, output = await started.end(END_SECONDS)
            raise _LostError(f"exit code {code}: {output}") from None
        except BaseException:
            await started.end()
            raise
        return started

    async def send(self, head: object, body: bytes = b"") -> None:
        """Sends a message. Raises _LostError."""
        try:
            await frames.send_async(self._connection, pickle.dumps(head), body)
        except OSError as error:
            raise _LostError from error

    async def receive(self) -> tuple[dict[str, Any], bytearray]:
        """Receives a message and logs the events in it. Raises _LostError."""
        try:
            head, body = await frames.receive_async(self._connection)
            fields = json.loads(head)
            if size := int(fields.pop("shared_bytes", 0)):
                body = frames.read_shared(self._shared, size)
            notes = [(str(note.pop("event")), dict(note)) for note in fields.pop("notes")]
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise _LostError from error
        except frames.FrameError as error:
            raise _LostError from error
        for event, facts in notes:
            log.log(20 if facts.pop("level", "") != "debug" else 10, event, **facts)
        return fields, body

    async def end(self, wait_seconds: float = 0.0) -> tuple[int, str]:
        """Ends the process, if it has not ended by itself in this time.

        Returns:
            Its exit code, and the last line that it wrote.
        """
        self._connection.close()
        _close(self._shared)
        self._shared = frames.NO_SHARED
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_seconds):
                await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        assert self._process.stderr
        written = (await self._process.stderr.read()).decode(errors="replace").strip()
        return await self._process.wait(), written.rpartition("\n")[2]


def _close(descriptor: int) -> None:
    if descriptor != frames.NO_SHARED:
        os.close(descriptor)


class DecoderPool:
    """An ImageDecoder with processes. An asynchronous context manager: they run in its block.

    Args:
        processes: Number of processes. A tenant uses all but one of them at most.
        memory_bytes: Memory of the images that all processes decode at a time.
        cpu_seconds: CPU time of an image, and a fifth of that more for each megapixel.
        wait_seconds: The longest wait for a process or for memory; None: without limit.
    """

    def __init__(
        self,
        processes: int,
        memory_bytes: int,
        cpu_seconds: float,
        *,
        wait_seconds: float | None = None,
    ) -> None:
        self._count = processes
        self._cpu_seconds = cpu_seconds
        self._slots = Budget(
            "image decoders", processes, max(1, processes - 1), wait_seconds=wait_seconds
        )
        self.memory = Budget(
            "image decoding bytes",
            memory_bytes,
            int(memory_bytes * _TENANT_MEMORY),
            wait_seconds=wait_seconds,
        )
        self._idle: asyncio.LifoQueue[_Process] = asyncio.LifoQueue()
        self._processes: set[_Process] = set()
        self._tasks: set[asyncio.Task[Any]] = set()

    @classmethod
    def of(cls, settings: Settings, *, wait_seconds: float | None = None) -> Self:
        """Returns the pool that the settings describe."""
        processes = settings.decode_processes or default_processes()
        return cls(
            processes,
            settings.decode_memory_bytes,
            settings.decode_cpu_seconds,
            wait_seconds=wait_seconds,
        )

    @property
    def pids(self) -> list[int]:
        """The ids of the processes that run now."""
        return [process.pid for process in self._processes]

    def used(self, tenant: str) -> int:
        """Returns the number of processes that work for a tenant."""
        return self._slots.used(tenant)

    async def __aenter__(self) -> Self:
        try:
            await asyncio.gather(*(self._start() for _ in range(self._count)))
        except (OSError, _LostError, TimeoutError) as error:
            await self._close()
            raise OperatorError(
                f"cannot start the processes that decode images: {error!r}"
            ) from error
        except BaseException:
            await self._close()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close()

    async def _close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(process.end() for process in self._processes))
        self._processes.clear()

    async def check(
        self,
        tenant: str,
        data: bytes,
        *,
        width: int,
        height: int,
        limits: Limits,
        downloaded: bool = False,
        fit: Fit | None = None,
    ) -> CheckedImage:
        """Runs `check_image`, see ImageDecoder."""
        arguments = {
            "width": width,
            "height": height,
            "limits": limits,
            "downloaded": downloaded,
            "fit": fit,
        }
        fields, body = await self._run(tenant, "check", data, arguments)
        prepared = bool(fields["prepared"])
        return CheckedImage(
            data=bytes(body) if prepared else data,
            prepared=prepared,
            width=int(fields["width"]),
            height=int(fields["height"]),
            own_size=(int(fields["own_size"][0]), int(fields["own_size"][1])),
        )

    async def prepare(
        self, tenant: str, data: bytes, *, width: int, height: int, prepared: bool = False
    ) -> Pixels:
        """Runs `prepare_image`, see ImageDecoder."""
        arguments = {"width": width, "height": height, "prepared": prepared}
        _, body = await self._run(tenant, "prepare", data, arguments)
        return np.frombuffer(body, np.uint8).reshape(height, width, 3)

    async def _run(
        self, tenant: str, name: str, data: bytes, arguments: dict[str, Any]
    ) -> tuple[dict[str, Any], bytearray]:
        """Waits for a process and runs a request there.

        The request runs to its end even if the caller gives up: a process cannot be interrupted
        without a new start.
        """
        slot = await self._slots.take(tenant, 1)
        task = asyncio.create_task(self._use(slot, tenant, (name, arguments), data))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await asyncio.shield(task)
        finally:
            del task  # An error of the task would keep this frame, and so the image, in a cycle.

    async def _use(
        self, slot: Share, tenant: str, request: tuple[str, dict[str, Any]], data: bytes
    ) -> tuple[dict[str, Any], bytearray]:
        try:
            process = await self._idle.get()
        except BaseException:
            slot.release()
            raise
        try:
            async with asyncio.timeout(STUCK_SECONDS):
                answer = await self._answer(process, tenant, request, data)
        except (InvalidImageError, ServerBusyError):
            self._done(slot, process)
            raise
        except (_LostError, TimeoutError):
            error = _loss(process.pid, *await process.end(END_SECONDS))
            self._replace(slot, process)
            raise error from None
        except BaseException:  # The pool stops.
            self._replace(slot, process)
            raise
        self._done(slot, process)
        return answer

    async def _answer(
        self, process: _Process, tenant: str, request: tuple[str, dict[str, Any]], data: bytes
    ) -> tuple[dict[str, Any], bytearray]:
        """Sends a request, grants its memory, and returns the response.

        Raises InvalidImageError, ServerBusyError, _LostError.
        """
        await process.send((*request, self.memory.tenant_most, self._cpu_seconds), data)
        fields, body = await process.receive()
        if fields.get("kind") == "needs":
            try:
                share = await self.memory.take(tenant, int(fields["memory_bytes"]))
            except ServerBusyError:
                await process.send(False)
                raise
            with share:
                await process.send(True)
                fields, body = await process.receive()
        if fields.get("kind") == "invalid":
            raise InvalidImageError(_violation(fields))
        if fields.get("kind") != "done":
            raise _LostError
        return fields, body

    def _done(self, slot: Share, process: _Process) -> None:
        self._idle.put_nowait(process)
        slot.release()

    def _replace(self, slot: Share, process: _Process) -> None:
        """Starts a process instead of another one. The tenant holds its slot until then."""
        self._processes.discard(process)
        task = asyncio.create_task(self._start_again(slot, process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _start_again(self, slot: Share, old: _Process) -> None:
        with slot:
            await old.end()
            while True:
                try:
                    return await self._start()
                except (OSError, _LostError, TimeoutError) as error:
                    log.error("image_decoder_not_started", reason=repr(error))
                    await asyncio.sleep(RESTART_PAUSE_SECONDS)

    async def _start(self) -> None:
        process = await _Process.start()
        self._processes.add(process)
        self._idle.put_nowait(process)


def default_processes() -> int:
    """Returns one process for each CPU that this process may use, within the bounds."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(max(usable or 1, MIN_PROCESSES), MAX_PROCESSES)


def _loss(pid: int, exit_code: int, output: str) -> Exception:
    """Returns the error of a request whose process has ended."""
    facts: dict[str, Any] = {"pid": pid, "exit_code": exit_code}
    if output:
        facts["output"] = output
    if exit_code == -signal.SIGPROF:
        log.warning("image_decoder_ended_at_its_deadline", **facts)
        return too_slow()
    if -exit_code in _CRASHES:
        log.error("image_decoder_crashed", **facts)
        return not_an_image("its data is damaged")
    log.error("image_decoder_lost", **facts)
    return UnavailableError()


def _violation(fields: Mapping[str, Any]) -> Violation:
    field, reason, message, cause = (
        str(fields[name]) for name in ("field", "reason", "message", "cause")
    )
    values = {str(name): str(value) for name, value in dict(fields["values"]).items()}
    return Violation(field, reason, message, cause, values)
