"""The page at /docs: Swagger UI from a package, so that it works offline and under a strict CSP."""

from __future__ import annotations

import json
from importlib.resources import as_file, files

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from img2img_server.settings import DEV_KEY, Settings

_CSP = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:"
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>img2img: HTTP API</title>
<link rel="icon" href="/docs/assets/favicon.png">
<link rel="stylesheet" href="/docs/assets/swagger-ui.css">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/docs/assets/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
_START = """const ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  onComplete: () => KEY && ui.preauthorizeApiKey("x_api_key", KEY),
});
"""


def add_docs(app: FastAPI, settings: Settings) -> None:
    """Adds the page, its script and the package's assets. With the development key "Try it out" is
    already authorized."""
    key = DEV_KEY if settings.has_open_dev_key else ""
    script = f"const KEY = {json.dumps(key)};\n{_START}"

    @app.get("/docs", include_in_schema=False)
    async def page(_: Request) -> HTMLResponse:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _CSP})

    @app.get("/docs/start.js", include_in_schema=False)
    async def start(_: Request) -> Response:
        return Response(script, media_type="text/javascript")

    with as_file(files("fastapi_offline") / "static") as folder:
        app.mount("/docs/assets", StaticFiles(directory=folder))
