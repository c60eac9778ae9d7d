"""Stable Diffusion 1.x and 2.x, and models derived from them."""

from __future__ import annotations

from functools import partial

from tests.oracle.harness import IS_FULL, RUNS, OracleModel
from tests.tiny_models import EPSILON, TURBO, ZERO_SNR_V, write_sd

# Two models are compared with every scheduler at some runs, the others with some schedulers at
# every run. tests/unit/test_sampler.py has every scheduler at more runs.
_RUNS = RUNS if IS_FULL else (RUNS[0], *RUNS[2:4], RUNS[7], RUNS[-1])
_FEW = () if IS_FULL else ("ddim", "euler_a", "pndm")

MODELS = {
    "sd with a KL autoencoder": OracleModel(
        partial(write_sd, scheduler=EPSILON, is_deep=True), runs=_RUNS
    ),
    "sd with a tiny autoencoder": OracleModel(
        partial(write_sd, scheduler=EPSILON, tiny_vae=True), runs=_RUNS
    ),
    "sd turbo": OracleModel(partial(write_sd, scheduler=TURBO), schedulers=_FEW),
    "sd that predicts v from pure noise": OracleModel(
        partial(write_sd, scheduler=ZERO_SNR_V), schedulers=_FEW
    ),
    "sd that takes the guidance scale as an input": OracleModel(
        partial(write_sd, scheduler=EPSILON, takes_guidance=True), schedulers=_FEW
    ),
}
