"""The weights of a model with the LoRAs of a folder."""

from __future__ import annotations

from pathlib import Path

from img2img_server.engine.denoiser import Adapter
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.lora import LoraSet
from img2img_server.engine.diffusers.lora_layers import Part
from img2img_server.engine.diffusers.lora_weights import WrittenLoras


class WritingLoras(LoraSet):
    """The LoRAs of a folder for the model of a denoiser, written into its weights."""

    def __init__(self, denoiser: DiffusersDenoiser, folder: Path) -> None:
        super().__init__(denoiser._model, denoiser._family, folder)
        self.written = {part: WrittenLoras(part) for part in Part}

    def use(self, adapters: list[Adapter]) -> None:
        for written in self.written.values():
            written.use(adapters)
