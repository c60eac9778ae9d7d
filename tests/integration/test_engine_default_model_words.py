"""The effect of words and strength on the packaged model.

Styles change the photo, unknown words keep it intact, and only full strength ignores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from img2img_server.engine.base import Engine
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import EngineOptions
from img2img_server.imaging.base import Pixels
from img2img_server.settings import Settings
from tests.engine_bench import images, job, run

SIDE = 256
EXAMPLES = Path(__file__).parents[2] / "examples"

Draw = Callable[..., Pixels]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    loaded = load_engine(EngineOptions.of(Settings()))
    try:
        yield loaded
    finally:
        loaded.stop()


def example(name: str) -> Pixels:
    return np.asarray(Image.open(EXAMPLES / name).convert("RGB").resize((SIDE, SIDE)))


@pytest.fixture(scope="module")
def photo() -> Pixels:
    return example("cat.jpg")


@pytest.fixture
def draw(engine: Engine, photo: Pixels) -> Draw:
    """Returns an image generated from a photo with the model's own defaults."""
    model = engine.model

    def image(
        prompt: str,
        negative_prompt: str = "",
        init_image: Pixels = photo,
        strength: float = model.default_strength,
    ) -> Pixels:
        wanted = job(
            prompt=prompt,
            negative_prompt=negative_prompt,
            init_image=init_image,
            strength=strength,
            num_inference_steps=model.default_num_inference_steps,
            guidance_scale=model.default_guidance_scale,
            scheduler=model.schedulers[0],
        )
        (only,) = images(run(engine, wanted))
        return only

    return image


def distance(one: Pixels, other: Pixels) -> float:
    """Returns the root mean square of the pixels' differences, 0 to 255."""
    return float(np.sqrt(np.mean((one.astype(np.float32) - other) ** 2)))


def likeness(one: Pixels, other: Pixels) -> float:
    """Returns the correlation of the brightness of 8 x 8 blocks, -1 to 1."""
    blocks = [
        image.mean(axis=2).reshape(SIDE // 8, 8, SIDE // 8, 8).mean(axis=(1, 3)).ravel()
        for image in (one, other)
    ]
    return float(np.corrcoef(blocks)[0, 1])


@pytest.mark.parametrize("prompt", ["", "a red apple on the moon", "zyxo fnord 8712 \N{CAT FACE}"])
def test_words_that_name_no_look_leave_the_photo_recognisable(
    draw: Draw, photo: Pixels, prompt: str
) -> None:
    image = draw(prompt)

    assert likeness(image, photo) > 0.85
    assert distance(image, photo) < 50 < distance(draw("night"), photo)


def test_a_look_stays_the_look_among_words_that_the_model_does_not_know(draw: Draw) -> None:
    alone, among = draw("night"), draw("zyxo fnord of a bicycle, night, 8712")

    assert distance(alone, among) < 0.4 * distance(alone, draw(""))


@pytest.mark.parametrize("prompt", ["watercolour, night", "pencil sketch and sunset"])
def test_two_looks_in_one_prompt_still_give_an_image_of_the_photo(
    draw: Draw, photo: Pixels, prompt: str
) -> None:
    image = draw(prompt)

    assert likeness(image, photo) > 0.3, "two unrelated images are within 0.1 of 0"
    assert distance(image, draw("")) > 15


def test_a_negative_prompt_moves_the_image_away_from_its_look(draw: Draw, photo: Pixels) -> None:
    assert draw("a cat", "night").mean() > draw("a cat", "").mean() + 5


@pytest.mark.parametrize("prompt", ["an oil painting", "night"])
def test_two_photos_give_one_image_at_full_strength_and_two_at_a_low_one(
    draw: Draw, photo: Pixels, prompt: str
) -> None:
    other = example("coffee.jpg")
    full, low = (
        distance(draw(prompt, strength=s), draw(prompt, strength=s, init_image=other))
        for s in (1.0, 0.2)
    )

    assert full < 1.0
    assert low > 0.8 * distance(photo, other)
