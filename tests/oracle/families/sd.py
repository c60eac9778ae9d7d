"""Stable Diffusion 1.x and 2.x, with what their relatives change."""

from __future__ import annotations

from functools import partial

from tests.oracle.harness import OracleModel
from tests.tiny_models import EPSILON, TURBO, ZERO_SNR_V, write_sd

MODELS = {
    "sd with a KL autoencoder": OracleModel(partial(write_sd, scheduler=EPSILON, is_deep=True)),
    "sd with a tiny autoencoder": OracleModel(partial(write_sd, scheduler=EPSILON, tiny_vae=True)),
    "sd turbo": OracleModel(partial(write_sd, scheduler=TURBO)),
    "sd that predicts v from pure noise": OracleModel(partial(write_sd, scheduler=ZERO_SNR_V)),
    "sd that takes the guidance scale as an input": OracleModel(
        partial(write_sd, scheduler=EPSILON, takes_guidance=True)
    ),
}
