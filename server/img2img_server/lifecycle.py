"""Starts and stops a role: SIGTERM or SIGINT stops it, a second signal ends it at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final, TypeVar

import structlog

from img2img_server.last_line import exit_now
from img2img_server.malloc import return_large_blocks

RESTART_CODE: Final = 75  # EX_TEMPFAIL of sysexits.h: the same command may be started again

T = TypeVar("T")

log = structlog.get_logger()


class RestartError(Exception):
    """The role has stopped so that its supervisor starts it again; see RESTART_CODE."""


class StoppedError(Exception):
    """The role was asked to stop before it was ready."""


# A role runs until the event is set, then drains and returns.
Role = Callable[[asyncio.Event], Awaitable[None]]


def run_role(role: Role) -> None:
    """Runs a role to its end; returns after a clean stop. Errors propagate at once.

    Threads that still work, such as one that loads a model, are not waited for: the caller must end
    the process with `exit_now`.
    """
    return_large_blocks()
    asyncio.Runner().run(_run(role))


async def _run(role: Role) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: signal.Signals) -> None:
        if stop.is_set():
            log.warning("second_signal_exiting_now", signal=number.name)
            exit_now(128 + number)
        log.info("stopping", signal=number.name)
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await role(stop)
    except StoppedError:
        log.info("stopped_before_ready")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def unless_stopped(stop: asyncio.Event | None, work: Coroutine[Any, Any, T]) -> T:
    """Returns what `work` returns. Raises StoppedError once `stop` is set. Then, and when it is
    cancelled itself, it cancels `work`.
    """
    if stop is None:
        return await work
    task = asyncio.ensure_future(work)
    try:
        await first_of(asyncio.wait([task]), stop.wait())
        if task.done():
            return task.result()
        raise StoppedError
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def first_of(*waits: Awaitable[object]) -> None:
    """Returns when one of the awaitables has ended, and cancels the others. Raises the error of
    that one.
    """
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
