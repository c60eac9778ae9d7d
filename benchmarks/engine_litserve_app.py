"""A LitServe server with its dynamic batching around the stock pipeline: its own process.

python -m benchmarks.engine_litserve_app PIPELINE PORT ROWS THREADS DEVICE DTYPE
"""

from __future__ import annotations

import base64
import io
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import litserve
import torch

from benchmarks.engine_architectures import ARCHITECTURES, build
from benchmarks.engine_clock import Clock
from benchmarks.engine_load import Request
from benchmarks.engine_stock import Stock, kind, load_pipeline
from img2img_server.engine.load import keep_freed_memory

BATCH_TIMEOUT_SECONDS = 0.05


class Img2Img(litserve.LitAPI):
    """Takes what LitServe gathers, and makes each kind in one call: the pipeline cannot mix them.

    Args:
        source: a diffusers directory, or the name of an architecture with random weights.
    """

    def __init__(self, source: str, rows: int, threads: int, device: str, dtype: str) -> None:
        super().__init__(max_batch_size=rows, batch_timeout=BATCH_TIMEOUT_SECONDS)
        self._source = source
        self._threads = threads
        self._place = (device, dtype)

    def setup(self, device: object) -> None:
        torch.set_num_threads(self._threads)
        if self._place[0] == "cpu":
            keep_freed_memory()  # the comparison is of the loops
        self._pipeline = load(self._source, *self._place)
        self._stock, self._clock, self._busy = Stock(self._pipeline), Clock(self._pipeline), 0.0

    def decode_request(self, request):  # LitServe reads annotations as FastAPI does
        return Request(**request)

    def batch(self, inputs: list[Request]) -> list[Request]:
        return inputs

    def predict(self, x: list[Request]) -> list[dict[str, Any]]:
        began = time.perf_counter()
        pictures = {}
        for first in x:
            if first.number not in pictures:
                group = [request for request in x if kind(request) == kind(first)]
                made = self._stock.run(group)
                pictures |= {r.number: picture for r, picture in zip(group, made, strict=True)}
        self._busy += time.perf_counter() - began
        figures = {"busy": self._busy, "networks": self._clock.seconds}
        return [{"picture": pictures[request.number], **figures} for request in x]

    def unbatch(self, output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(output)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        file = io.BytesIO()
        output["picture"].save(file, "JPEG", quality=95)
        return {**output, "picture": base64.b64encode(file.getvalue()).decode()}


def load(source: str, device: str, dtype: str) -> Any:
    """The pipeline, from files or made in place."""
    place, kind_of_number = torch.device(device), getattr(torch, dtype)
    if source in ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            return build(source, Path(folder), place, kind_of_number)
    return load_pipeline(source, place, kind_of_number)


def main() -> None:
    """Serves until it is killed."""
    source, port, rows, threads, device, dtype = sys.argv[1:]
    accelerator = "cuda" if device.startswith("cuda") else "cpu"
    server = litserve.LitServer(
        Img2Img(source, int(rows), int(threads), device, dtype),
        accelerator=accelerator,
        devices=1,
        timeout=False,
    )
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
