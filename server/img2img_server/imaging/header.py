"""Reads the structure of PNG, JPEG and WebP files without decoding a pixel.

The decoders get only the parts of a file that hold pixels, so damaged metadata never makes an image
unusable, and size and number of parts are known before decoding.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from operator import mul
from typing import NamedTuple

from img2img_server.imaging.png import PNG_SIGNATURE, png_chunk

# Limit of chunks, segments and fill bytes in a file. A PNG of 20 MB in chunks of 4 KiB has 5,000.
MAX_PARTS = 10_000
# A scan costs a walk over all blocks even when it holds a few bytes, so their number bounds the
# time of a progressive JPEG. Encoders write about ten.
MAX_JPEG_SCANS = 64
# Metadata chunks of WebP and their flags in its extended header.
_WEBP_METADATA = {b"ICCP": 0x20, b"EXIF": 0x08, b"XMP ": 0x04}
JPEG_END = b"\xff\xd9"
PNG_TEXTS_ABOUT_PIXELS = (b"exif", b"Raw profile type exif", b"XML:com.adobe.xmp")
Part = tuple[bytes, bytes]  # kind and content of a metadata block


class HeaderError(Exception):
    """The file breaks its format or a bound. The text is a clause about the image."""


class Container(Enum):
    """Accepted file formats, by name and media type."""

    PNG = "PNG", "image/png"
    JPEG = "JPEG", "image/jpeg"
    WEBP = "WebP", "image/webp"

    def __init__(self, title: str, media_type: str) -> None:
        self.title = title
        self.media_type = media_type


class JpegFrame(NamedTuple):
    """The scans of a JPEG, as its headers describe them.

    Attributes:
        marker: The last byte of its SOF marker, 0xC0 to 0xCF, which names the coding.
        components: One identifier each.
        samples: Samples of a pixel: 3 where colours have full resolution, 1.5 where they have half.
        first_scan: The offset of the first scan in Header.data.
    """

    marker: int
    components: bytes
    samples: float = 0.0
    first_scan: int = 0

    @property
    def progressive(self) -> bool:
        """Whether each scan refines the image or one component of it."""
        return self.marker & 3 == 2

    @property
    def lossless(self) -> bool:
        """Whether the image is coded without a transform, so that it cannot be decoded at a lower
        resolution.
        """
        return self.marker & 3 == 3

    @property
    def arithmetic(self) -> bool:
        """Whether the image is arithmetic-coded: encoders may then leave out final zero bits."""
        return self.marker >= 0xC8


class PngFormat(NamedTuple):
    """How a PNG stores its rows. `rows`: all compressed rows, a part of Header.data."""

    depth: int
    colour: int
    interlaced: bool
    rows: memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The structure of an image file.

    Attributes:
        data: A file of the same format that holds the parts for the pixels of the first frame.
        metadata: The blocks with orientation and colour profile, in file order.
        colour_key: The colour that is transparent in a PNG of 16-bit RGB, which Pillow cannot
            compare; other keys are in data.
    """

    container: Container
    width: int
    height: int
    data: bytes = b""
    metadata: tuple[Part, ...] = ()
    jpeg: JpegFrame | None = None
    png: PngFormat | None = None
    colour_key: tuple[int, ...] | None = None

    @property
    def pixels(self) -> int:
        return self.width * self.height


def container_of(data: bytes) -> Container | None:
    """Returns the accepted format of a file with these first bytes, else None."""
    if data.startswith(PNG_SIGNATURE):
        return Container.PNG
    if data.startswith(b"\xff\xd8\xff"):
        return Container.JPEG
    return Container.WEBP if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def read_header(data: bytes) -> Header:
    """Reads the structure of an image file.

    Raises:
        HeaderError: neither PNG, JPEG nor WebP, cut before its pixels, or with impossible values.
    """
    try:
        match container_of(data):
            case Container.PNG:
                header = _read_png(data)
            case Container.JPEG:
                header = _read_jpeg(data)
            case Container.WEBP:
                header = _read_webp(data)
            case None:
                raise HeaderError("its format is unknown")
    except (struct.error, IndexError) as error:
        raise HeaderError("it is cut off") from error
    if not header.pixels:
        raise HeaderError("it has no pixels")
    return header


