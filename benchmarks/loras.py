"""Measures the throughput of an engine with LoRAs, in pairs in one run.

The rows in flight have no LoRA, one or four. The LoRAs are in the weights, so that rows with
different ones take turns, or next to the layers, so that they share batches.

    python -m benchmarks.loras [--model DIR | --architecture NAME] [--side 256] [--rank 16]
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.engine import hardware
from benchmarks.engine_architectures import ARCHITECTURES, build
from benchmarks.engine_stock import photo
from img2img_server.domain.params import JobParams, Lora
from img2img_server.engine.base import EngineEvent, EngineJob, JobDone, JobFailed
from img2img_server.engine.denoiser import Conditioning
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.load import load_pipeline
from img2img_server.engine.diffusers.local_model import find_model
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.model_spec import ModelSpec, read_model_spec
from img2img_server.engine.options import ModelOptions

NAMES = ("a", "b", "c", "d")
# The layers that most LoRA files change.
LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")
CASES = (("weights", 0), ("weights", 1), ("branch", 1), ("weights", 4), ("branch", 4))


class Timed(DiffusersDenoiser):
    """The denoiser, which measures the seconds of its steps."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.steps, self.wall, self.cpu = 0, 0.0, 0.0

    def denoise(
        self, latents: Sequence[Tensor], timesteps: Tensor, conditionings: Sequence[Conditioning]
    ) -> Sequence[Tensor]:
        began, used = time.monotonic(), time.process_time()
        outputs = super().denoise(latents, timesteps, conditionings)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.steps += len(latents)
        self.wall += time.monotonic() - began
        self.cpu += time.process_time() - used
        return outputs

    @property
    def fixed_step_cost(self) -> None:
        return None  # All rows share batches, as on a GPU.


@dataclass(frozen=True, slots=True)
class Times:
    """The times of one run: of all, and of a step of a row."""

    wall: float
    step_wall: float
    step_cpu: float


def write_loras(denoiser: DiffusersDenoiser, folder: Path, rank: int) -> None:
    """Writes random LoRAs for the attention and feed-forward layers of a model."""
    part, network = denoiser._family.denoiser, denoiser._model.network
    for number, name in enumerate(NAMES):
        generator, file = torch.Generator().manual_seed(number), {}
        for layer, module in network.named_modules():
            if layer.endswith(LAYERS):
                outputs, inputs = module.weight.shape[:2]
                down = torch.randn((rank, inputs), generator=generator) / inputs
                file[f"{part}.{layer}.lora_A.weight"] = down
                up = torch.randn((outputs, rank), generator=generator)
                file[f"{part}.{layer}.lora_B.weight"] = up
        save_file(file, folder / f"{name}.safetensors")


def run(
    denoiser: Timed, engine: DiffusionEngine, rows: int, loras: int, side: int, steps: int
) -> Times:
    """Runs jobs of one row at once."""
    ends: queue.SimpleQueue[EngineEvent] = queue.SimpleQueue()

    def sink(event: EngineEvent) -> None:
        if isinstance(event, JobDone | JobFailed):
            ends.put(event)

    image, began = photo(side), time.monotonic()
    denoiser.steps, denoiser.wall, denoiser.cpu = 0, 0.0, 0.0
    for number in range(rows):
        own = (Lora(NAMES[number % loras]),) if loras else ()
        params = JobParams(
            prompt="a boat",
            seed=number,
            strength=1.0,
            num_inference_steps=steps,
            loras=own,
            scheduler=engine.model.schedulers[0],
        )
        engine.submit(EngineJob(job_id=number, tenant="t", params=params, init_image=image), sink)
    for _ in range(rows):
        event = ends.get()
        if isinstance(event, JobFailed):
            raise event.error
    return Times(
        time.monotonic() - began, denoiser.wall / denoiser.steps, denoiser.cpu / denoiser.steps
    )


def measure(
    model: str, architecture: str, rows: int, side: int, steps: int, rank: int, rounds: int
) -> dict[str, object]:
    """Returns the report: medians of the rounds."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = read_model_spec(model)
        if architecture:
            torch.manual_seed(0)
            pipeline = build(architecture, folder, device, dtype)
            spec = ModelSpec(source="", name=architecture)
        else:
            pipeline, _ = load_pipeline(find_model(spec.source), device, dtype, ModelOptions())
        write_loras(DiffusersDenoiser(pipeline), folder, rank)
        denoiser = Timed(pipeline, lora_dir=folder, max_batch_size=rows)
        engine = DiffusionEngine(denoiser, replace(spec, loras=denoiser.loras), rows, None)

        def time_of(mode: str, loras: int) -> Times:
            denoiser._denoiser_loras._most_work = math.inf if mode == "branch" else 0.0
            return run(denoiser, engine, rows, loras, side, steps)

        try:
            for case in CASES:
                time_of(*case)
            found: dict[tuple[str, int], list[Times]] = {case: [] for case in CASES}
            for place in range(rounds):
                for case in (*CASES[place % len(CASES) :], *CASES[: place % len(CASES)]):
                    found[case].append(time_of(*case))
        finally:
            engine.stop()
    return {
        "hardware": hardware(device, dtype),
        "model": spec.name,
        "rows": rows,
        "side": side,
        "steps": steps,
        "rank": rank,
        "rounds": rounds,
        "cases": {
            f"{loras} LoRAs, {mode}": {
                "images_per_second": rows / statistics.median(it.wall for it in times),
                "step_ms": 1000 * statistics.median(it.step_wall for it in times),
                "step_cpu_ms": 1000 * statistics.median(it.step_cpu for it in times),
            }
            for (mode, loras), times in found.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--architecture", default="", choices=sorted(ARCHITECTURES))
    parser.add_argument("--rows", type=int, default=16, help="in flight")
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    report = measure(
        options.model,
        options.architecture,
        options.rows,
        options.side,
        options.steps,
        options.rank,
        options.rounds,
    )
    text = json.dumps(report, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
