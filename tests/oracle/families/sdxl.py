"""Stable Diffusion XL and its Turbo model."""

from __future__ import annotations

from functools import partial

from tests.oracle.harness import OracleModel
from tests.tiny_models import EPSILON, TURBO, write_sdxl

MODELS = {
    "sdxl": OracleModel(partial(write_sdxl, scheduler=EPSILON, is_deep=True)),
    "sdxl turbo": OracleModel(partial(write_sdxl, scheduler=TURBO)),
}
