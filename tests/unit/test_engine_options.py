"""Batch sizes and image sizes of settings."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from img2img_server.engine.options import (
    Compile,
    EngineOptions,
    batch_size_buckets,
    pad_batch_size,
    sizes,
)
from img2img_server.settings import Settings


@pytest.mark.parametrize(
    ("most", "expected"), [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))]
)
def test_the_buckets_end_with_the_largest_batch(most: int, expected: tuple[int, ...]) -> None:
    assert batch_size_buckets(most) == expected


@pytest.mark.parametrize(("forwards", "expected"), [(1, 1), (3, 4), (5, 6), (6, 6), (7, 7)])
def test_a_batch_is_filled_up_to_a_size_of_the_ladder(forwards: int, expected: int) -> None:
    assert pad_batch_size(forwards, max_batch_size=6) == expected


def test_sizes_are_written_width_first_and_read_height_first() -> None:
    assert sizes(" 512x256,768x768 ") == ((256, 512), (768, 768))
    assert sizes("") == ()


def test_what_is_no_size_is_refused_by_the_settings_and_by_name() -> None:
    with pytest.raises(ValueError, match="'512' is no size"):
        sizes("512x512,512")
    with pytest.raises(ValidationError, match="warm_up_sizes"):
        Settings(warm_up_sizes="512x512,512")


def test_options_are_those_of_the_settings() -> None:
    settings = Settings(compile="whole", channels_last=False, vae_tile_pixels=7, max_batch_size=3)

    assert EngineOptions.of(settings) == EngineOptions(
        compile=Compile.WHOLE, channels_last=False, vae_tile_pixels=7, max_batch_size=3
    )
    assert EngineOptions.of(Settings()) == EngineOptions()
