"""An S3 server on loopback that keeps files in memory and returns scripted responses to single
calls.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.web_peers import every_request, serving

LIFECYCLE = "lifecycle"


@dataclass(frozen=True)
class Answer:
    """A response that replaces the real one. `code`: the error code of S3 in XML; empty: the text
    only.
    """

    status: int
    code: str = ""
    text: str = ""
    content_type: str = "text/html"

    def response(self, method: str) -> web.Response:
        if method == "HEAD":
            return web.Response(status=self.status)
        if not self.code:
            return web.Response(status=self.status, text=self.text, content_type=self.content_type)
        xml = f"<Error><Code>{self.code}</Code><Message>{self.text or 'no'}</Message></Error>"
        return web.Response(status=self.status, text=xml, content_type="application/xml")


@dataclass
class FakeS3:
    """A server. `answers`: the responses by call, such as "PUT object", "GET lifecycle", "PUT
    bucket" or "any". `calls`: the received calls. `headers`: the headers of the last one.
    """

    url: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    buckets: set[str] = field(default_factory=lambda: {"img2img"})
    files: dict[str, bytes] = field(default_factory=dict)
    rules: str = ""
    hangs: set[str] = field(default_factory=set)  # calls that wait until `released` is set
    released: asyncio.Event = field(default_factory=asyncio.Event)

    def settings(self, **changes: Any) -> dict[str, Any]:
        keys = {"s3_access_key": "a-key", "s3_secret_key": "its-secret"}
        return {"s3_endpoint_url": self.url, **keys, **changes}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        method, path = request.method, request.path.strip("/")
        bucket, _, key = path.partition("/")
        what = LIFECYCLE if LIFECYCLE in request.query else "object" if key else "bucket"
        call = f"{method} {what}"
        self.calls.append(call)
        self.headers.append(dict(request.headers))
        body = await request.read()
        if call in self.hangs:
            await self.released.wait()
        if answer := self.answers.get(call) or self.answers.get("any"):
            return answer.response(method)
        if call == "PUT bucket":
            self.buckets.add(bucket)
            return web.Response()
        if bucket not in self.buckets:
            return Answer(404, "NoSuchBucket").response(method)
        if what == LIFECYCLE:
            return self._lifecycle(method, body)
        if method == "PUT":
            self.files[path] = body
            return web.Response(headers={"ETag": '"0"'})
        if method == "DELETE":
            self.files.pop(path, None)
            return web.Response(status=204)
        if path not in self.files:
            return Answer(404, "NoSuchKey").response(method)
        return web.Response(
            body=self.files[path],
            headers={"ETag": '"0"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"},
        )

    def _lifecycle(self, method: str, body: bytes) -> web.Response:
        if method == "PUT":
            self.rules = body.decode()
            return web.Response()
        if not self.rules:
            return Answer(404, "NoSuchLifecycleConfiguration").response(method)
        return web.Response(text=self.rules, content_type="application/xml")

    def prefixes(self) -> list[str]:
        """The prefixes of the lifecycle rules."""
        return re.findall(r"<Prefix>([^<]*)</Prefix>", self.rules)


@asynccontextmanager
async def fake_s3() -> AsyncIterator[FakeS3]:
    """Yields a server on a free port, with an empty bucket `img2img`."""
    store = FakeS3()
    async with serving(every_request(store.handle)) as port:
        store.url = f"http://127.0.0.1:{port}"
        yield store