def _read_png(data: bytes) -> Header:
    """Reads chunks: length (4 bytes, big-endian), type (4), content, CRC-32 (4); IHDR first.

    The contents of all IDAT chunks are joined. Of an animated PNG the default image stays;
    its other frames (fdAT) are dropped. A missing IEND is no fault, for the rows are counted.
    """
    kind, width, height, depth, colour, method, filters, interlace = struct.unpack_from(
        ">4sII5B", data, 12
    )
    if kind == b"CgBI":
        raise HeaderError("it is in Apple's private variant of PNG (CgBI)")
    if kind != b"IHDR" or (method, filters) != (0, 0) or interlace > 1:
        raise HeaderError("its IHDR chunk is invalid")
    kept, rows = [PNG_SIGNATURE], []
    metadata: dict[Part, bytes] = {}
    colour_key = None
    offset = len(PNG_SIGNATURE)
    for _ in range(MAX_PARTS):
        if offset + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, offset)
        content, end = data[offset + 8 : offset + 8 + length], offset + 12 + length
        if kind == b"IDAT":
            rows.append(content)
        elif kind == b"IEND" or end > len(data):
            break
        elif kind in (b"IHDR", b"PLTE", b"tRNS"):
            if png_chunk(kind, content) != data[offset:end]:
                raise HeaderError(f"its {kind.decode()} chunk is damaged")
            if kind == b"tRNS" and (depth, colour) == (16, 2):
                colour_key = struct.unpack(">3H", content) if length == 6 else None
            else:
                kept.append(_pixel_chunk(kind, content, depth, colour))
        elif kind in (b"eXIf", b"iCCP", b"tEXt", b"zTXt", b"iTXt"):
            keyword = content[:80].split(b"\0")[0] if kind in (b"tEXt", b"zTXt", b"iTXt") else b""
            if not keyword or keyword in PNG_TEXTS_ABOUT_PIXELS:
                # If there are several, the last one counts, as in Pillow.
                metadata.pop((kind, keyword), None)
                metadata[kind, keyword] = content
        offset = end
    else:
        raise HeaderError(f"it has more than {MAX_PARTS} chunks")
    start = sum(map(len, kept)) + 8
    kept += [png_chunk(b"IDAT", b"".join(rows)), png_chunk(b"IEND", b"")]
    file = b"".join(kept)
    packed = memoryview(file)[start : start + sum(map(len, rows))]
    return Header(
        container=Container.PNG,
        width=width,
        height=height,
        data=file,
        metadata=tuple((kind, content) for (kind, _), content in metadata.items()),
        png=PngFormat(depth, colour, bool(interlace), packed),
        colour_key=colour_key,
    )


def _pixel_chunk(kind: bytes, content: bytes, depth: int, colour: int) -> bytes:
    """Returns the chunk as Pillow needs it, empty where it has no meaning.

    Colour keys are values of the file's own depth. Pillow compares them with what it makes of the
    pixels: 2- and 4-bit grey is stretched to 8 bits.
    """
    if kind == b"PLTE":
        content = content[: 3 * 256]
    elif kind == b"tRNS" and colour == 3:
        content = content[:256]
    elif kind == b"tRNS":
        wanted = {0: 2, 2: 6}.get(colour)
        if len(content) != wanted:
            return b""
        top = (1 << depth) - 1
        stretch = 255 // top if depth in (2, 4) else 1
        values = struct.unpack(f">{wanted // 2}H", content)
        content = struct.pack(f">{wanted // 2}H", *((value & top) * stretch for value in values))
    return png_chunk(kind, content)


def _read_jpeg(data: bytes) -> Header:
    """Reads segments: 0xFF, marker, length (2 bytes, big-endian, counts itself), content; scans.

    APP0 (JFIF) and APP14 (Adobe: colour transform) define how to read the pixels; other
    application segments and comments are dropped. The end marker is added, in case it is
    missing: completeness.py and the decoder find missing scans.
    """
    kept, metadata = [data[:2]], []
    header = Header(container=Container.JPEG, width=0, height=0)
    for marker, start, end in _jpeg_segments(data):
        content = data[start + 4 : end]
        if marker == 0xDA:
            kept += [data[start:], JPEG_END]
            break
        if marker == 0xF7:
            raise HeaderError("it is a JPEG-LS image")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if header.jpeg:
                raise HeaderError("it has two frame headers")
            bits, height, width, count = struct.unpack_from(">BHHB", content)
            if bits != 8:
                raise HeaderError(f"it has {bits} bits for each sample, not 8")
            frame = JpegFrame(
                marker, content[6 : 6 + 3 * count : 3], _samples(content[7 : 6 + 3 * count : 3])
            )
            header = replace(header, width=width, height=height, jpeg=frame)
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            metadata.append((b"exif", content[6:]))
        elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            metadata.append((b"xmp", content))
        elif marker == 0xE2 and content.startswith(b"ICC_PROFILE\0"):
            metadata.append((b"icc", content[12:]))
        elif (not 0xE1 <= marker <= 0xEF or marker == 0xEE) and marker != 0xFE:
            kept.append(data[start:end])
    if header.jpeg is None:
        raise HeaderError("it has no frame header")
    first_scan = sum(map(len, kept[:-2]))
    return replace(
        header,
        data=b"".join(kept),
        metadata=tuple(metadata),
        jpeg=header.jpeg._replace(first_scan=first_scan),
    )


