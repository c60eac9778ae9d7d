"""The model inside the package, through the engine and through the stock pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from img2img_server.domain.params import Limits
from img2img_server.engine.load import load_engine
from img2img_server.engine.model_spec import packaged_model
from img2img_server.engine.options import EngineOptions
from img2img_server.settings import Settings
from tests.engine_bench import BOUND, Stock, difference, images, job, run

PHOTO = Path(__file__).parents[2] / "examples" / "cat.jpg"


def test_it_gives_the_stock_pipelines_images_at_its_own_defaults_and_odd_sizes() -> None:
    photo = Image.open(PHOTO).convert("RGB")
    stock = Stock(packaged_model())
    engine = load_engine(EngineOptions.of(Settings()))
    info = engine.model
    try:
        for scheduler, size in ((info.schedulers[0], (256, 256)), ("euler_a", (520, 264))):
            wanted = job(
                prompt="a watercolor painting of a cat",
                init_image=np.asarray(photo.resize(size)),
                strength=info.default_strength,
                num_inference_steps=info.default_num_inference_steps,
                guidance_scale=info.default_guidance_scale,
                scheduler=scheduler,
            )
            (ours,), (theirs,) = images(run(engine, wanted)), stock.images(wanted)
            assert difference(ours, theirs) <= BOUND
            assert difference(ours, wanted.init_image) > 40, "it did change the photo"
    finally:
        engine.stop()


def test_every_scheduler_runs_the_steps_that_the_model_allows() -> None:
    engine = load_engine(EngineOptions.of(Settings()))
    try:
        for scheduler in engine.model.schedulers:
            most = engine.model.limits(Limits(), scheduler).max_num_inference_steps
            wanted = job(
                strength=1.01 / most,
                num_inference_steps=most,
                scheduler=scheduler,
                init_image=np.zeros((64, 64, 3), np.uint8),
            )
            assert len(images(run(engine, wanted))) == 1
    finally:
        engine.stop()


def test_the_package_ships_the_card_and_the_defaults_of_the_recipe() -> None:
    recipe, shipped = Path(__file__).parents[2] / "models", packaged_model()

    for name in ("MODEL_CARD.md", "img2img.toml"):
        assert (shipped / name).read_text() == (recipe / name).read_text()
