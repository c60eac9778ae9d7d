"""Which pages may call from browsers (HTTP contract, section 14).

A page can send a POST without asking first, and a name of its own can point to 127.0.0.1. Whoever
must know a key is not harmed by that; with the development key, which everybody knows, any page on
the web could give jobs and orders to the service of whoever looks at it. So with that key the pages
of other machines are refused, unless the operator says which ones may call.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from img2img_server.gateway.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.modelslab.response_formats import ResponseFormat
from img2img_server.settings import Settings, is_loopback

METHODS = "GET, POST, OPTIONS"
HEADERS = "Content-Type, Authorization, key, X-API-Key, X-Requested-With"
EXPOSED = "Retry-After"


class Origins:
    """The setting cors_origins, read once."""

    def __init__(self, settings: Settings) -> None:
        origins = settings.browser_origins
        self._listed = [origin.strip() for origin in origins.split(",") if origin.strip()]
        self._any = "*" in self._listed
        self._guarded = settings.has_open_dev_key and not self._any
        self._own_host = _host(settings.public_base_url)

    def headers(self, origin: str) -> dict[str, str]:
        """What the answer to a page of this origin tells its browser."""
        exposed = {"Access-Control-Expose-Headers": EXPOSED}
        if self._any:
            return {"Access-Control-Allow-Origin": "*", **exposed}
        if self._lists(origin):
            return {"Access-Control-Allow-Origin": origin, "Vary": "Origin", **exposed}
        return {"Vary": "Origin"}

    def refuses(self, headers: Headers) -> bool:
        """Whether the request may come from a page that has no business here."""
        if not self._guarded:
            return False
        host = _host(f"http://{headers.get('host', '')}")
        if host and not self._is_here(host):
            return True
        origin = headers.get("origin")
        if origin is None or self._lists(origin):
            return False
        # A page that a proxy of this machine shows under the proxy's name. Pages cannot set this
        # header, and a name of theirs that points here stands in Host, above.
        return headers.get("sec-fetch-site") != "same-origin"

    def _lists(self, origin: str) -> bool:
        if origin in self._listed:
            return True
        return "loopback" in self._listed and self._is_here(_host(origin))

    def _is_here(self, host: str) -> bool:
        return bool(host) and (is_loopback(host) or host == self._own_host)


class Cors:
    """Answers OPTIONS, which needs no key, and adds the headers to every other answer."""

    def __init__(self, app: ASGIApp, origins: Origins, dialect: ResponseFormat) -> None:
        self._app = app
        self._origins = origins
        self._refused = dialect.refused(RequestError(ErrorKind.FOREIGN_PAGE))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        cors = self._origins.headers(headers.get("origin", ""))

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(cors)
            await send(message)

        if scope["method"] == "OPTIONS":
            await _preflight(send_with_cors)
        elif self._origins.refuses(headers):
            response = JSONResponse(self._refused.body, self._refused.status)
            await response(scope, receive, send_with_cors)
        else:
            await self._app(scope, receive, send_with_cors)


async def _preflight(send: Send) -> None:
    allowed = {"Access-Control-Allow-Methods": METHODS, "Access-Control-Allow-Headers": HEADERS}
    start: Message = {"type": "http.response.start", "status": 204, "headers": []}
    MutableHeaders(scope=start).update(allowed)
    await send(start)
    await send({"type": "http.response.body", "body": b""})


def _host(url: str) -> str:
    """The host of an address; nothing when it has none."""
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
