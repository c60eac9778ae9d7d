"""Compares the image check with Pillow: complete files are accepted with Pillow's pixels, and
truncated files are rejected.

TEST_EXAMPLES sets the number of examples of each test, see CONTRIBUTING.md.
"""

from __future__ import annotations

import os
import zlib
from typing import Any

import imagecodecs
import numpy as np
import numpy.typing as npt
import photos
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image

from img2img_server.domain.params import Limits
from img2img_server.imaging.base import InvalidImageError
from img2img_server.imaging.completeness import INFLATED_BYTES, check_scans
from img2img_server.imaging.header import MAX_JPEG_SCANS, HeaderError, read_header
from img2img_server.imaging.prepare import check_image, prepare_image

Array = npt.NDArray[Any]
EXAMPLES = int(os.environ.get("TEST_EXAMPLES", "40"))
examples = settings(
    max_examples=EXAMPLES,
    derandomize="TEST_EXAMPLES" not in os.environ,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# Rows that end just before, at and after a block of the unpacker, with pixels of one byte and of
# more.
EDGE_SIZES = [
    (INFLATED_BYTES // rows + more, rows) for rows in (1, 64, 512) for more in (-2, -1, 0)
]
SIZES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 400), st.integers(1, 300)),
    st.sampled_from([(512, 512), (1024, 1024), (1, 1), (1, 500), (500, 1)]),
)
PNG_SIZES = SIZES | st.sampled_from(EDGE_SIZES)
CONTENTS = st.sampled_from(["flat", "zero", "full", "stripes", "gradient", "noise", "spots"])


def content(kind: str, seed: int, width: int, height: int, channels: int, top: int) -> Array:
    """Draws values from 0 to top: height x width x channels."""
    random = np.random.default_rng(seed)
    shape = (height, width, channels)
    match kind:
        case "zero" | "full":
            values = np.full(shape, 0 if kind == "zero" else top)
        case "flat":
            values = np.broadcast_to(random.integers(0, top + 1, channels), shape)
        case "stripes":
            values = np.broadcast_to(random.integers(0, top + 1, (1, width, channels)), shape)
        case "gradient":
            ramp = np.arange(height)[:, None, None] + np.arange(width)[None, :, None]
            values = (ramp * random.integers(1, 5) + np.arange(channels)) % (top + 1)
        case "noise":
            values = random.integers(0, top + 1, shape)
        case _:
            values = np.zeros(shape, int)
            places = random.random((height, width)) < 0.01
            values[places] = random.integers(0, top + 1, channels)
    return values.astype(np.uint16 if top > 255 else np.uint8)


def accepted(data: bytes, size: tuple[int, int]) -> Array:
    """Returns the pixels of a file that the check must accept."""
    width, height = size
    check_image(data, width=256, height=256, limits=Limits())
    return prepare_image(data, width=width, height=height)


def is_accepted(data: bytes) -> bool:
    try:
        check_image(data, width=256, height=256, limits=Limits())
    except InvalidImageError:
        return False
    return True


def pillow(data: bytes) -> Array:
    """Returns the pixels by Pillow alone: opened, and on white where transparent."""
    with photos.opened(data) as image:
        image.load()
        if image.mode == "I;16":
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            layer = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer)
        return np.asarray(image.convert("RGB"))


def difference(one: Array, other: Array) -> int:
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


PNG_KINDS = [(0, depth) for depth in (1, 2, 4, 8, 16)] + [(3, depth) for depth in (1, 2, 4, 8)]
PNG_KINDS += [(colour, depth) for colour in (2, 4, 6) for depth in (8, 16)]
PNG_FILES = st.fixed_dictionaries(
    {
        "kind": st.sampled_from(PNG_KINDS),
        "size": PNG_SIZES,
        "content": CONTENTS,
        "seed": st.integers(0, 2**32),
        "interlaced": st.booleans(),
        "filters": st.sampled_from([(0,), (1,), (2,), (3,), (4,), (0, 1, 2, 3, 4)]),
        "level": st.integers(0, 9),
        "chunk_bytes": st.sampled_from([1, 7, 100, 8192, 2**20]),
        "transparent": st.sampled_from(["", "one", "other depth"]),
        "end": st.booleans(),
        "trailing": st.sampled_from([b"", b"\0" * 99, b"\xff\xd9 trailing"]),
    }
)


