"""Draws contact sheets of held-out photos: `python -m recipe.sheets`."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from recipe import gallery, paths
from recipe.gallery import Request
from recipe.generate import square
from recipe.looks import NAMES
from recipe.photos import Photo, photos

LOOKS_PHOTOS = (
    "skimage-chelsea",
    "skimage-astronaut",
    "monument-colosseum",
    "wild-scarlet-macaw",
    "lomiri-picosdeeuropa",
    "skimage-coffee",
)
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
STRENGTH_LOOKS = ("oil painting", "pencil sketch", "night")
LABEL = 14  # height in pixels


def _cell(image: np.ndarray, side: int, label: str) -> Image.Image:
    cell = Image.new("RGB", (side, side + LABEL), "white")
    cell.paste(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS))
    font = ImageFont.load_default(size=10)
    ImageDraw.Draw(cell).text((3, side + 1), label, fill="black", font=font)
    return cell


def _grid(rows: list[list[Image.Image]], name: str) -> None:
    """Saves a grid with 256 colours, because the sheets are stored in the repository."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            sheet.paste(cell, (x * width, y * height))
    paths.REPORTS.mkdir(parents=True, exist_ok=True)
    target = paths.REPORTS / f"{name}.png"
    sheet.quantize(256, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB")


def _named(identifiers: tuple[str, ...]) -> list[Photo]:
    known = {photo.id: photo for photo in photos("test")}
    return [known[identifier] for identifier in identifiers]


def look_photos(count: int) -> list[Photo]:
    """Returns the photos of the sheet, then the other held-out ones."""
    sheet = _named(LOOKS_PHOTOS)
    return (sheet + [photo for photo in photos("test") if photo not in sheet])[:count]


def look_requests(chosen: list[Photo], sparse: int = 0) -> list[Request]:
    """Returns every style of the sheet's photos, and all or `sparse` styles of the others."""
    requests = []
    for number, photo in enumerate(chosen):
        whole = not sparse or photo.id in LOOKS_PHOTOS
        names = NAMES if whole else [NAMES[(number * sparse + i) % 20] for i in range(sparse)]
        requests += [Request(photo, name, seed=1) for name in names]
    return requests


def looks_sheets(wanted: list[Request], side: int = 112) -> None:
    """Draws all styles of some photos, ten styles a sheet; the first column is the photo."""
    gallery.make(wanted)
    for part, names in enumerate((NAMES[:10], NAMES[10:]), start=1):
        rows = []
        for photo in dict.fromkeys(request.photo for request in wanted):
            row = [_cell(square(photo), side, "init")]
            row += [
                _cell(gallery.image(request), side, request.look)
                for request in wanted
                if request.photo == photo and request.look in names
            ]
            rows.append(row)
        _grid(rows, f"looks-{part}")


def strength_sheet(side: int = 96) -> None:
    wanted = [
        [Request(photo, look, seed=1, strength=s, side=256) for s in STRENGTHS]
        for photo in _named(LOOKS_PHOTOS[:4])
        for look in STRENGTH_LOOKS
    ]
    gallery.make([request for row in wanted for request in row])
    rows = []
    for requests in wanted:
        row = [_cell(square(requests[0].photo), side, requests[0].look)]
        row += [_cell(gallery.image(r), side, f"strength {r.strength}") for r in requests]
        rows.append(row)
    half = len(rows) // 2
    _grid([a + b for a, b in zip(rows[:half], rows[half:], strict=True)], "strengths")


def draw() -> None:
    looks_sheets(look_requests(_named(LOOKS_PHOTOS)))
    strength_sheet()


if __name__ == "__main__":
    draw()
