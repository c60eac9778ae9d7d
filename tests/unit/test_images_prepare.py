"""Init images: accepted and rejected files, and the resulting pixels."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor

import imagecodecs
import numpy as np
import numpy.typing as npt
import photos
import pytest
from PIL import Image, ImageOps

from img2img_server.domain.params import Limits
from img2img_server.domain.violations import Reason
from img2img_server.imaging import decode
from img2img_server.imaging.base import CheckedImage, InvalidImageError
from img2img_server.imaging.header import MAX_JPEG_SCANS, MAX_PARTS
from img2img_server.imaging.prepare import OWN_MAX_BYTES, OWN_MAX_PIXELS, check_image, prepare_image

LIMITS = Limits()
Size = tuple[int, int]
NOT_VALID, TOO_LARGE = Reason.INVALID_IMAGE, Reason.TOO_MANY_BYTES
TOO_MANY_PIXELS = Reason.TOO_MANY_PIXELS


def check(data: bytes, width: int = 512, height: int = 512) -> CheckedImage:
    return check_image(data, width=width, height=height, limits=LIMITS)


def refusal(data: bytes) -> str:
    with pytest.raises(InvalidImageError) as caught:
        check(data)
    return caught.value.violation.reason


def prepare(data: bytes, width: int, height: int) -> npt.NDArray[np.uint8]:
    pixels = prepare_image(data, width=width, height=height)
    assert pixels.shape == (height, width, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    return pixels


def differ(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> int:
    """Returns the largest difference of a channel."""
    assert one.shape == other.shape
    return int(np.abs(one.astype(int) - other.astype(int)).max())


@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP"])
def test_a_small_image_is_handed_on_as_it_came(container: str) -> None:
    data = photos.saved(photos.photo(), container)

    assert check(data) == CheckedImage(
        data=data, prepared=False, width=512, height=512, own_size=(512, 512)
    )


def test_an_image_over_512_kib_is_prepared_and_encoded_once_more() -> None:
    data = photos.saved(photos.photo(1024, 768), "PNG")
    assert len(data) > OWN_MAX_BYTES

    checked = check(data, 512, 256)

    assert checked.prepared
    with photos.opened(checked.data) as image:
        assert (image.format, image.size) == ("JPEG", (512, 256))
        assert image.layer[0][1:3] == image.layer[1][1:3]  # subsampling 4:4:4
    again = prepare_image(checked.data, width=512, height=256, prepared=True)
    assert np.mean(np.abs(again.astype(int) - prepare(data, 512, 256))) < 2


def test_a_small_file_of_many_pixels_is_prepared_so_that_no_worker_unpacks_it() -> None:
    data = photos.flat_png(5000, 4000)
    assert len(data) < OWN_MAX_BYTES
    assert OWN_MAX_PIXELS < 5000 * 4000

    checked = check(data)

    assert checked.prepared
    assert not prepare_image(checked.data, width=512, height=512, prepared=True).any()


def test_a_prepared_image_of_another_size_is_refused() -> None:
    with pytest.raises(InvalidImageError, match="is not a valid"):
        prepare_image(photos.jpeg(), width=512, height=504, prepared=True)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff\xd9",
        b"RIFF\x04\0\0\0WEBP",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%PDF-1.7",
        photos.saved(photos.quadrants(), "GIF"),
        photos.saved(photos.quadrants(), "BMP"),
        photos.saved(photos.quadrants(), "TIFF"),
        photos.saved(photos.quadrants(), "PPM"),
        photos.lying_png(64, 64),
        photos.png(0, 8, b""),
        photos.png(8, 0, b""),
        photos.png(8, 8, bytes(200), depth=3),
        photos.png(8, 8, bytes(200), colour=5),
        photos.png(8, 8, bytes(72), colour=3),  # The PNG has no palette.
        photos.png(8, 8, bytes(200)).replace(b"IDAT", b"IDAX"),
    ],
)
def test_what_is_no_image_of_an_accepted_format_is_refused(data: bytes) -> None:
    assert refusal(data) == NOT_VALID


@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("progressive", [False, True])
def test_an_image_cut_anywhere_is_refused(container: str, progressive: bool) -> None:
    data = photos.saved(photos.photo(96, 64), container, progressive=progressive)
    # A PNG ends with the checksums of its rows (4 bytes of zlib, 4 bytes of the chunk) and IEND (12
    # bytes).
    last = len(data) - (24 if container == "PNG" else 3)
    for end in [*range(0, last, len(data) // 60), last]:
        assert refusal(data[:end]) == NOT_VALID


@pytest.mark.parametrize("side", [256, 512, 513, 1024])
@pytest.mark.parametrize(
    ("mode", "colour"), [("RGB", "white"), ("RGBA", (0, 0, 0, 0)), ("L", 128), ("RGB", (9, 20, 31))]
)
def test_png_images_of_one_colour_are_accepted(mode: str, colour: object, side: int) -> None:
    data = photos.saved(Image.new(mode, (side, side), colour), "PNG")

    assert check(data).prepared is False


@pytest.mark.parametrize("progressive", [False, True])
def test_a_missing_end_marker_is_no_fault_when_all_rows_are_there(progressive: bool) -> None:
    jpeg = photos.saved(photos.photo(96, 64), "JPEG", progressive=progressive)
    png = photos.saved(photos.photo(96, 64), "PNG")

    assert differ(prepare(jpeg[:-2], 96, 64), prepare(jpeg, 96, 64)) == 0
    for end in (len(png) - 12, len(png) - 16):  # The file has no IEND, or also no last checksum.
        assert check(png[:end]).prepared is False
        assert differ(prepare(png[:end], 96, 64), prepare(png, 96, 64)) == 0


def test_an_interlaced_image_is_accepted_whole_and_refused_with_rows_missing() -> None:
    for width, height in [(1, 1), (3, 5), (8, 8), (61, 37)]:
        whole = photos.interlaced_png(width, height)
        assert check(whole).prepared is False
        assert (prepare(whole, width, height) == 200).all()
        assert refusal(photos.interlaced_png(width, height, missing_bytes=1)) == NOT_VALID


@pytest.mark.parametrize("container", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_never_raise_anything_else(container: str) -> None:
    data = bytearray(photos.saved(photos.photo(64, 64), container))
    random = np.random.default_rng(7)
    refused = 0
    for _ in range(300):
        damaged = data.copy()
        for place in random.integers(0, len(data), 3):
            damaged[place] = random.integers(0, 256)
        try:
            check(bytes(damaged))
            prepare_image(bytes(damaged), width=64, height=64)
        except InvalidImageError:
            refused += 1
    assert refused > 10


def test_a_file_over_20_mb_is_refused_before_it_is_read() -> None:
    assert refusal(bytes(LIMITS.max_image_bytes + 1)) == TOO_LARGE
    assert check(photos.padded_png(LIMITS.max_image_bytes)).prepared


def test_over_64_megapixels_is_refused() -> None:
    assert refusal(photos.huge_png()) == TOO_MANY_PIXELS


def test_the_pixel_limit_holds_for_headers_whose_pixels_are_missing() -> None:
    jpeg_header = photos.jpeg(photos.photo(64, 64))
    place = jpeg_header.index(b"\xff\xc0") + 5
    webp = photos.saved(photos.photo(64, 64), "WEBP", exif=photos.exif(1))
    size = webp.index(b"VP8X") + 12

    tall = jpeg_header[:place] + struct.pack(">HH", 60_000, 60_000) + jpeg_header[place + 4 :]
    wide = webp[:size] + b"\xfe\x3f\0\xfe\x3f\0" + webp[size + 6 :]

    assert refusal(tall) == TOO_MANY_PIXELS
    assert refusal(wide) == TOO_MANY_PIXELS


def test_the_sentences_name_the_limits_that_are_set() -> None:
    small = Limits(max_image_bytes=2**20, max_image_pixels=1_500_000)

    with pytest.raises(InvalidImageError, match="larger than 1 MB"):
        check_image(bytes(2**20 + 1), width=512, height=512, limits=small)
    with pytest.raises(InvalidImageError, match=r"more than 1\.5 megapixels"):
        check_image(photos.flat_png(1500, 1001), width=512, height=512, limits=small)


def test_a_70_megapixel_image_and_a_text_bomb_cost_no_memory() -> None:
    script = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import photos
from img2img_server.domain.params import Limits
from img2img_server.imaging.base import InvalidImageError
from img2img_server.imaging.prepare import check_image
huge, bomb = photos.huge_png(), photos.png(8, 8, bytes(200), more=((b"zTXt", b"c\\0\\0" + sys.stdin.buffer.read()),))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    check_image(huge, width=512, height=512, limits=Limits())
except InvalidImageError:
    check_image(bomb, width=512, height=512, limits=Limits())
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""  # noqa: E501
    ran = subprocess.run(
        [sys.executable, "-c", script, str(photos.EXAMPLES.parent / "tests")],
        input=photos.text_bomb(),
        capture_output=True,
        check=True,
    )
    assert int(ran.stdout) < 10  # mebibytes of memory


def stuffed(container: str, parts: int) -> bytes:
    """Returns an image with many metadata parts between its header and its pixels."""
    data = photos.saved(photos.photo(), "JPEG" if "JPEG" in container else container)
    match container:
        case "PNG":
            empty, place = struct.pack(">I4sI", 0, b"teXt", zlib.crc32(b"teXt")), 33
        case "WEBP":
            empty, place = struct.pack("<4sI", b"NONE", 0), len(data)
            data = data[:4] + struct.pack("<I", len(data) + len(empty) * parts - 8) + data[8:]
        case "JPEG, fill bytes":
            empty, place = b"\xff", 2
        case _:
            empty, place = b"\xff\xe2\x00\x02", 2
    return data[:place] + empty * parts + data[place:]


@pytest.mark.parametrize("container", ["PNG", "WEBP", "JPEG, fill bytes", "JPEG, segments"])
def test_a_file_of_countless_parts_is_refused(container: str) -> None:
    assert check(stuffed(container, MAX_PARTS - 50)).prepared is False
    assert refusal(stuffed(container, MAX_PARTS)) == NOT_VALID


def test_a_jpeg_of_countless_scans_is_refused() -> None:
    assert check(photos.many_scans_jpeg(MAX_JPEG_SCANS - 20)).prepared is False
    assert refusal(photos.many_scans_jpeg(MAX_JPEG_SCANS)) == NOT_VALID


def test_images_after_the_first_one_in_a_jpeg_do_not_count() -> None:
    data = photos.jpeg() + photos.many_scans_jpeg(MAX_JPEG_SCANS)

    assert check(data) == CheckedImage(
        data=data, prepared=False, width=512, height=512, own_size=(512, 512)
    )


@pytest.mark.parametrize("subsampling", ["4:2:2", "4:2:0"])
def test_a_subsampled_cmyk_jpeg_is_accepted_whole_and_refused_cut(subsampling: str) -> None:
    inks = Image.fromarray(photos.photo(96, 64)).convert("CMYK")
    data = photos.saved(inks, "JPEG", subsampling=subsampling, restart_marker_blocks=3)
    start, end = data.index(b"\xff\xda"), data.index(b"\xff\xd9")
    expected = np.asarray(photos.opened(data).convert("RGB"))

    for whole in (data, data[:end], data[:end] + bytes(50)):
        assert check(whole).prepared is False
        assert differ(prepare(whole, 96, 64), expected) <= 1
    for cut in range(start + 20, end - 2, 97):
        assert refusal(data[:cut]) == NOT_VALID
        assert refusal(data[:cut] + b"\xff\xd9") == NOT_VALID


def test_a_lossless_jpeg_is_decoded_whole() -> None:
    grey = np.ascontiguousarray(photos.photo(200, 150)[..., 0])
    data = bytes(imagecodecs.ljpeg_encode(grey))

    assert check(data).prepared is False
    assert differ(prepare(data, 200, 150), np.dstack([grey] * 3)) == 0
    assert prepare(data, 16, 16).shape == (16, 16, 3)
    assert refusal(data[:-1000]) == NOT_VALID


@pytest.mark.parametrize("scan", range(3))
def test_no_second_frame_header_makes_a_jpeg_lossless(scan: int) -> None:
    """A decoder that must not get lossless images would write beyond its buffer."""
    data = photos.separate_scans_jpeg(photos.photo(96, 64))
    frame = data[data.index(b"\xff\xc0") :][:19].replace(b"\xff\xc0", b"\xff\xc3")
    place = [found.start() for found in re.finditer(b"\xff\xda", data)][scan]
    hidden = data[:place] + frame + data[place:]

    assert refusal(hidden) == NOT_VALID
    with pytest.raises(InvalidImageError):
        prepare_image(hidden, width=8, height=8)


@pytest.mark.parametrize(
    ("place", "value", "cause"),
    [(1, 0xC3, ""), (1, 0xF7, "JPEG-LS"), (4, 12, "12 bits for each sample"), (1, 0xCB, "")],
)
def test_a_jpeg_of_another_process_is_refused(place: int, value: int, cause: str) -> None:
    data = bytearray(photos.jpeg())
    data[data.index(b"\xff\xc0") + place] = value

    with pytest.raises(InvalidImageError, match="is not a valid") as caught:
        check(bytes(data))
    assert cause in caught.value.violation.cause


def test_images_that_a_phone_appends_to_a_jpeg_may_be_cut() -> None:
    first, second = Image.fromarray(photos.photo(96, 64)), Image.fromarray(photos.photo(96, 64))
    data = photos.saved(first, "MPO", save_all=True, append_images=[second])
    end = data.index(b"\xff\xd9")

    whole = prepare(data[: end + 2], 96, 64)
    assert differ(prepare(data, 96, 64), whole) == 0
    assert check(data[:-500]).prepared is False
    assert refusal(data[: end - 500]) == NOT_VALID


def test_an_exif_thumbnail_with_its_own_end_marker_hides_nothing() -> None:
    thumbnail = photos.exif(1) + photos.jpeg(photos.photo(64, 48))
    segment = b"\xff\xe1" + struct.pack(">H", 2 + len(thumbnail)) + thumbnail
    data = photos.jpeg(photos.photo(96, 64))
    data = data[:2] + segment + data[2:]

    assert differ(prepare(data[:-2], 96, 64), prepare(data, 96, 64)) == 0
    assert refusal(data[:-200]) == NOT_VALID


@pytest.mark.parametrize("scans", [1, 2, 3])
def test_a_sequential_jpeg_of_one_scan_a_component_needs_all_of_them(scans: int) -> None:
    data = photos.separate_scans_jpeg(photos.photo(96, 64))
    starts = [place.start() for place in re.finditer(b"\xff\xda", data)]
    assert len(starts) == 3
    cut = data[: starts[scans]] if scans < 3 else data.removesuffix(b"\xff\xd9")

    for file in (cut, cut + b"\xff\xd9"):
        if scans < 3:
            assert refusal(file) == NOT_VALID
        else:
            assert differ(prepare(file, 96, 64), prepare(data, 96, 64)) == 0


@pytest.mark.parametrize("missing", range(1, 10))
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_in_a_scan_header_is_refused(progressive: bool, missing: int) -> None:
    data = photos.saved(photos.photo(8, 8), "JPEG", progressive=progressive, quality=1)
    # the length of the scan header for one component and for three
    header = 10 if progressive else 14
    cut = data[: data.rindex(b"\xff\xda") + header - missing]

    assert refusal(cut) == NOT_VALID
    if not progressive:  # Otherwise the scans before the cut are complete.
        assert refusal(cut + b"\xff\xd9") == NOT_VALID


def test_an_arithmetic_coded_jpeg_needs_its_end_marker() -> None:
    """Its encoder may leave out final zeros, so missing bits cause no warning."""
    data = photos.arithmetic_jpeg()
    with photos.opened(data) as image:
        expected = np.asarray(image.convert("RGB"))

    assert differ(prepare(data, 8, 24), expected) == 0
    assert check(data + bytes(99)).prepared is False
    for missing in range(1, 9):
        assert refusal(data[:-missing]) == NOT_VALID


def test_a_jpeg_with_stray_bytes_is_accepted_whole_and_refused_cut() -> None:
    """The decoder warns of stray bytes first and of missing bits later."""
    whole = photos.saved(photos.photo(96, 64), "JPEG", restart_marker_blocks=4)
    place = whole.index(b"\xff\xd1")
    data = whole[:place] + bytes(30) + whole[place:]

    assert differ(prepare(data, 96, 64), prepare(whole, 96, 64)) == 0
    for missing in (5, 9, 200):
        for end in (b"", b"\xff\xd9"):
            assert refusal(data[:-missing] + end) == NOT_VALID


@pytest.mark.parametrize("bound", ["MAX_COMPARED_PIXELS", "_MAX_COMPARED_SCANNED"])
def test_the_end_marker_decides_where_looking_for_missing_bits_takes_long(
    bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, bound, 0)
    whole = photos.saved(photos.photo(96, 64), "JPEG", restart_marker_blocks=4)
    place = whole.index(b"\xff\xd1")
    data = whole[:place] + bytes(30) + whole[place:]

    assert check(data).prepared is False
    assert refusal(data.removesuffix(b"\xff\xd9")) == NOT_VALID


def test_a_progressive_jpeg_without_end_marker_needs_all_its_scans() -> None:
    data = photos.saved(photos.photo(96, 64), "JPEG", progressive=True)
    starts = [place.start() for place in re.finditer(b"\xff\xda", data)]
    tables = [data.rindex(b"\xff\xc4", 0, start) for start in starts[2:]]

    assert check(data.removesuffix(b"\xff\xd9")).prepared is False
    for end in tables:  # The scans are complete, but some are missing.
        assert refusal(data[:end]) == NOT_VALID


def test_the_refusal_says_what_the_image_lacks_and_its_size() -> None:
    with pytest.raises(InvalidImageError) as cut:
        check(photos.jpeg()[:-900])
    with pytest.raises(InvalidImageError) as huge:
        check(photos.huge_png())

    assert cut.value.violation.cause == "the JPEG image cannot be used: rows are missing"
    assert huge.value.violation.cause == "the image has 10000x7000 pixels, 70.0 megapixels"


@pytest.mark.parametrize("size", [(8160, 6144), (6144, 8160), (8064, 6048)])
def test_photos_of_50_megapixel_phones_are_accepted(size: tuple[int, int]) -> None:
    checked = check(photos.flat_png(*size), 256, 256)

    assert checked.prepared


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(64, 32), (32, 64)])
def test_exif_rotation_is_applied(orientation: int, size: tuple[int, int]) -> None:
    upright = photos.photo(*size)
    data = photos.rotated_jpeg(upright, orientation)

    assert differ(prepare(data, *size), upright) < 30
    assert differ(prepare(data, *size), prepare(photos.jpeg(upright), *size)) < 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(64, 64), (96, 48), (50, 90), (200, 300)])
def test_a_rotated_image_is_resized_as_an_upright_one(orientation: int, size: Size) -> None:
    """Lanczos on rows and then columns clips other pixels than in the opposite order."""
    noise = np.random.default_rng(1).integers(0, 2, (128, 128, 3), np.uint8) * 255
    data = photos.saved(noise, "PNG", exif=photos.exif(orientation))
    with photos.opened(data) as image:
        upright = photos.saved(ImageOps.exif_transpose(image), "PNG", exif=photos.exif(1))

    assert differ(prepare(data, *size), prepare(upright, *size)) <= 2


@pytest.mark.parametrize("container", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_to_png_and_webp(container: str, orientation: int) -> None:
    with photos.opened(photos.rotated_jpeg(photos.quadrants(), orientation)) as stored:
        exif = photos.exif(orientation)
        data = photos.saved(stored, container, lossless=True, exif=exif)

    assert differ(prepare(data, 64, 32), photos.quadrants()) < 12


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03",
        b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0",
        b"nonsense",
    ],
)
def test_a_damaged_exif_block_is_ignored(block: bytes) -> None:
    photo = photos.photo(64, 64)
    data = photos.saved(photo, "JPEG", quality=95, subsampling=0, exif=b"Exif\0\0" + block)

    assert differ(prepare(data, 64, 64), prepare(photos.jpeg(photo), 64, 64)) == 0


def test_the_first_frame_counts() -> None:
    first, second = photos.photo(64, 64), photos.photo(64, 64, photos.CAT)
    more = {"save_all": True, "append_images": [Image.fromarray(second)]}

    assert differ(prepare(photos.animated_webp(first, second), 64, 64), first) == 0
    assert differ(prepare(photos.saved(first, "PNG", **more), 64, 64), first) == 0


def test_transparency_becomes_white() -> None:
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[:, 32:] = (10, 20, 30, 255)
    layer[32:, :32] = (200, 0, 0, 128)
    expected = np.full((64, 64, 3), 255, np.uint8)
    expected[:, 32:] = (10, 20, 30)
    expected[32:, :32] = (227, 127, 127)

    for data in (
        photos.saved(layer, "PNG"),
        photos.saved(layer, "WEBP", lossless=True, exact=True),
    ):
        assert differ(prepare(data, 64, 64), expected) <= 1


def test_grey_with_transparency_becomes_white() -> None:
    layer = np.zeros((8, 8, 2), np.uint8)
    layer[:4] = (77, 255)
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[:4] = 77

    assert differ(prepare(photos.saved(layer, "PNG"), 8, 8), expected) == 0


def test_transparent_palette_colours_and_colour_keys_become_white() -> None:
    palette = (b"PLTE", bytes([0, 0, 0, 9, 99, 199]))
    keyed = ((b"tRNS", b"\0\0\0\0\0\0"),)
    rows = bytes([0, *[0] * 4, *[1] * 4]) * 8
    colours = bytes([0, *[0] * 12, *[9, 99, 199] * 4]) * 8
    expected = np.full((8, 8, 3), 255, np.uint8)
    expected[:, 4:] = (9, 99, 199)

    for data in (
        photos.png(8, 8, rows, colour=3, more=(palette, (b"tRNS", b"\0"))),
        photos.png(8, 8, colours, colour=2, more=keyed),
    ):
        assert differ(prepare(data, 8, 8), expected) == 0


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_few_colours_are_unpacked(depth: int) -> None:
    row = b"\0" + (b"\x0f" if depth < 8 else bytes([0, 0, 0, 0, 1, 1, 1, 1]))
    grey = {1: [0] * 4 + [255] * 4, 2: [0, 0, 255, 255], 4: [0, 255], 8: [0] * 4 + [1] * 4}[depth]
    data = photos.png(len(grey), 1, row, depth=depth, colour=0)

    assert prepare(data, len(grey), 1)[0].tolist() == [[value] * 3 for value in grey]


@pytest.mark.parametrize(
    ("colour", "pixel", "expected"),
    [
        (0, [0x1234], [0x12] * 3),
        (0, [0xFFFF], [0xFF] * 3),
        (2, [0x1234, 0x5678, 0x9ABC], [0x12, 0x56, 0x9A]),
        (4, [0x4000, 0xFFFF], [0x40] * 3),
        (6, [0x1234, 0x5678, 0x9ABC, 0xFFFF], [0x12, 0x56, 0x9A]),
    ],
)
def test_16_bits_keep_their_upper_8(colour: int, pixel: list[int], expected: list[int]) -> None:
    row = b"\0" + b"".join(value.to_bytes(2, "big") for value in pixel) * 8
    data = photos.png(8, 8, row * 8, depth=16, colour=colour)

    assert (prepare(data, 8, 8) == expected).all()


def test_transparent_16_bit_grey_becomes_white() -> None:
    row = b"\0" + b"\x12\x34" * 4 + b"\x12\x35" * 4
    data = photos.png(8, 8, row * 8, depth=16, colour=0, more=((b"tRNS", b"\x12\x34"),))

    assert prepare(data, 8, 8)[0].tolist() == [[255] * 3] * 4 + [[0x12] * 3] * 4


def test_a_grey_jpeg_becomes_rgb() -> None:
    grey = Image.fromarray(photos.photo(64, 64)).convert("L")
    pixels = prepare(photos.saved(grey, "JPEG", quality=95), 64, 64)

    assert differ(pixels, np.asarray(grey.convert("RGB"))) < 12


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    pixels = prepare(photos.cmyk_jpeg(photos.quadrants()), 64, 32)

    assert differ(pixels, photos.quadrants()) < 12


def test_the_largest_centred_box_is_cut() -> None:
    stripes = np.zeros((100, 300, 3), np.uint8)
    stripes[:, 100:200] = 255

    assert (prepare(photos.saved(stripes, "PNG"), 96, 96)[:, 8:-8] == 255).all()
    across = np.ascontiguousarray(stripes.swapaxes(0, 1))
    assert (prepare(photos.saved(across, "PNG"), 96, 96)[8:-8] == 255).all()


@pytest.mark.parametrize("size", [(256, 1024), (1024, 256), (264, 256), (512, 512), (1016, 1024)])
@pytest.mark.parametrize("source", [(1, 1), (1, 300), (300, 1), (17, 13), (451, 300), (999, 1001)])
def test_every_shape_gives_exactly_the_size(size: tuple[int, int], source: tuple[int, int]) -> None:
    grey = np.full((source[1], source[0], 3), 123, np.uint8)

    assert (prepare(photos.saved(grey, "PNG"), *size) == 123).all()


def test_an_image_of_the_right_size_is_not_touched() -> None:
    assert differ(prepare(photos.saved(photos.photo(), "PNG"), 512, 512), photos.photo()) == 0


def test_a_large_jpeg_decoded_smaller_looks_the_same() -> None:
    large = np.tile(photos.photo(1000, 1000), (2, 2, 1))
    prepared = prepare(photos.saved(large, "JPEG", quality=92, subsampling=0), 256, 256)
    fully = prepare(photos.saved(large, "PNG", compress_level=0), 256, 256)

    error = np.mean((prepared.astype(float) - fully) ** 2)
    assert 10 * np.log10(255**2 / error) > 42  # dB, including the loss of JPEG itself


def test_the_same_bytes_give_the_same_pixels_in_every_thread() -> None:
    data = photos.saved(photos.photo(1200, 900), "JPEG")
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: prepare(data, 512, 512).tobytes(), range(12)))

    assert len(set(results)) == 1
