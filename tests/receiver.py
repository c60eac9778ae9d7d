"""A receiver of webhooks: a real HTTP server with scripted responses."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from web_peers import serving

SECRET = "whsec_bG9jYWwtdGVzdC1zZWNyZXQtMzItYnl0ZXMtbG9uZyE="
WAIT_SECONDS = 60.0


@dataclass(frozen=True)
class Received:
    """One attempt as it was received."""

    headers: dict[str, str]
    body: bytes


@dataclass
class Receiver:
    """Sends its responses in order and repeats the last one. A response is a status, or a status
    with headers.
    """

    answers: list[int | tuple[int, dict[str, str]]]
    port: int = 0
    arrived: asyncio.Queue[Received] = field(default_factory=asyncio.Queue)
    # The receiver responds once this event is set. A slow receiver has an event that is not set.
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?order=7"

    async def next(self) -> Received:
        async with asyncio.timeout(WAIT_SECONDS):
            return await self.arrived.get()

    async def take(self, request: web.Request) -> web.Response:
        assert request.path_qs == "/hook?order=7"
        self.arrived.put_nowait(Received(dict(request.headers), await request.read()))
        await self.may_answer.wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        status, headers = answer if isinstance(answer, tuple) else (answer, {})
        return web.Response(status=status, headers=headers, text="x" * 100_000)


@asynccontextmanager
async def receiving(
    *answers: int | tuple[int, dict[str, str]], held: bool = False
) -> AsyncIterator[Receiver]:
    """Yields a receiver on a free port of 127.0.0.1."""
    receiver = Receiver(list(answers) or [200])
    if not held:
        receiver.may_answer.set()
    async with serving(web.post("/hook", receiver.take)) as port:
        receiver.port = port
        try:
            yield receiver
        finally:
            receiver.may_answer.set()


async def until(ask: Callable[[], Awaitable[Any]], wanted: Any) -> None:
    """Polls until the response is the expected one."""
    async with asyncio.timeout(WAIT_SECONDS):
        while await ask() != wanted:  # noqa: ASYNC110 - the other side has no event to wait for
            await asyncio.sleep(0.01)
