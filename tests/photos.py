"""Creates images for tests: ordinary images, and every kind of invalid image."""

from __future__ import annotations

import base64
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
CAT = EXAMPLES / "cat.jpg"
COFFEE = EXAMPLES / "coffee.jpg"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
Pixels = npt.NDArray[np.uint8]


def photo(width: int = 512, height: int = 512, path: Path = COFFEE) -> Pixels:
    """Returns a real photo, cropped to the aspect ratio and resized: height x width x 3."""
    with Image.open(path) as image:
        cut = min(image.width / width, image.height / height)
        left, upper = (image.width - cut * width) / 2, (image.height - cut * height) / 2
        box = (left, upper, left + cut * width, upper + cut * height)
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box))


def quadrants(width: int = 64, height: int = 32) -> Pixels:
    """Returns red, green, blue and grey quarters, in reading order, which distinguish every
    rotation.
    """
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (128, 128, 128)
    return pixels


def saved(image: Image.Image | Pixels, container: str, **options: object) -> bytes:
    """Returns the file that Pillow writes. container: PNG, JPEG, WEBP, GIF, ..."""
    if not isinstance(image, Image.Image):
        image = Image.fromarray(image)
    with BytesIO() as file:
        image.save(file, container, **options)
        return file.getvalue()


def opened(data: bytes) -> Image.Image:
    """Returns the image that Pillow reads from a file."""
    return Image.open(BytesIO(data))


def jpeg(pixels: Pixels | None = None, quality: int = 95) -> bytes:
    """Returns a 4:4:4 JPEG, of the photo if no pixels are given."""
    return saved(photo() if pixels is None else pixels, "JPEG", quality=quality, subsampling=0)


def rotated_jpeg(pixels: Pixels, orientation: int) -> bytes:
    """Returns a JPEG that shows the pixels only after its EXIF orientation (1 to 8) is applied."""
    undo = {
        1: lambda p: p,
        2: np.fliplr,
        3: lambda p: np.rot90(p, 2),
        4: np.flipud,
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p, 1),
        7: lambda p: np.rot90(p, 2).swapaxes(0, 1),
        8: lambda p: np.rot90(p, -1),
    }
    stored = np.ascontiguousarray(undo[orientation](pixels))
    return saved(stored, "JPEG", quality=95, subsampling=0, exif=exif(orientation))


