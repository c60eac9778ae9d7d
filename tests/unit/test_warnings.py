"""The sentences of Job.warning about the init image."""

from __future__ import annotations

import pytest

from img2img_server.domain.warnings import enlarged


@pytest.mark.parametrize(
    ("own", "size"),
    [((128, 128), (512, 512)), ((4000, 3000), (512, 512)), ((600, 128), (512, 512))],
    ids=["quarter", "larger", "quarter-of-a-side"],
)
def test_an_init_image_of_a_quarter_of_each_side_has_no_warning(
    own: tuple[int, int], size: tuple[int, int]
) -> None:
    assert enlarged(own, size) == ""


@pytest.mark.parametrize(
    ("own", "size"),
    [((16, 12), (512, 512)), ((127, 512), (512, 512)), ((300, 100), (768, 512))],
    ids=["tiny", "narrow", "flat"],
)
def test_a_smaller_init_image_has_a_warning_with_both_sizes(
    own: tuple[int, int], size: tuple[int, int]
) -> None:
    assert enlarged(own, size) == (
        f"init_image has only {own[0]}x{own[1]} pixels and was enlarged to {size[0]}x{size[1]}: "
        "send a larger one for more details."
    )
