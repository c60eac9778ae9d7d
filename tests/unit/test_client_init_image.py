"""The kinds of init images that the Python client takes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from img2img_client.errors import (
    InitImageFileError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
)
from img2img_client.init_image import PNG_MODES, read_bytes

# Pillow's modes that PNG files have.
KEPT = ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]


def test_a_file_object_is_read_from_its_position_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"photo")
    assert read_bytes(io.BytesIO(b"photo")) == b"photo"
    with path.open("rb") as file:
        assert read_bytes(file) == b"photo"
        file.seek(2)
        assert read_bytes(file) == b"oto"


def test_a_file_object_at_its_end_is_refused_with_the_call_that_helps() -> None:
    file = io.BytesIO()
    file.write(b"photo")
    with pytest.raises(InvalidArgumentError, match=r"seek\(0\)"):
        read_bytes(file)


def test_file_objects_that_cannot_give_bytes_raise_errors_of_the_client(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"photo")
    with path.open() as text, pytest.raises(InvalidArgumentTypeError, match="binary mode"):
        read_bytes(text)  # type: ignore[arg-type]
    with path.open("rb") as closed:
        pass
    with pytest.raises(InvalidArgumentError, match="closed"):
        read_bytes(closed)
    with path.open("ab") as written, pytest.raises(InitImageFileError):
        read_bytes(written)


@pytest.mark.parametrize("mode", KEPT)
def test_a_pillow_image_keeps_its_mode_and_its_pixels(mode: str) -> None:
    image = Image.linear_gradient("L").convert("RGB" if mode == "RGB" else mode)
    sent = Image.open(io.BytesIO(read_bytes(image)))
    assert (sent.format, sent.mode, sent.size) == ("PNG", mode, image.size)
    assert sent.tobytes() == image.tobytes()


@pytest.mark.parametrize("mode", sorted(PNG_MODES))
def test_a_pillow_image_of_a_mode_without_png_is_converted(mode: str) -> None:
    image = Image.new(mode, (8, 4))
    sent = Image.open(io.BytesIO(read_bytes(image)))
    assert sent.tobytes() == image.convert(PNG_MODES[mode]).tobytes()


def test_a_pillow_image_that_png_cannot_hold_is_refused_by_its_mode() -> None:
    with pytest.raises(InvalidArgumentError, match="mode LAB"):
        read_bytes(Image.new("LAB", (8, 4)))


def test_a_rotated_photo_keeps_its_orientation_and_colour_profile() -> None:
    photo = Image.new("RGB", (8, 4))
    exif = photo.getexif()
    exif[0x0112] = 6  # Orientation: rotate by 90 degrees
    encoded = io.BytesIO()
    photo.save(encoded, "JPEG", exif=exif, icc_profile=b"profile")
    sent = Image.open(io.BytesIO(read_bytes(Image.open(encoded))))
    assert sent.getexif()[0x0112] == 6
    assert sent.info["icc_profile"] == b"profile"
