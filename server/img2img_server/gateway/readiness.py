"""Whether the gateway may get traffic; the same answer at its own port and at the probe port."""

from __future__ import annotations

import asyncio

import grpc

from img2img_server.gateway.files import Files
from img2img_server.gateway.upstream import Upstream
from img2img_server.store.base import BlobStore


class Readiness:
    """Asks the api and the bucket, each for two seconds at most."""

    def __init__(self, channel: grpc.aio.Channel, blobs: BlobStore, stop: asyncio.Event) -> None:
        self._upstream = Upstream(channel)
        self._files = Files(blobs)
        self._stop = stop

    async def troubles(self) -> dict[str, str]:
        """Returns why requests cannot be served, by part; empty: they can."""
        api, bucket = await asyncio.gather(self._upstream.trouble(), self._files.trouble())
        gateway = "stopping" if self._stop.is_set() else ""
        troubles = {"api": api, "bucket": bucket, "gateway": gateway}
        return {name: trouble for name, trouble in troubles.items() if trouble}

    async def why_not(self) -> str:
        """Returns why requests cannot be served, in a sentence; empty: they can."""
        return "; ".join(f"{part}: {why}" for part, why in (await self.troubles()).items())
