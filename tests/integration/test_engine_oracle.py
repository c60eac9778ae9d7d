"""The oracle: our picture is the one that the stock pipeline of diffusers makes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from img2img_server.engine.base import Engine
from img2img_server.engine.diffusers.samplers import DIFFUSION_SAMPLERS
from tests.engine_bench import BOUND, Stock, difference, job, load, pictures, run, running
from tests.tiny_models import EPSILON, TURBO, ZERO_SNR_V, write_sd, write_sdxl

MODELS: dict[str, Any] = {
    "sd with a KL autoencoder": (write_sd, {"scheduler": EPSILON}),
    "sd with a tiny autoencoder": (write_sd, {"scheduler": EPSILON, "tiny_vae": True}),
    "sd that predicts v from pure noise": (write_sd, {"scheduler": ZERO_SNR_V}),
    "sd that takes the guidance scale as an input": (
        write_sd,
        {"scheduler": EPSILON, "takes_guidance": True},
    ),
    "sdxl": (write_sdxl, {"scheduler": EPSILON}),
    "sdxl turbo": (write_sdxl, {"scheduler": TURBO}),
}
REQUESTS: dict[str, dict[str, Any]] = {
    "a breath of change": {"strength": 0.1, "num_inference_steps": 13},
    "weak, guided": {"strength": 0.3, "num_inference_steps": 7, "guidance_scale": 7.5},
    "half, guided, negative": {
        "strength": 0.5,
        "num_inference_steps": 9,
        "guidance_scale": 4.0,
        "negative_prompt": "fog",
    },
    "strong, four samples": {
        "strength": 0.85,
        "num_inference_steps": 5,
        "seeds": (11, 12, 13, 14),
        "guidance_scale": 1.5,
    },
    "all new, one step": {"strength": 1.0, "num_inference_steps": 1},
    "all new, guided": {"strength": 1.0, "num_inference_steps": 11, "guidance_scale": 5.0},
    "a longer prompt than fits": {"prompt": "a very long walk along the sea wall at noon"},
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write, options = MODELS[model]
    return Path(write(tmp_path_factory.mktemp("model"), **options))


@pytest.fixture(scope="module")
def stock(folder: Path) -> Stock:
    return Stock(folder)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with running(load(folder)) as opened:
        yield opened


@pytest.mark.parametrize("scheduler", DIFFUSION_SAMPLERS)
def test_a_picture_is_the_stock_pipelines_picture(
    engine: Engine, stock: Stock, scheduler: str
) -> None:
    found = {}
    for name, changes in REQUESTS.items():
        wanted = job(scheduler=scheduler, **changes)
        pairs = zip(pictures(run(engine, wanted)), stock.pictures(wanted), strict=True)
        found[name] = max(difference(ours, theirs) for ours, theirs in pairs)

    assert max(found.values()) <= BOUND, found


def test_the_oracle_would_notice_another_prompt_seed_or_guidance(
    engine: Engine, stock: Stock
) -> None:
    wanted = job(strength=0.8, guidance_scale=5.0)
    (theirs,) = stock.pictures(wanted)

    for changes in ({"prompt": "a horse"}, {"seeds": (6,)}, {"guidance_scale": 6.0}):
        (ours,) = pictures(run(engine, job(**{"strength": 0.8, "guidance_scale": 5.0, **changes})))
        assert difference(ours, theirs) > BOUND, changes