def _samples(factors: bytes) -> float:
    """Returns the samples of a pixel, given the sampling factors of the components: horizontal and
    vertical, 4 bits each.
    """
    across, down = [byte >> 4 for byte in factors], [byte & 0xF for byte in factors]
    most = max(across, default=0) * max(down, default=0)
    return sum(map(mul, across, down)) / most if most else float(len(factors))


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields marker, start and end of each segment up to the first scan (0xDA)."""
    offset = 2
    for _ in range(MAX_PARTS):
        start = data.find(b"\xff", offset)  # Decoders skip stray bytes between segments.
        if start < 0:
            raise HeaderError("it has no scan")
        marker = data[start + 1]
        if marker in (0x00, 0xFF):  # This byte is a stray or a fill byte.
            offset = start + 1
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:
            # These markers have no length and no content.
            offset = start + 2
        elif marker == 0xD9:
            raise HeaderError("it has no scan")
        else:
            (length,) = struct.unpack_from(">H", data, start + 2)
            offset = start + 2 + length
            if length < 2 or offset > len(data):
                raise HeaderError("it is cut off")
            yield marker, start, offset
    raise HeaderError(f"it has more than {MAX_PARTS} segments")


def _read_webp(data: bytes) -> Header:
    """Reads RIFF chunks: type (4 bytes), length (4, little-endian), content, padded to even length.

    The canvas size is in VP8X when there is one, otherwise in the image's own chunk. The first
    image or animation frame is kept; what comes after it may be cut off.
    """
    size: tuple[int, int] | None = None
    kept: list[bytes] = []
    metadata: list[Part] = []
    has_image, flags, offset = False, 0, 12
    limit = min(len(data), 8 + int.from_bytes(data[4:8], "little"))
    for _ in range(MAX_PARTS):
        if offset + 8 > limit:
            break
        kind, length = struct.unpack_from("<4sI", data, offset)
        content = data[offset + 8 : offset + 8 + length]
        if size is None:
            size = _webp_size(kind, content)
        if kind == b"VP8X":
            flags = content[0]
            without = flags & ~sum(_WEBP_METADATA.values())
            kept.append(_webp_chunk(kind, bytes([without]) + content[1:]))
        elif kind in (b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF") and not has_image:
            if len(content) < length:
                raise HeaderError("it is cut off")
            kept.append(_webp_chunk(kind, content))
            has_image = kind in (b"VP8 ", b"VP8L", b"ANMF")
        elif flags & _WEBP_METADATA.get(kind, 0) and len(content) == length:
            metadata.append((kind, content))
        offset += 8 + length + length % 2
    else:
        raise HeaderError(f"it has more than {MAX_PARTS} chunks")
    if size is None or not has_image:
        raise HeaderError("it is cut off")
    body = b"WEBP" + b"".join(kept)
    return Header(
        container=Container.WEBP,
        width=size[0],
        height=size[1],
        data=b"RIFF" + struct.pack("<I", len(body)) + body,
        metadata=tuple(metadata),
    )


def _webp_chunk(kind: bytes, content: bytes) -> bytes:
    padding = b"\0" * (len(content) % 2)
    return kind + struct.pack("<I", len(content)) + content + padding


def _webp_size(kind: bytes, content: bytes) -> tuple[int, int]:
    if kind == b"VP8X":  # flags and reserved (4 bytes), width - 1 (3), height - 1 (3)
        width, height = content[4:7], content[7:10]
        if len(height) < 3:
            raise HeaderError("it is cut off")
        return int.from_bytes(width, "little") + 1, int.from_bytes(height, "little") + 1
    if kind == b"VP8L":  # signature (1 byte), then width - 1 and height - 1 in 14 bits each
        (bits,) = struct.unpack_from("<I", content, 1)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":  # frame tag (3 bytes), start code (3), 14 bits each of width and height
        width, height = struct.unpack_from("<HH", content, 6)
        return width & 0x3FFF, height & 0x3FFF
    raise HeaderError("it holds no image")
