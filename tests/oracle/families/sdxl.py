"""Stable Diffusion XL and related models: Turbo, models that predict v, and EDM models."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from diffusers import EDMDPMSolverMultistepScheduler

from img2img_server.engine.diffusers.samplers import EDM_SAMPLERS
from tests.oracle.harness import IS_FULL, RUNS, OracleModel
from tests.tiny_models import EPSILON, TURBO, ZERO_SNR_V, replace_scheduler, write_sdxl


def write_edm(folder: Path) -> Path:
    """Writes a model of the kind of Playground 2.5."""
    scheduler = EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    return replace_scheduler(write_sdxl(folder, scheduler=EPSILON), scheduler)


# All schedulers are compared with Stable Diffusion. The additions of an SDXL pipeline do not depend
# on the scheduler.
_FEW = () if IS_FULL else ("euler", "heun", "dpmpp_2m_sde_karras")

MODELS = {
    "sdxl": OracleModel(partial(write_sdxl, scheduler=EPSILON, is_deep=True), schedulers=_FEW),
    "sdxl turbo": OracleModel(partial(write_sdxl, scheduler=TURBO), schedulers=_FEW),
    "sdxl that predicts v from pure noise": OracleModel(
        partial(write_sdxl, scheduler=ZERO_SNR_V), schedulers=_FEW
    ),
    "sdxl of the edm kind": OracleModel(
        write_edm, schedulers=EDM_SAMPLERS, runs=RUNS if IS_FULL else RUNS[1:6]
    ),
}
