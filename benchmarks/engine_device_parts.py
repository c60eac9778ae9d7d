"""The single measurements of benchmarks.engine_device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine_load import Request
from benchmarks.engine_servers import EngineServer
from img2img_server.engine.denoiser import TextInput
from img2img_server.engine.diffusers_denoiser import DiffusersDenoiser
from img2img_server.engine.options import ModelOptions


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median time of one call, the device waited for."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    one = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(lambda: one @ one, device, 10) / 1e12


class Steps:
    """Times the UNet of a denoiser by batch size."""

    def __init__(self, denoiser: DiffusersDenoiser, side: int, repeats: int) -> None:
        self._denoiser = denoiser
        self._side = side
        self._repeats = repeats
        text = TextInput(prompt="", negative_prompt="", guidance_scale=1.0, height=side, width=side)
        (self._conditioning,) = denoiser.encode_texts([text])

    def measure(self, rate: float, batches: Sequence[int]) -> dict[str, dict[str, float]]:
        """Milliseconds and TFLOP/s of a step, and its share of the device's matrix rate."""
        flops = self._flops()
        found = {}
        for batch in batches:
            began = time.perf_counter()
            step = self._step(batch)
            step()
            first = time.perf_counter() - began
            took = seconds(step, self._denoiser.device, self._repeats)
            achieved = flops * batch / took / 1e12
            found[str(batch)] = {
                "ms": round(took * 1e3, 2),
                "tflops": round(achieved, 4),
                "share": round(achieved / rate, 3),
                "first_call_s": round(first, 1),
            }
        return found

    def _flops(self) -> int:
        """Of one forward, counted without running one: the counter sees through no compiler."""
        unet = self._denoiser._unet
        counter = FlopCounterMode(display=False)
        with counter, torch._dynamo.config.patch(disable=True):
            DiffusersDenoiser.denoise(
                _with_unet(self._denoiser, getattr(unet, "_orig_mod", unet)),
                *self._inputs(1),
            )
        return int(counter.get_total_flops())

    def _inputs(self, batch: int) -> tuple[Any, Any, Any]:
        device, channels = self._denoiser.device, self._denoiser._unet.config.in_channels
        latents = torch.randn(batch, channels, self._side // 8, self._side // 8, device=device)
        timesteps = torch.full((batch,), 500.0, device=device)
        return latents, timesteps, [self._conditioning] * batch

    def _step(self, batch: int) -> Callable[[], Any]:
        latents, timesteps, conditionings = self._inputs(batch)
        return lambda: self._denoiser.denoise(latents, timesteps, conditionings)


def _with_unet(denoiser: DiffusersDenoiser, unet: Any) -> DiffusersDenoiser:
    """The denoiser with its UNet as it was before it was compiled."""
    plain = object.__new__(DiffusersDenoiser)
    plain.__dict__.update(denoiser.__dict__, _unet=unet)
    return plain


def request_latencies(
    pipeline: Any, side: int, options: ModelOptions | None = None
) -> dict[str, float]:
    """Milliseconds of one unguided request alone, by its steps; the median of five."""
    server = EngineServer(pipeline, None, 8, options)  # a clock would be in the compiler's way
    found = {}
    for steps in (1, 2, 3, 4):
        one = Request(0, 0.0, side, 1.0, steps, 1.0, "a harbour at dusk")
        times = [
            server.serve([replace(one, number=number)]).outcomes[0].latency for number in range(7)
        ]
        found[str(steps)] = round(statistics.median(times[2:]) * 1e3, 1)
    server.stop()
    return found
