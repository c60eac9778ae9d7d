"""The error names the format of a file that is not accepted."""

from __future__ import annotations

import base64
import gzip
from io import BytesIO

import photos
import pytest
from PIL import Image

from img2img_server.api.convert_service import capabilities
from img2img_server.domain.params import Limits
from img2img_server.domain.violations import Reason
from img2img_server.imaging.base import InvalidImageError
from img2img_server.imaging.formats import format_name
from img2img_server.imaging.prepare import check_image
from img2img_server.settings import Settings

IMAGE = Image.fromarray(photos.quadrants())
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head><body></body></html>"


def brand(name: bytes, *others: bytes) -> bytes:
    brands = name + bytes(4) + b"".join(others)
    return (8 + len(brands)).to_bytes(4, "big") + b"ftyp" + brands + bytes(40)


def jpeg_xl() -> bytes:
    return b"\xff\x0a" + bytes(30)


CASES: list[tuple[bytes, str]] = [
    (b"", "an empty file"),
    (b"  \n\n ", "only white space"),
    (photos.saved(IMAGE, "GIF"), "a GIF image"),
    (photos.saved(IMAGE, "BMP"), "a BMP image"),
    (photos.saved(IMAGE, "TIFF"), "a TIFF image"),
    (photos.saved(IMAGE, "AVIF"), "an AVIF image"),
    (photos.saved(IMAGE, "JPEG2000"), "a JPEG 2000 image"),
    (photos.saved(IMAGE, "JPEG2000", no_jp2=True), "a JPEG 2000 image"),
    (photos.saved(IMAGE, "ICO"), "an ICO icon"),
    (photos.saved(IMAGE, "ICNS"), "an ICNS icon"),
    (photos.saved(IMAGE, "PDF"), "a PDF document"),
    (photos.saved(IMAGE, "EPS"), "a PostScript document"),
    (photos.saved(IMAGE, "PPM"), "a PNM image"),
    (photos.saved(IMAGE, "DDS"), "a DDS texture"),
    (photos.saved(IMAGE, "QOI"), "a QOI image"),
    (b"8BPS\0\x01" + bytes(30), "a Photoshop document"),
    (brand(b"heic", b"mif1"), "a HEIC image"),
    (brand(b"mif1", b"heic"), "a HEIC image"),
    (brand(b"mif1", b"avif"), "an AVIF image"),
    (brand(b"mif1"), "a HEIF image"),
    (brand(b"avis"), "an AVIF image"),
    (brand(b"crx "), "a Canon raw image"),
    (brand(b"isom", b"mp42"), "an MP4 video"),
    (brand(b"qt  "), "a QuickTime video"),
    (jpeg_xl(), "a JPEG XL image"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL image"),
    (b"RIFF\x10\0\0\0AVI LIST", "an AVI video"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG image"),
    (b'<?xml version="1.0"?>\n<!-- x --><svg width="1"/>', "an SVG image"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an XML document"),
    (HTML, "an HTML page"),
    (b"\xef\xbb\xbf \n" + HTML.lower(), "an HTML page"),
    (b"<html lang=en>", "an HTML page"),
    (HTML.decode().encode("utf-16"), "an HTML page"),
    (b'{"error": "not found"}', "JSON text"),
    (b"[1, 2]", "JSON text"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n", "a Git LFS pointer"),
    (base64.b64encode(photos.jpeg()), "base64 text of a JPEG image"),
    (base64.encodebytes(photos.saved(IMAGE, "PNG")), "base64 text of a PNG image"),
    (base64.urlsafe_b64encode(photos.saved(IMAGE, "WEBP")), "base64 text of a WebP image"),
    (b"data:image/png;base64,iVBORw0KGgo=", "a data URI that cannot be decoded"),
    (b"https://example.com/cat.png", "the text of a URL"),
    ("Größe unbekannt".encode(), "plain text"),
    (gzip.compress(photos.jpeg()), "gzip-compressed data"),
    (b"PK\x03\x04" + bytes(30), "a ZIP archive"),
    (bytes(64), "an unknown file format"),
    (b"\x93\xfa\x96\x7b\x8c\xea" * 9, "an unknown file format"),
]


@pytest.mark.parametrize(("data", "name"), CASES, ids=[f"{n}-{c[1]}" for n, c in enumerate(CASES)])
def test_the_format_is_named(data: bytes, name: str) -> None:
    with pytest.raises(InvalidImageError) as caught:
        check_image(data, width=512, height=512, limits=Limits())

    found = caught.value.violation
    assert (found.field, found.reason) == ("init_image", Reason.INVALID_IMAGE)
    assert found.cause.startswith(f"the data is {name}")
    assert "; send a PNG, JPEG or WebP image" in found.cause


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_other_image_format_that_pillow_writes_is_refused() -> None:
    refused = 0
    for container in sorted(set(Image.SAVE) - {"PNG", "JPEG", "WEBP", "MPO"}):
        file = BytesIO()
        try:
            IMAGE.save(file, container)
        except (OSError, ValueError, KeyError, AttributeError):
            continue  # Pillow cannot write these formats from RGB without another library.
        with pytest.raises(InvalidImageError) as caught:
            check_image(file.getvalue(), width=512, height=512, limits=Limits())
        assert caught.value.violation.reason == Reason.INVALID_IMAGE
        assert format_name(file.getvalue()), container
        refused += 1
    assert refused > 10


def test_capabilities_list_the_accepted_formats() -> None:
    found = capabilities(Settings(), Limits(), [], []).limits

    assert found.init_image_media_types == ["image/png", "image/jpeg", "image/webp"]
    assert found.max_image_pixels == 64_000_000


def test_apples_variant_of_png_is_named() -> None:
    data = photos.png(8, 8, bytes(200))
    data = data[:8] + photos.png_chunk(b"CgBI", b"P\0 \x02") + data[8:]

    with pytest.raises(InvalidImageError) as caught:
        check_image(data, width=512, height=512, limits=Limits())
    assert "CgBI" in caught.value.violation.cause
