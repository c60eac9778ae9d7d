"""Runs LitServe with its dynamic batching around the stock pipeline, in its own process.

python -m benchmarks.engine_litserve_app PIPELINE PORT ROWS THREADS DEVICE DTYPE
"""

from __future__ import annotations

import base64
import io
import sys
import time
from collections.abc import Sequence
from typing import Any

import litserve

from benchmarks.engine_clock import Clock
from benchmarks.engine_load import Request
from benchmarks.engine_process import Place
from benchmarks.engine_stock import Stock, kind

BATCH_TIMEOUT_SECONDS = 0.05


class Img2Img(litserve.LitAPI):
    """Runs the requests that LitServe collects, one call for each kind: calls cannot mix kinds."""

    def __init__(self, place: Place) -> None:
        super().__init__(max_batch_size=place.rows, batch_timeout=BATCH_TIMEOUT_SECONDS)
        self._place = place

    def setup(self, device: object) -> None:
        self._place.settle()  # There is no safety checker, because only the loops are compared.
        self._pipeline = self._place.pipeline()
        self._stock, self._clock, self._busy = Stock(self._pipeline), Clock(self._pipeline), 0.0

    def decode_request(self, request):  # LitServe reads annotations in the same way as FastAPI.
        return Request(**request)

    def batch(self, inputs: list[Request]) -> list[Request]:
        return inputs

    def predict(self, x: list[Request]) -> list[dict[str, Any]]:
        began = time.perf_counter()
        images = {}
        for first in x:
            if first.number not in images:
                group = [request for request in x if kind(request) == kind(first)]
                made = self._stock.run(group)
                images |= {r.number: image for r, image in zip(group, made, strict=True)}
        self._busy += time.perf_counter() - began
        figures = {"busy": self._busy, "networks": self._clock.seconds}
        return [{"image": images[request.number], **figures} for request in x]

    def unbatch(self, output: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(output)

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        file = io.BytesIO()
        output["image"].save(file, "JPEG", quality=95)
        return {**output, "image": base64.b64encode(file.getvalue()).decode()}


def main() -> None:
    """Serves until it is killed."""
    source, port, rows, threads, device, dtype = sys.argv[1:]
    place = Place(source, device, dtype, int(threads), int(rows))
    accelerator = "cuda" if device.startswith("cuda") else "cpu"
    server = litserve.LitServer(
        Img2Img(place),
        accelerator=accelerator,
        devices=1,
        timeout=False,
    )
    server.run(host="127.0.0.1", port=int(port), log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
