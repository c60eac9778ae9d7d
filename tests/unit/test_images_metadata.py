"""EXIF orientation is applied for every place and type that Pillow reads."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import numpy.typing as npt
import photos
import pytest
from PIL import ImageOps

from img2img_server.domain.params import Limits
from img2img_server.imaging.metadata import MAX_EXIF_BYTES
from img2img_server.imaging.prepare import check_image, prepare_image

Pixels = npt.NDArray[np.uint8]
SIDEWAYS = 6
SHORT, LONG, RATIONAL, BYTE, ASCII, SIGNED, DOUBLE = 3, 4, 5, 1, 2, 9, 12


def block(
    kind: int = SHORT, count: int = 1, order: str = "<", value: int = SIDEWAYS, before: int = 0
) -> bytes:
    """Returns a TIFF block whose directory has some entries, followed by the orientation."""
    mark = b"II" if order == "<" else b"MM"
    entries = b"".join(struct.pack(f"{order}HHII", 0x0100, LONG, 1, 64) for _ in range(before))
    directory = 8 + 2 + 12 * (before + 1) + 4
    small = {
        SHORT: struct.pack(order + "HH", value, 0),
        BYTE: bytes([value, 0, 0, 0]),
        ASCII: b"%d\0\0\0" % value,
        LONG: struct.pack(order + "I", value),
        SIGNED: struct.pack(order + "i", value),
    }
    outside = {
        RATIONAL: struct.pack(order + "II", value, 1),
        DOUBLE: struct.pack(order + "d", value),
    }
    stored = small.get(kind) or struct.pack(order + "I", directory)
    entry = struct.pack(order + "HHI", 0x0112, kind, count) + stored[:4]
    head = mark + struct.pack(order + "HIH", 42, 8, before + 1)
    return head + entries + entry + bytes(4) + outside.get(kind, b"")


def xmp(text: str = 'tiff:Orientation="6"') -> bytes:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description '
        f"{text}/></rdf:RDF></x:xmpmeta>"
    ).encode()


def prepared(data: bytes) -> Pixels:
    """Returns the prepared image, at the size of the image that Pillow transposes."""
    with photos.opened(data) as image:
        size = ImageOps.exif_transpose(image).size
    check_image(data, width=256, height=256, limits=Limits())
    return prepare_image(data, width=size[0], height=size[1])


def as_pillow_shows_it(data: bytes) -> Pixels:
    with photos.opened(data) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def assert_turned(data: bytes) -> None:
    """Asserts that our code rotates the image as Pillow does."""
    expected = as_pillow_shows_it(data)
    assert expected.shape[:2] == (64, 32)  # The image is stored as 64x32.
    assert np.abs(prepared(data).astype(int) - expected).max() <= 1


def saved(container: str, **options: object) -> bytes:
    lossless = {"lossless": True} if container == "WEBP" else {}
    return photos.saved(photos.quadrants(), container, **lossless, **options)


def jpeg_with(*segments: bytes) -> bytes:
    data = photos.jpeg(photos.quadrants())
    parts = b"".join(b"\xff\xe1" + struct.pack(">H", len(each) + 2) + each for each in segments)
    return data[:2] + parts + data[2:]


def png_with(*chunks: tuple[bytes, bytes], at_end: bool = False) -> bytes:
    data = saved("PNG")
    place = len(data) - 12 if at_end else 33
    inserted = b"".join(photos.png_chunk(kind, content) for kind, content in chunks)
    return data[:place] + inserted + data[place:]


def webp_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """Returns a WebP with these chunks and an extended header that declares them."""
    data = saved("WEBP", exif=photos.exif(1))
    end = data.index(b"EXIF")
    flags = data.index(b"VP8X") + 8
    announced = data[8:flags] + bytes([data[flags] | 0x0C]) + data[flags + 1 : end]
    body = announced + b"".join(
        kind + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)
        for kind, content in chunks
    )
    return data[:4] + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [SHORT, LONG, SIGNED, RATIONAL, DOUBLE])
@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP"])
def test_every_type_of_number_that_pillow_reads_counts(
    container: str, kind: int, order: str
) -> None:
    assert_turned(saved(container, exif=b"Exif\0\0" + block(kind, order=order)))


@pytest.mark.parametrize("kind", [BYTE, ASCII])
@pytest.mark.parametrize("container", ["JPEG", "PNG", "WEBP"])
def test_what_pillow_does_not_read_as_a_number_does_not_turn_the_image(
    container: str, kind: int
) -> None:
    data = saved(container, exif=b"Exif\0\0" + block(kind))

    assert np.abs(prepared(data).astype(int) - as_pillow_shows_it(data)).max() <= 1


@pytest.mark.parametrize(
    "segments",
    [
        (b"Exif\0\0" + block(),),
        (b"http://ns.adobe.com/xap/1.0/\0" + xmp("other"), b"Exif\0\0" + block()),
        (b"Exif\0\0" + block(before=30)[:200], b"Exif\0\0" + block(before=30)[200:]),
        (b"http://ns.adobe.com/xap/1.0/\0" + xmp(),),
        (b"http://ns.adobe.com/xap/1.0/\0" + xmp("><tiff:Orientation>6</tiff:Orientation><a"),),
        (
            b"Exif\0\0" + block(kind=LONG, value=64)[:10] + bytes(20),
            b"http://ns.adobe.com/xap/1.0/\0" + xmp(),
        ),
    ],
    ids=["first", "second", "two halves", "xmp", "xmp element", "xmp after exif without it"],
)
def test_every_place_in_a_jpeg_counts(segments: tuple[bytes, ...]) -> None:
    assert_turned(jpeg_with(*segments))


RAW = b"\nexif\n%8d\n%s\n" % (len(block()) + 6, (b"Exif\0\0" + block()).hex().encode())


@pytest.mark.parametrize(
    ("kind", "content"),
    [
        (b"eXIf", block()),
        (b"eXIf", b"Exif\0\0" + block()),
        (b"tEXt", b"Raw profile type exif\0" + RAW),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(RAW)),
        (b"iTXt", b"Raw profile type exif\0\0\0\0\0" + RAW),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp()),
        (b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0" + zlib.compress(xmp())),
        (b"tEXt", b"XML:com.adobe.xmp\0" + xmp()),
        (b"tEXt", b"exif\0Exif\0\0" + block()),
    ],
)
@pytest.mark.parametrize("at_end", [False, True])
def test_every_place_in_a_png_counts(kind: bytes, content: bytes, at_end: bool) -> None:
    assert_turned(png_with((kind, content), at_end=at_end))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"EXIF", block()),
        (b"EXIF", b"Exif\0\0" + block()),
        (b"EXIF", b"Exif\0\0Exif\0\0" + block()),
        (b"XMP ", xmp()),
    ],
)
def test_every_place_in_a_webp_counts(chunk: tuple[bytes, bytes]) -> None:
    assert_turned(webp_with(chunk))


@pytest.mark.parametrize(
    "chunk",
    [
        (b"zTXt", b"Raw profile type exif\0\0" + b"not deflated"),
        (b"zTXt", b"Raw profile type exif\0\x09" + zlib.compress(RAW)),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2**26))),
        (b"tEXt", b"Raw profile type exif\0\nexif\n  3\nzz\n"),
        (b"iTXt", b"XML:com.adobe.xmp"),
        (b"tEXt", b"\0\0\0"),
        (b"eXIf", b"II*\0\xff\xff\xff\xff"),
    ],
)
def test_damaged_metadata_does_not_hide_the_sound_one(chunk: tuple[bytes, bytes]) -> None:
    sound = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp())
    if chunk[0] == b"eXIf" or chunk[1].startswith(
        b"XML"
    ):  # The place that Pillow reads first has no orientation, so the image is upright.
        assert prepared(png_with(chunk)).shape[:2] == (32, 64)
    else:
        data = png_with(chunk, sound)
        check_image(data, width=256, height=256, limits=Limits())
        upright = prepare_image(png_with(sound), width=32, height=64)
        assert (prepare_image(data, width=32, height=64) == upright).all()


def test_a_long_exif_block_is_read_at_its_beginning_only() -> None:
    # The entry has no data; the entries below refer to all of it.
    many = struct.pack("<HIIH", 42, 8, 0, 0)
    head = b"II*\0" + struct.pack("<IH", 8, 60_000)
    entry = struct.pack("<HHII", 0x9000, 7, 400_000, 8)
    bomb = head + entry * 60_000 + many
    assert len(bomb) > MAX_EXIF_BYTES
    data = png_with((b"eXIf", bomb))

    check_image(data, width=256, height=256, limits=Limits())
    assert prepare_image(data, width=64, height=32).shape == (32, 64, 3)
