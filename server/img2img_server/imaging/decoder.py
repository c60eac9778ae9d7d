"""Where untrusted images are decoded: the interface, and the implementation in threads.

pool.py has the implementation that roles use, in processes with limits.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from img2img_server.domain.params import Limits
from img2img_server.imaging.base import CheckedImage, Pixels
from img2img_server.imaging.prepare import Fit, check_image, prepare_image


class ImageDecoder(Protocol):
    """Runs the functions of prepare.py for a tenant."""

    async def check(
        self,
        tenant: str,
        data: bytes,
        *,
        width: int,
        height: int,
        limits: Limits,
        downloaded: bool = False,
        fit: Fit | None = None,
    ) -> CheckedImage:
        """Runs `check_image`.

        Raises:
            InvalidImageError: Also if the image takes too long to decode or needs too much memory.
            ServerBusyError: No decoder or memory became free for the tenant in time.
            UnavailableError: The decoder was lost, or it stops.
        """

    async def prepare(
        self, tenant: str, data: bytes, *, width: int, height: int, prepared: bool = False
    ) -> Pixels:
        """Runs `prepare_image`. Raises the errors of `check`."""


class ThreadDecoder:
    """Decodes in threads of this process without limits: for tests and trusted images."""

    async def check(
        self,
        tenant: str,
        data: bytes,
        *,
        width: int,
        height: int,
        limits: Limits,
        downloaded: bool = False,
        fit: Fit | None = None,
    ) -> CheckedImage:
        """Runs `check_image`. Raises InvalidImageError."""
        return await asyncio.to_thread(
            check_image,
            data,
            width=width,
            height=height,
            limits=limits,
            downloaded=downloaded,
            fit=fit,
        )

    async def prepare(
        self, tenant: str, data: bytes, *, width: int, height: int, prepared: bool = False
    ) -> Pixels:
        """Runs `prepare_image`. Raises InvalidImageError."""
        return await asyncio.to_thread(
            prepare_image, data, width=width, height=height, prepared=prepared
        )
