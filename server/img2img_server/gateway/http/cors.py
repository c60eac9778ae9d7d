"""Decides which web pages may call the gateway from browsers (docs/http-contract.md#cors).

A page may send a POST without a preflight request, and the page's own host name may resolve to
127.0.0.1. A page also needs an API key, but the development key is public. So while that key is
accepted, requests from pages of other machines are rejected, unless `cors_origins` is set.
"""

from __future__ import annotations

import re
from functools import partial
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.gateway.http.middleware import Refuse
from img2img_server.gateway.http.request_ids import HEADER, RESPONSE_HEADER
from img2img_server.settings import Settings

_PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
    "Access-Control-Allow-Headers": "Content-Type, Authorization, key, X-API-Key, X-Requested-With",
}
_FOREIGN = (
    "Pages of this origin may not call this service: its operator lists origins in "
    "IMG2IMG_CORS_ORIGINS"
)
_OF_OPENAI = re.compile(r"\b(?:x-stainless|openai)-[a-z-]{1,40}\b", re.ASCII)
_MAX_OF_OPENAI = 20
_LOOPBACK = r"localhost|127(\.\d{1,3}){3}|\[::1\]"


class Cors(CORSMiddleware):
    """Adds CORS headers to every response and responds to OPTIONS.

    Rejects requests from pages of other machines while the development key is accepted.
    """

    def __init__(self, app: ASGIApp, settings: Settings, refuse: Refuse) -> None:
        origins = [o.strip() for o in settings.browser_origins.split(",") if o.strip()]
        public = re.sub(r":\d*$", "", urlsplit(settings.public_base_url).netloc) or "localhost"
        host = rf"(?i:{_LOOPBACK}|{re.escape(public)})(:\d*)?"
        super().__init__(
            app,
            allow_origins=origins,
            allow_origin_regex=f"https?://{host}" if "loopback" in origins else None,
            expose_headers=[
                "Retry-After",
                RESPONSE_HEADER,
                "Img2img-Job",
                "Img2img-Ignored-Fields",
                "Img2img-Warning",
            ],
        )
        self._local_host = re.compile(host)
        self._is_guarded = settings.has_open_dev_key and not self.allow_all_origins
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        app = self.app
        if scope["method"] == "OPTIONS":
            app = Response(status_code=204, headers=_preflight(headers))
        elif self._is_guarded and self._is_foreign(headers):
            app = self._refuse(scope, RequestError(ErrorKind.FOREIGN_PAGE, _FOREIGN))
        await app(scope, receive, partial(self.send, send=send, request_headers=headers))

    async def send(self, message: Message, send: Send, request_headers: Headers) -> None:
        # Starlette adds these headers only to responses to requests with an Origin header.
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(self.simple_headers)
        if self.allow_all_origins:
            await send(message)
        else:
            await super().send(message, send, request_headers)

    def _is_foreign(self, headers: Headers) -> bool:
        host, origin = headers.get("host"), headers.get("origin")
        if host and not self._local_host.fullmatch(host):
            return True
        if origin is None or self.is_allowed_origin(origin):
            return False
        # A proxy on this machine may serve the page under the proxy's own name. Pages cannot set
        # this header. A name of an attacker that resolves to this machine is in Host, which is
        # checked above.
        return headers.get("sec-fetch-site") != "same-origin"


def _preflight(headers: Headers) -> dict[str, str]:
    """Returns the headers of the response to OPTIONS."""
    asked = headers.get("access-control-request-headers", "").lower()
    # OpenAI's client names itself in headers whose number grows with its versions.
    more = list(dict.fromkeys(_OF_OPENAI.findall(asked)))[:_MAX_OF_OPENAI]
    if HEADER.lower() in asked:
        more.insert(0, HEADER)
    if not more:
        return _PREFLIGHT
    name = "Access-Control-Allow-Headers"
    return _PREFLIGHT | {name: ", ".join([_PREFLIGHT[name], *more])}
