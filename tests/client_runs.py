"""Runs the same code with both clients, each against its own service."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterable, Callable, Iterable
from typing import Any

from img2img_client import AsyncClient, Client, Retry
from tests.fake_service import FakeService, serving

RETRY = Retry(first_delay_seconds=0.001, longest_delay_seconds=0.01, connect_seconds=2.0)
Run = Callable[..., Any]


def run_blocking(service: FakeService, use: Callable[[Any], Any], *, retry: Retry = RETRY) -> Any:
    with (
        serving(service) as port,
        Client(f"127.0.0.1:{port}", api_key="k", retry=retry) as client,
    ):
        found = use(client)
        return list(found) if isinstance(found, Iterable) else found


def run_async(service: FakeService, use: Callable[[Any], Any], *, retry: Retry = RETRY) -> Any:
    async def main(port: int) -> Any:
        async with AsyncClient(f"127.0.0.1:{port}", api_key="k", retry=retry) as client:
            found = use(client)
            found = await found if inspect.isawaitable(found) else found
            if isinstance(found, AsyncIterable):
                return [item async for item in found]
            return found

    with serving(service) as port:
        return asyncio.run(main(port))


BOTH = {"blocking": run_blocking, "async": run_async}
