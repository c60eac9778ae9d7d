"""What each speed switch makes of a step and of a decode, alone, with the model that ships.

    python -m benchmarks.engine_switches [--sides 256 512] [--switches plain fuse_qkv ...]

Milliseconds of one guided row; the median of `--repeats`, in turns, so that a machine that slows
down slows all of them. `first`: seconds of the first step, with what is compiled for it, or taken
from what torch has kept of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import hardware
from img2img_server.engine.denoiser import TextInput
from img2img_server.engine.diffusers_denoiser import DiffusersDenoiser
from img2img_server.engine.load import choose_device, choose_dtype, keep_freed_memory
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.engine.options import Compile, ModelOptions

SWITCHES = {
    "plain": ModelOptions(),
    "channels_last=false": ModelOptions(channels_last=False),
    "fuse_qkv": ModelOptions(fuse_qkv=True),
    "compile=regional": ModelOptions(compile=Compile.REGIONAL),
    "compile=whole": ModelOptions(compile=Compile.WHOLE),
}


def works(denoiser: DiffusersDenoiser, side: int) -> dict[str, Callable[[], Any]]:
    """A guided step and a decode of one picture."""
    text = TextInput(prompt="a", negative_prompt="", guidance_scale=5.0, height=side, width=side)
    (conditioning,) = denoiser.encode_texts([text])
    latents = torch.randn(1, denoiser._unet.config.in_channels, side // 8, side // 8)
    latents = latents.to(denoiser.device)
    timesteps = torch.full((1,), 500.0, device=denoiser.device)
    return {
        "step": lambda: denoiser.denoise(latents, timesteps, [conditioning]).cpu(),
        "decode": lambda: denoiser.decode(latents)[0].pixels(),
    }


def timed(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """The report."""
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    spec = read_model_spec(arguments.model)
    denoisers = {
        name: DiffusersDenoiser.load(spec.source, device, dtype, SWITCHES[name])
        for name in arguments.switches
    }
    return {
        "model": spec.name,
        "command": " ".join(sys.argv[1:]),
        "hardware": hardware(device, dtype),
        "results": {
            str(side): compare(denoisers, side, arguments.repeats) for side in arguments.sides
        },
    }


def compare(
    denoisers: dict[str, DiffusersDenoiser], side: int, repeats: int
) -> dict[str, dict[str, float]]:
    """The times of every switch at one size."""
    work, first = {}, {}
    for name, denoiser in denoisers.items():
        work[name] = works(denoiser, side)
        first[name] = timed(work[name]["step"])
        work[name]["decode"]()
    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "decode": []} for name in work}
    for _ in range(repeats):
        for name, pair in work.items():
            for what, one in pair.items():
                times[name][what].append(timed(one))
    return {
        name: {
            "step_ms": round(statistics.median(pair["step"]) * 1e3, 1),
            "decode_ms": round(statistics.median(pair["decode"]) * 1e3, 1),
            "first_s": round(first[name], 1),
        }
        for name, pair in times.items()
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables for people."""
    head = f"Model {report['model']}, one guided row. "
    head += ", ".join(f"{key}: {value}" for key, value in report["hardware"].items())
    lines = [head, "", f"`python -m benchmarks.engine_switches {report['command']}`"]
    for side, switches in report["results"].items():
        lines += ["", f"**{side}x{side}**", "", "| | step ms | decode ms | first step s |"]
        lines.append("|---|---|---|---|")
        for name, found in switches.items():
            lines.append(f"| {name} | " + " | ".join(str(value) for value in found.values()) + " |")
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def main() -> None:
    """Runs, prints, writes JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--switches", nargs="+", choices=list(SWITCHES), default=list(SWITCHES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    report = measure(arguments)
    print(markdown(report))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        arguments.output.with_suffix(".md").write_text(markdown(report), encoding="utf-8")


if __name__ == "__main__":
    main()
