"""A small Hugging Face hub with one model."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from huggingface_hub import constants

from tests.web_peers import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Fault = Callable[[web.Request], Awaitable[web.StreamResponse | None]]


async def no_fault(_: web.Request) -> None:
    """Lets the hub answer each request."""


@asynccontextmanager
async def hub(
    files: dict[str, bytes], fault: Fault = no_fault
) -> AsyncIterator[tuple[str, list[str]]]:
    """Yields the address of a small hub that supports downloads, and the received requests.

    Args:
        fault: Returns another response to a request, or None.
    """
    asked: list[str] = []

    async def info(request: web.Request) -> web.StreamResponse:
        if other := await fault(request):
            return other
        siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
        return web.json_response({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings})

    async def tree(_: web.Request) -> web.Response:
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
            for name, data in files.items()
        ]
        return web.json_response(entries)

    async def resolve(request: web.Request) -> web.StreamResponse:
        if other := await fault(request):
            return other
        name = request.match_info["name"]
        if request.method == "GET":
            asked.append(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(files[name])}"'}
        return web.Response(body=files[name], headers=headers)

    async with serving(
        web.get("/api/models/owner/tiny/revision/{revision:.+}", info),
        web.get("/api/models/owner/tiny/tree/{revision}", tree),
        web.get("/owner/tiny/resolve/{revision}/{name:.+}", resolve),
    ) as port:
        yield f"http://127.0.0.1:{port}", asked


def use_hub(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Makes the hub's library in this process send its requests to an address."""
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
