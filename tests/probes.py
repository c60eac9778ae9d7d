"""Reads the probes of roles."""

from __future__ import annotations

import asyncio

import aiohttp

SECONDS = 60.0


async def readiness(port: int) -> tuple[int, str]:
    """Returns the status and the text of /readyz."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/readyz") as answer,
    ):
        return answer.status, (await answer.text()).strip()


async def until_ready_is(port: int, status: int, why: str = "") -> str:
    """Waits for a status of /readyz and a part of its text. Returns the text."""
    async with asyncio.timeout(SECONDS):
        while True:
            found = await readiness(port)
            if found[0] == status and why in found[1]:
                return found[1]
            await asyncio.sleep(0.01)