def exif(orientation: int) -> bytes:
    """Returns an EXIF block with only the orientation."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block.tobytes()


def cmyk_jpeg(pixels: Pixels) -> bytes:
    """Returns a CMYK JPEG as Photoshop writes it, with inverted inks."""
    return saved(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95, subsampling=0)


def animated_webp(first: Pixels, second: Pixels) -> bytes:
    """Returns a WebP with two lossless frames."""
    more = [Image.fromarray(second)]
    return saved(first, "WEBP", save_all=True, append_images=more, duration=100, lossless=True)


def png(
    width: int,
    height: int,
    rows: bytes,
    *,
    depth: int = 8,
    colour: int = 2,
    interlace: int = 0,
    more: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """Returns a PNG of unfiltered rows (each with its leading 0), with more chunks before the
    pixels.
    """
    header = struct.pack(">II5B", width, height, depth, colour, 0, 0, interlace)
    chunks = [(b"IHDR", header), *more, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(kind, content) for kind, content in chunks)


ADAM7 = (
    (0, 0, 8, 8),
    (4, 0, 8, 8),
    (0, 4, 4, 8),
    (2, 0, 4, 4),
    (0, 2, 2, 4),
    (1, 0, 2, 2),
    (0, 1, 1, 2),
)


def any_png(
    values: npt.NDArray[np.uint8] | npt.NDArray[np.uint16],
    *,
    depth: int,
    colour: int,
    interlaced: bool = False,
    filters: tuple[int, ...] = (0,),
    level: int = 1,
    chunk_bytes: int = 2**30,
    more: tuple[tuple[bytes, bytes], ...] = (),
) -> bytes:
    """Returns a PNG of height x width x channels values with this bit depth. Its rows use all
    filters in turn.
    """
    height, width, channels = values.shape
    step = max(1, depth * channels // 8)  # distance in bytes between a pixel and the next
    rows = b""
    for left, upper, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = values[upper::down, left::across]
        if part.size:
            rows += filtered(packed(part, depth), step, filters)
    stream = zlib.compress(rows, level)
    header = struct.pack(">II5B", width, height, depth, colour, 0, 0, int(interlaced))
    pieces = [stream[at : at + chunk_bytes] for at in range(0, len(stream), chunk_bytes)]
    chunks = [(b"IHDR", header), *more, *((b"IDAT", piece) for piece in pieces), (b"IEND", b"")]
    return PNG_SIGNATURE + b"".join(png_chunk(kind, content) for kind, content in chunks)


def packed(values: npt.NDArray[np.uint8] | npt.NDArray[np.uint16], depth: int) -> Pixels:
    """Returns the bytes of each row."""
    height = values.shape[0]
    if depth == 16:
        return np.ascontiguousarray(values, ">u2").view(np.uint8).reshape(height, -1)
    if depth == 8:
        return values.reshape(height, -1)
    bits = np.unpackbits(values.reshape(height, -1, 1), -1)[..., 8 - depth :]
    return np.packbits(bits.reshape(height, -1), -1)


def filtered(rows: Pixels, step: int, filters: tuple[int, ...]) -> bytes:
    """Yields each row with its filter type, as in section 9 of the PNG specification."""
    padded = np.pad(rows.astype(int), ((1, 0), (step, 0)))
    left, above, corner = padded[1:, :-step], padded[:-1, step:], padded[:-1, :-step]
    guess = left + above - corner
    distances = [abs(guess - other) for other in (left, above, corner)]
    paeth = np.where(
        (distances[0] <= distances[1]) & (distances[0] <= distances[2]),
        left,
        np.where(distances[1] <= distances[2], above, corner),
    )
    predicted = (np.zeros_like(left), left, above, (left + above) // 2, paeth)
    kinds = np.resize(filters, len(rows))
    chosen = np.choose(kinds[:, None], predicted)
    return np.hstack([kinds[:, None], rows - chosen]).astype(np.uint8).tobytes()


def png_chunk(kind: bytes, content: bytes) -> bytes:
    """Returns a chunk: length, type, content and checksum."""
    checksum = zlib.crc32(content, zlib.crc32(kind))
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def flat_png(width: int, height: int) -> bytes:
    """Returns a grey image of 1 bit a pixel: 70 megapixels are a file of 9 kB."""
    return png(width, height, bytes(height * (1 + (width + 7) // 8)), depth=1, colour=0)


def huge_png() -> bytes:
    """Returns a PNG of 70 megapixels in a few kilobytes, over the limit of pixels and under every
    limit of bytes.
    """
    return flat_png(10_000, 7_000)


def interlaced_png(width: int, height: int, missing_bytes: int = 0) -> bytes:
    """Returns a PNG of 8-bit grey 200 in the seven passes of Adam7."""
    starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))
    rows = b""
    for left, upper, across, down in (*starts, (0, 1, 1, 2)):
        columns = len(range(left, width, across))
        rows += (b"\0" + b"\xc8" * columns) * len(range(upper, height, down)) if columns else b""
    rows = rows[: len(rows) - missing_bytes]
    return png(width, height, rows, colour=0, interlace=1)


def lying_png(width: int, height: int) -> bytes:
    """Returns a PNG that declares width x height and has one row."""
    return png(width, height, bytes(1 + 3 * width))


def text_bomb() -> bytes:
    """Returns a PNG with a text chunk of 260 kB that unpacks to 256 MB."""
    return zlib.compress(bytes(2**28), 1)


def many_scans_jpeg(scans: int, between: bytes = b"") -> bytes:
    """Returns a progressive JPEG that repeats its first scan with its table."""
    data = saved(photo(64, 64), "JPEG", progressive=True)
    start, end = data.index(b"\xff\xc4"), data.rindex(b"\xff\xd9")
    first = data[start : data.index(b"\xff\xc4", data.index(b"\xff\xda"))]
    return data[:end] + (between + first) * scans + data[end:]


def separate_scans_jpeg(pixels: Pixels) -> bytes:
    """Returns a sequential JPEG with one scan for each component."""
    scans, head = [], b""
    for channel in range(3):
        grey = saved(Image.fromarray(np.ascontiguousarray(pixels[..., channel])), "JPEG")
        start, frame = grey.index(b"\xff\xda"), grey.index(b"\xff\xc0")
        scan = bytearray(grey[start : grey.rindex(b"\xff\xd9")])
        scan[5] = channel + 1  # the identifier of the component
        scans.append(bytes(scan))
        components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
        size = grey[frame + 4 : frame + 9]
        head = grey[:frame] + b"\xff\xc0\0\x11" + size + b"\x03" + components
        head += grey[frame + 2 + 11 : start]
    return head + b"".join(scans) + b"\xff\xd9"


def arithmetic_jpeg() -> bytes:
    """Returns an arithmetic-coded JPEG of 8x24 pixels by cjpeg, whose chroma has a third of the
    rows.
    """
    return base64.b64decode(
        "/9j/2wBDABsSFBcUERsXFhceHBsgKEIrKCUlKFE6PTBCYFVlZF9VXVtqeJmBanGQc1tdhbWGkJ6jq62rZ4C8ybqmx5mo"
        "q6T/2wBDARweHigjKE4rK06kbl1upKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSkpKSk"
        "pKT/yQARCAAYAAgDARMAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwD9ZpSRB35ScHtTMYu0wiHdmZo0NCNl"
        "JJaA/9k="
    )


def padded_png(size_bytes: int) -> bytes:
    """Returns a valid 8x8 image of exactly size_bytes, most of it in an ignored chunk."""
    plain = png(8, 8, bytes(8 * 25))
    padding = bytes(size_bytes - len(plain) - 12)
    return png(8, 8, bytes(8 * 25), more=((b"juNk", padding),))
