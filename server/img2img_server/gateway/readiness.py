"""Whether the gateway may get traffic; the probe port answers the same, the missing model apart."""

from __future__ import annotations

import asyncio
import time
from typing import Final

import grpc
import structlog

from img2img_server.gateway.http.files import Files
from img2img_server.gateway.upstream import Upstream
from img2img_server.storage.interface import BlobStore

WATCH_SECONDS: Final = 2.0
START_SECONDS: Final = 4.0  # of roles that start together, one is ready before the other
log = structlog.get_logger()


class Readiness:
    """Asks the api, also whether a worker has ever announced a model, and the bucket, each for two
    seconds at most, and logs when they begin or cease to answer."""

    def __init__(self, channel: grpc.aio.Channel, blobs: BlobStore, stop: asyncio.Event) -> None:
        self._upstream = Upstream(channel)
        self._files = Files(blobs)
        self._stop = stop
        self._logged: dict[str, str] = {}  # the last trouble that was logged, by part
        self._answered: set[str] = set()
        self._until = time.monotonic() + START_SECONDS

    async def troubles(self) -> dict[str, str]:
        """Returns why requests cannot be served, by part; empty: they can."""
        api, model, bucket = await asyncio.gather(
            self._upstream.trouble(), self._upstream.model_trouble(), self._files.trouble()
        )
        self._note("api", api)
        self._note("bucket", bucket)
        if not api:
            self._note("model", model)
        gateway = "stopping" if self._stop.is_set() else ""
        troubles = {"api": api, "model": "" if api else model, "bucket": bucket, "gateway": gateway}
        return {name: trouble for name, trouble in troubles.items() if trouble}

    async def why_not(self) -> str:
        """Returns why the role cannot do its part, in a sentence; empty: it can.

        A missing model is left out: whoever starts one role after the other waits for this answer,
        and starts the workers last.
        """
        troubles = await self.troubles()
        return "; ".join(f"{part}: {why}" for part, why in troubles.items() if part != "model")

    async def watch(self) -> None:
        """Looks every two seconds, so that the log tells also where nobody asks for readiness."""
        while True:
            await self.troubles()
            await asyncio.sleep(WATCH_SECONDS)

    def _note(self, part: str, trouble: str) -> None:
        if not trouble:
            self._answered.add(part)
        if trouble == self._logged.get(part, "") or self._stop.is_set():
            return
        if trouble and part not in self._answered and time.monotonic() < self._until:
            return
        self._logged[part] = trouble
        if trouble and part == "model":
            log.info("model_unavailable", reason=trouble)  # of every start: models load slowly
        elif trouble:
            log.warning(f"{part}_unavailable", reason=trouble)
        else:
            log.info(f"{part}_available")
