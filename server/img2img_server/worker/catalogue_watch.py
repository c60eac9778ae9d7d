"""Logs that the file of the catalogue has changed, since a worker reads it only when it starts."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

from img2img_server.engine.catalogue import read_catalogue
from img2img_server.settings import Settings, SettingsError

PAUSE_SECONDS: Final = 10.0

log = logging.getLogger(__name__)


class CatalogueWatch:
    """The file of the catalogue of a worker. Create it before the catalogue is read.

    Args:
        settings: `models_file` is set.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.models_file is not None
        self._settings = settings
        self._path: Path = settings.models_file
        self._loaded = self._seen = self._content()

    async def follow(self) -> None:
        """Looks at the file for ever."""
        while True:
            await asyncio.sleep(PAUSE_SECONDS)
            await asyncio.to_thread(self.look)

    def look(self) -> None:
        """Logs a change of the file once, with what prevents a restart with it. Blocks."""
        content = self._content()
        if content == self._seen:
            return
        self._seen = content
        if content == self._loaded:
            log.info("catalogue_restored: %s is as it was when the worker started", self._path)
            return
        try:
            read_catalogue(self._settings)
        except SettingsError as error:
            log.warning(
                "catalogue_broken: the worker keeps its models, but cannot start again: %s", error
            )
            return
        log.warning(
            "catalogue_changed: %s has changed, and the worker keeps the models that it started "
            "with: restart it to apply the change",
            self._path,
        )

    def _content(self) -> bytes | None:
        """Returns the bytes of the file; None if it cannot be read."""
        try:
            return self._path.read_bytes()
        except OSError:
            return None
