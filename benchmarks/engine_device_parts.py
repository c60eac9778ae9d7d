"""The parts of benchmarks.engine_device. Each yields tables, row by row, and first the hardware."""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.engine import compare, hardware, place_of, systems
from benchmarks.engine_architectures import build, traits_of
from benchmarks.engine_device import HARDWARE, LOAD
from benchmarks.engine_load import UNET, Request
from benchmarks.engine_servers import EngineServer
from benchmarks.engine_stock import photo
from img2img_server.engine.denoiser import TextInput
from img2img_server.engine.device import choose_device, choose_dtype
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.diffusers.load import accelerate
from img2img_server.engine.family import ModelFiles
from img2img_server.engine.options import Compile, ModelOptions

Found = Iterator[tuple[str, dict[str, Any]]]


def seconds(work: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Returns the median time of a call, including the wait for the device."""

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
    """Returns the TFLOP/s of one large matrix product."""
    side = 8192 if device.type == "cuda" else 1024
    one = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds(lambda: one @ one, device, 10) / 1e12


def eager(name: str, arguments: argparse.Namespace) -> Found:
    """Measures steps by batch size, and single requests."""
    bench = Bench(name, arguments)
    yield bench.hardware
    yield from bench.steps("step by rows, eager", arguments.batches)
    yield from bench.requests("one request by steps, eager", ModelOptions())


def mixed_load(name: str, arguments: argparse.Namespace) -> Found:
    """Compares the systems of benchmarks.engine."""
    device = choose_device(arguments.device)
    place = place_of(name, device, choose_dtype(arguments.dtype, device), arguments.rows)
    traits = traits_of(name)
    servers = systems(place, arguments.litserve and traits is UNET)
    count, seconds = arguments.requests, arguments.load_seconds
    found = compare(
        servers, count, arguments.loads, [arguments.side], seconds=seconds, traits=traits
    )
    for load, summaries in found:
        yield LOAD + load, summaries


def compiled_request(name: str, arguments: argparse.Namespace) -> Found:
    """Measures single requests, compiled as in the engine."""
    bench = Bench(name, arguments)
    options = bench.compile()
    yield from bench.requests("one request by steps, compiled", options)


def compiled_steps(name: str, arguments: argparse.Namespace) -> Found:
    """Measures steps, compiled as in the engine."""
    bench = Bench(name, arguments)
    bench.compile()
    yield from bench.steps("step by rows, compiled", arguments.compiled_batches)


PARTS: dict[str, Callable[[str, argparse.Namespace], Found]] = {
    "eager": eager,
    "mixed load": mixed_load,
    "compiled request": compiled_request,
    "compiled steps": compiled_steps,
}


class Bench:
    """One architecture on the device."""

    def __init__(self, name: str, arguments: argparse.Namespace) -> None:
        self._device = choose_device(arguments.device)
        self._dtype = choose_dtype(arguments.dtype, self._device)
        self._side, self._repeats = arguments.side, arguments.repeats
        with tempfile.TemporaryDirectory() as folder:
            self.pipeline = build(name, Path(folder), self._device, self._dtype)
        self._family = detect(ModelFiles.of_pipeline(self.pipeline), name)
        self._traits = traits_of(name)
        self._rate = matrix_rate(self._device, self._dtype)
        # The FLOPs are counted before compiling, because the counter does not see compiled code.
        self._flops = self._count()

    def compile(self) -> ModelOptions:
        """Compiles the denoiser as far as the engine does; returns the engine's options for it."""
        lengths_vary = self._family.lengths_vary
        options = ModelOptions(compile=Compile.REGIONAL if lengths_vary else Compile.WHOLE)
        accelerate(getattr(self.pipeline, self._family.denoiser), options, lengths_vary)
        return options

    @property
    def hardware(self) -> tuple[str, dict[str, str]]:
        found = hardware(self._device, self._dtype)
        side = str(self._side)
        return HARDWARE, {**found, "matrix TFLOP/s": f"{self._rate:.2f}", "side": side}

    @torch.inference_mode()
    def steps(self, title: str, batches: Sequence[int]) -> Found:
        """Yields milliseconds and TFLOP/s of a step, and its share of the device's matrix rate."""
        denoiser = DiffusersDenoiser(self.pipeline)
        for batch in batches:
            inputs = self._inputs(denoiser, batch)
            began = time.perf_counter()
            denoiser.denoise(*inputs)
            first = time.perf_counter() - began
            took = seconds(lambda: denoiser.denoise(*inputs), self._device, self._repeats)  # noqa: B023
            achieved = self._flops * batch / took / 1e12
            row = {
                "ms": round(took * 1e3, 2),
                "TFLOP/s": round(achieved, 4),
                "share": round(achieved / self._rate, 3),
                "first call s": round(first, 1),
            }
            yield title, {str(batch): row}

    def requests(self, title: str, options: ModelOptions) -> Found:
        """Yields the milliseconds of an unguided single request: the median of five, after two
        warm-up requests.
        """
        # The clock would disturb the compiler. There is one row, so that no other batch sizes are
        # compiled.
        server = EngineServer(self.pipeline, None, 1, options)
        for steps in (1, 2, 3, 4):
            unguided = self._traits.guidance_scales[0]
            one = Request(
                0, 0.0, self._side, 1.0, steps, unguided, "a harbour at dusk", self._traits
            )
            loads = [[replace(one, number=number)] for number in range(7)]
            times = [server.serve(load).outcomes[0].latency for load in loads]
            yield title, {str(steps): {"ms": round(statistics.median(times[2:]) * 1e3, 1)}}
        server.stop()

    @torch.inference_mode()
    def _count(self) -> int:
        """Returns the FLOPs of a forward of one row."""
        denoiser = DiffusersDenoiser(self.pipeline)
        with FlopCounterMode(display=False) as counter:
            denoiser.denoise(*self._inputs(denoiser, 1))
        return int(counter.get_total_flops())

    def _inputs(self, denoiser: DiffusersDenoiser, batch: int) -> tuple[Any, Any, Any]:
        side = self._side
        text = TextInput(
            prompt="a harbour at dusk",
            negative_prompt="",
            guidance_scale=self._traits.guidance_scales[0],
            height=side,
            width=side,
        )
        conditionings = denoiser.encode_texts([text])
        image = denoiser.encode_images([photo(side)])[0].mean
        latents = torch.randn(batch, *image.shape, device=self._device)
        timesteps = torch.full((batch,), 500.0, device=self._device)
        return torch.split(latents, 1), timesteps, list(conditionings) * batch
