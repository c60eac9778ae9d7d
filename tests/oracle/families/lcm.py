"""A latent consistency model, with its own pipeline and scheduler."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import LCMScheduler

from img2img_server.engine.base import EngineJob
from tests.engine_bench import stock_call
from tests.oracle.harness import OracleModel
from tests.tiny_models import EPSILON, replace_scheduler, write_sd

# At most original_inference_steps x strength steps can run.
_RUNS = ((0.14, 3), (0.28, 4), (0.3, 7), (0.5, 9), (0.6, 8), (0.85, 5), (1.0, 1), (1.0, 11))


def write(folder: Path, *, original_inference_steps: int = 50) -> Path:
    """Writes the model."""
    scheduler = LCMScheduler(**EPSILON, original_inference_steps=original_inference_steps)
    write_sd(folder, takes_guidance=True)
    return replace_scheduler(folder, scheduler, class_name="LatentConsistencyModelPipeline")


def call(wanted: EngineJob) -> dict[str, Any]:
    """Returns the arguments of the stock pipeline, which takes no negative prompt."""
    arguments = stock_call(wanted)
    del arguments["negative_prompt"]
    return arguments


MODELS = {
    "lcm": OracleModel(write, call=call, runs=_RUNS, most_steps=50),
    "lcm with a longer schedule": OracleModel(
        partial(write, original_inference_steps=100), call=call, runs=_RUNS
    ),
}