def png_file(made: dict[str, Any]) -> tuple[bytes, Array]:
    """Draws a PNG of any kind, and the values in it."""
    (colour, depth), (width, height) = made["kind"], made["size"]
    channels, top = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour], (1 << depth) - 1
    values = content(made["content"], made["seed"], width, height, channels, top)
    more: list[tuple[bytes, bytes]] = []
    if colour == 3:
        palette = np.random.default_rng(made["seed"]).integers(0, 256, (top + 1, 3), np.uint8)
        more.append((b"PLTE", palette.tobytes()))
    if made["transparent"] and colour in (0, 2, 3):
        key = values[0, 0].astype(int)
        if made["transparent"] == "other depth":
            key = (key + 1) & top if colour != 3 else key
        more.append(
            (
                b"tRNS",
                bytes(range(255, 255 - min(top, 99), -1))
                if colour == 3
                else key.astype(">u2").tobytes(),
            )
        )
    data = photos.any_png(
        values,
        depth=depth,
        colour=colour,
        interlaced=made["interlaced"],
        filters=made["filters"],
        level=made["level"],
        chunk_bytes=max(made["chunk_bytes"], values.nbytes // 5000),
        more=tuple(more),
    )
    data = data if made["end"] else data[:-12]
    return data + (made["trailing"] if made["end"] else b""), values


def png_pixels(data: bytes, values: Array, made: dict[str, Any]) -> Array:
    """Returns the result by the specification: keys are compared at the file's own depth."""
    colour, depth = made["kind"]
    top = (1 << depth) - 1
    eight = values >> 8 if depth == 16 else values * (255 // top)
    match colour:
        case 3:
            return pillow(data)
        case 0 | 4:
            rgb = np.repeat(eight[..., :1], 3, -1)
        case _:
            rgb = eight[..., :3]
    alpha = np.full(values.shape[:2], 255)
    if colour in (4, 6):
        alpha = eight[..., -1]
    elif made["transparent"]:
        key = values[0, 0].astype(int)
        key = (key + 1) & top if made["transparent"] == "other depth" else key
        alpha = np.where((values == key).all(-1), 0, 255)
    return np.rint(255 + (rgb.astype(float) - 255) * alpha[..., None] / 255).astype(np.uint8)


@examples
@given(made=PNG_FILES)
def test_whole_png_files_are_accepted_with_the_pixels_that_they_hold(made: dict[str, Any]) -> None:
    data, values = png_file(made)

    pixels = accepted(data, made["size"])

    assert difference(pixels, png_pixels(data, values, made)) <= 1
    if not made["transparent"]:
        assert difference(pixels, pillow(data)) <= 1


@examples
@given(made=PNG_FILES, part=st.floats(0, 1), ended=st.booleans())
def test_png_files_without_all_rows_are_refused(
    made: dict[str, Any], part: float, ended: bool
) -> None:
    """The file is truncated, or its rows end early in an otherwise complete file."""
    data, _ = png_file(made | {"end": True, "trailing": b"", "chunk_bytes": 2**30})
    start = data.index(b"IDAT") + 4
    packed = data[start : start + int.from_bytes(data[start - 8 : start - 4], "big")]
    rows = zlib.decompress(packed)
    if ended:
        fewer = zlib.compress(rows[: min(int(len(rows) * part), len(rows) - 1)], made["level"])
        cut = data[: start - 8] + photos.png_chunk(b"IDAT", fewer) + data[start + len(packed) + 4 :]
        assert not is_accepted(cut)
        return
    end = start + int(len(packed) * part)
    unpacker = zlib.decompressobj()
    if len(unpacker.decompress(data[start:end])) < len(rows):
        assert not is_accepted(data[:end])
    elif unpacker.eof:
        assert is_accepted(data[:end])
    # If only a few bytes are missing, all rows may be there, and Pillow may or may not read the
    # last one.


JPEG_FILES = st.fixed_dictionaries(
    {
        "size": SIZES,
        "content": CONTENTS,
        "seed": st.integers(0, 2**32),
        "mode": st.sampled_from(["L", "RGB", "CMYK"]),
        "writer": st.sampled_from(["pillow", "imagecodecs"]),
        "quality": st.integers(1, 100),
        "subsampling": st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
        "progressive": st.booleans(),
        "optimize": st.booleans(),
        "restart": st.sampled_from([0, 0, 1, 7]),
        "end": st.booleans(),
        "trailing": st.sampled_from([b"", b"\0" * 99, b"\xff\xd8\xff\xe0 trailing"]),
    }
)


def jpeg_file(made: dict[str, Any]) -> bytes:
    width, height = made["size"]
    channels = {"L": 1, "RGB": 3, "CMYK": 4}[made["mode"]]
    values = content(made["content"], made["seed"], width, height, channels, 255)
    if made["writer"] == "imagecodecs" and made["mode"] != "CMYK":
        data = imagecodecs.jpeg8_encode(
            np.ascontiguousarray(values[..., 0] if channels == 1 else values),
            level=made["quality"],
            subsampling="444" if channels == 1 else made["subsampling"].replace(":", ""),
            optimize=made["optimize"],
        )
    else:
        image = Image.fromarray(values[..., 0]) if channels == 1 else None
        image = image or Image.frombytes(made["mode"], (width, height), values.tobytes())
        try:
            data = photos.saved(
                image,
                "JPEG",
                quality=made["quality"],
                subsampling=made["subsampling"],
                progressive=made["progressive"],
                optimize=made["optimize"],
                restart_marker_blocks=made["restart"],
            )
        except OSError:  # Many restart markers exceed Pillow's buffer.
            assume(False)
    return bytes(data)


@examples
@given(made=JPEG_FILES)
def test_whole_jpeg_files_are_accepted_with_pillows_pixels(made: dict[str, Any]) -> None:
    data = jpeg_file(made)
    written = data + made["trailing"] if made["end"] else data.removesuffix(b"\xff\xd9")

    assert difference(accepted(written, made["size"]), pillow(data)) <= 1


@examples
@given(made=JPEG_FILES, part=st.floats(0, 1), ended=st.booleans())
def test_jpeg_files_without_all_rows_are_refused(
    made: dict[str, Any], part: float, ended: bool
) -> None:
    """The file is truncated within the scans. An end marker after the cut does not make it
    valid.
    """
    if made["mode"] == "CMYK":
        # With other subsampling, missing bits are detected by the pixels that they change.
        made = made | {"subsampling": "4:4:4"}
    data = jpeg_file(made)
    first, last = data.index(b"\xff\xda"), data.rindex(b"\xff\xd9") - 1
    end = first + int((last - first) * part)
    # The cut may keep the 0xFF of a marker.
    next_segments = (data[end : end + 2], data[end - 1 : end + 1])
    whole_scans = made["progressive"] and {b"\xff\xc4", b"\xff\xda"}.intersection(next_segments)

    if ended and whole_scans:  # Fewer scans with an end marker are a coarser but complete image.
        return
    cut = data[:end] + (b"\xff\xd9" if ended else b"")
    assert not is_accepted(cut)


@examples
@given(
    size=SIZES,
    kind=CONTENTS,
    seed=st.integers(0, 2**32),
    mode=st.sampled_from(["RGB", "RGBA"]),
    lossless=st.booleans(),
    frames=st.integers(1, 3),
    extended=st.booleans(),
    trailing=st.sampled_from([b"", b"\0" * 99]),
    part=st.floats(0, 0.999),
)
def test_webp_files_are_accepted_whole_and_refused_cut(
    size: tuple[int, int],
    kind: str,
    seed: int,
    mode: str,
    lossless: bool,
    frames: int,
    extended: bool,
    trailing: bytes,
    part: float,
) -> None:
    channels = len(mode)
    images = [
        Image.fromarray(content(kind, seed + frame, *size, channels, 255))
        for frame in range(frames)
    ]
    options: dict[str, Any] = {"exif": photos.exif(1)} if extended else {}
    if frames > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    data = photos.saved(images[0], "WEBP", lossless=lossless, method=0, **options)

    assert difference(accepted(data + trailing, size), pillow(data)) <= 1
    if frames == 1 and not extended:
        assert not is_accepted(data[: int((len(data) - 2) * part)])


@examples
@given(data=st.data(), container=st.sampled_from(["PNG", "JPEG", "WEBP"]))
def test_damaged_files_are_accepted_or_refused_but_never_an_error(
    data: st.DataObject, container: str
) -> None:
    file = bytearray(photos.saved(photos.photo(64, 64), container, exif=photos.exif(6)))
    for _ in range(data.draw(st.integers(1, 5))):
        file[data.draw(st.integers(0, len(file) - 1))] = data.draw(st.integers(0, 255))
    if is_accepted(bytes(file)):
        assert prepare_image(bytes(file), width=64, height=64).shape == (64, 64, 3)


@pytest.mark.parametrize("hidden", [b"\xff\xd9", b"\xff\xda", b"\xff\xff\xda"])
def test_no_segment_between_scans_hides_scans_from_the_bound(hidden: bytes) -> None:
    comment = b"\xff\xfe" + (2 + len(hidden)).to_bytes(2, "big") + hidden

    few = photos.many_scans_jpeg(MAX_JPEG_SCANS - 20, between=comment)
    many = photos.many_scans_jpeg(MAX_JPEG_SCANS, between=comment)

    assert is_accepted(few)
    assert not is_accepted(many)


def test_a_reserved_marker_hides_no_scans_from_the_bound() -> None:
    many = photos.many_scans_jpeg(MAX_JPEG_SCANS)
    start = many.index(b"\xff\xda", many.index(b"\xff\xda") + 1)
    hidden = b"\xff\x02\xff\xff" + (many[start:-2] * 9)[: 0xFFFF - 2]
    data = photos.many_scans_jpeg(0)[:-2] + hidden + b"\xff\xd9"

    with pytest.raises(HeaderError, match="marker between its scans"):
        check_scans(read_header(data))
