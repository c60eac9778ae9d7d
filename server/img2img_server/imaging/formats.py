"""Names the format of data that is not an accepted image, for the error message."""

from __future__ import annotations

import base64
import re

from img2img_server.domain.data_uris import NO_IMAGE

# (offset of the magic bytes, magic bytes, name)
_MAGIC: tuple[tuple[int, bytes, str], ...] = (
    (0, b"GIF87a", "a GIF image"),
    (0, b"GIF89a", "a GIF image"),
    (8, b"CR\x02\0", "a Canon raw image"),
    (0, b"II*\0", "a TIFF image"),
    (0, b"MM\0*", "a TIFF image"),
    (0, b"II+\0", "a TIFF image"),
    (0, b"MM\0+", "a TIFF image"),
    (0, b"II\xbc", "a JPEG XR image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (0, b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (0, b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (0, b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"\0\0\x01\0", "an ICO icon"),
    (0, b"\0\0\x02\0", "a CUR cursor"),
    (0, b"icns", "an ICNS icon"),
    (0, b"qoif", "a QOI image"),
    (0, b"DDS ", "a DDS texture"),
    (0, b"v/1\x01", "an OpenEXR image"),
    (0, b"#?RADIANCE", "a Radiance HDR image"),
    (0, b"#?RGBE", "a Radiance HDR image"),
    (0, b"gimp xcf", "a GIMP document"),
    (0, b"FLIF", "a FLIF image"),
    (0, b"BPG\xfb", "a BPG image"),
    (0, b"\x8aMNG\r\n\x1a\n", "an MNG animation"),
    (0, b"\x8bJNG\r\n\x1a\n", "a JNG image"),
    (0, b"FUJIFILMCCD-RAW", "a Fujifilm raw image"),
    (0, b"%PDF-", "a PDF document"),
    (0, b"%!PS", "a PostScript document"),
    (0, b"\xc5\xd0\xd3\xc6", "a PostScript document"),
    (0, b"\xd7\xcd\xc6\x9a", "a WMF image"),
    (40, b" EMF", "an EMF image"),
    (8, b"AVI ", "an AVI video"),
    (8, b"WAVE", "a WAV sound"),
    (0, b"\x1aE\xdf\xa3", "a Matroska or WebM video"),
    (0, b"OggS", "an Ogg file"),
    (0, b"ID3", "an MP3 sound"),
    (0, b"PK\x03\x04", "a ZIP archive or an Office document"),
    (0, b"\xd0\xcf\x11\xe0", "an Office document"),
    (0, b"\x1f\x8b", "gzip-compressed data"),
    (0, b"\x28\xb5\x2f\xfd", "zstd-compressed data"),
    (0, b"BZh", "bzip2-compressed data"),
    (0, b"\xfd7zXZ", "xz-compressed data"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!", "a RAR archive"),
)
# Brands of ISO base media files, by the beginning of the brand.
_BRANDS = (
    (b"avi", "an AVIF image"),
    (b"hei", "a HEIC image"),
    (b"hev", "a HEIC image"),
    (b"mif1", "a HEIF image"),
    (b"msf1", "a HEIF image"),
    (b"jxl", "a JPEG XL image"),
    (b"crx", "a Canon raw image"),
    (b"qt", "a QuickTime video"),
)
_BITMAP_HEADER_BYTES = (12, 40, 52, 56, 64, 108, 124)
_ACCEPTED = (
    (b"\x89PNG", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"RIFF", "WebP"),
    (b"GIF8", "GIF"),
)
_TEXT_BYTES = 1024
PLAIN_TEXT = "plain text, not an image"
_BASE64 = re.compile(rb"[A-Za-z0-9+/_-]{16,}={0,2}")
_HTML = re.compile(rb"<!doctype html|<html|<head|<body|<script|<title|<meta ")
_PNM = re.compile(rb"P[1-7]\s")


def format_name(data: bytes) -> str:
    """Returns the kind of the data as a noun phrase: "a GIF image", "an HTML page"."""
    if not data or data == NO_IMAGE:
        return "an empty file"
    for offset, magic, name in _MAGIC:
        if data.startswith(magic, offset):
            return name
    if data[4:8] == b"ftyp":
        return _iso_media(data)
    if data[:2] == b"BM" and int.from_bytes(data[14:18], "little") in _BITMAP_HEADER_BYTES:
        return "a BMP image"
    if _PNM.match(data):
        return "a PNM image"
    return _text(data) or "an unknown file format"


def _iso_media(data: bytes) -> str:
    size = min(int.from_bytes(data[:4], "big"), 64)
    brands = [data[8:12], *(data[at : at + 4] for at in range(16, size, 4))]
    # The first brand that is more specific than "some HEIF image" names the format.
    names = [name for brand in brands for start, name in _BRANDS if brand.startswith(start)]
    exact = [name for name in names if name != "a HEIF image"]
    return next(iter(exact + names), "an MP4 video")


def _text(data: bytes) -> str:
    """Returns the kind of a text, or "" if the data is no text."""
    start = data[:_TEXT_BYTES]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16
        start = start.decode("utf-16", errors="replace").encode()
    start = start.removeprefix(b"\xef\xbb\xbf").strip()
    if not start:
        return "only white space"
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]", start):
        return ""
    lower = start.lower()
    if lower.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a Git LFS pointer, not the file that it stands for"
    if lower.startswith(b"data:"):
        return "a data URI that cannot be decoded"
    if lower.startswith((b"http://", b"https://")):
        return "the text of a URL, not an image"
    if lower.startswith(b"<"):
        return _markup(lower)
    if lower.startswith((b"{", b"[")):
        return "JSON text, not an image"
    if found := _BASE64.match(re.sub(rb"\s", b"", start)):
        return _base64(found[0])
    return "" if _is_binary(start) else PLAIN_TEXT


def _markup(lower: bytes) -> str:
    if b"<svg" in lower:
        return "an SVG image"
    return "an HTML page, not an image" if _HTML.search(lower) else "an XML document, not an image"


def _base64(text: bytes) -> str:
    text = text.rstrip(b"=").replace(b"-", b"+").replace(b"_", b"/")
    decoded = base64.b64decode(text[: len(text) // 4 * 4])
    for magic, name in _ACCEPTED:
        if decoded.startswith(magic):
            return f"base64 text of a {name} image, damaged or not decoded"
    return PLAIN_TEXT


def _is_binary(start: bytes) -> bool:
    try:
        start.decode()
    except UnicodeDecodeError as error:
        return error.start < len(start) - 4  # The cut at the sample's end may split a character.
    return False
