"""Fails unless FILE is a PNG of WIDTH x HEIGHT that was made from PHOTO: like it, but not the same.

python .ci/check_picture.py FILE PHOTO WIDTH HEIGHT
"""

import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

LEAST_SPREAD = 10.0  # standard deviation of a channel, of 255; a blank picture has 0
LEAST_CHANGE = 4.0  # mean difference from the photo, of 255; the photo itself has 0
MOST_CHANGE = 60.0  # the same, both blurred; another picture altogether has more


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference over all channels, of 255."""
    means = ImageStat.Stat(ImageChops.difference(one, other)).mean
    return sum(means) / len(means)


def main(file: str, photo: str, width: str, height: str) -> int:
    """Returns 1 and says why when the picture is not as wanted."""
    with Image.open(Path(file)) as picture, Image.open(Path(photo)) as source:
        found = (picture.format, picture.size)
        made = picture.convert("RGB")
        before = ImageOps.fit(source.convert("RGB"), made.size)
    spread = max(ImageStat.Stat(made).stddev)
    change = difference(made, before)
    blur = ImageFilter.GaussianBlur(16)
    coarse_change = difference(made.filter(blur), before.filter(blur))
    if found != ("PNG", (int(width), int(height))):
        print(f"{file}: wanted a PNG of {width}x{height}, found {found}", file=sys.stderr)
        return 1
    if spread < LEAST_SPREAD:
        print(f"{file}: the picture is blank (spread {spread:.1f})", file=sys.stderr)
        return 1
    if change < LEAST_CHANGE or coarse_change > MOST_CHANGE:
        print(f"{file}: differs by {change:.1f}, blurred {coarse_change:.1f}", file=sys.stderr)
        return 1
    print(f"{file}: PNG, {width}x{height}, spread {spread:.1f}, {change:.1f} from the photo")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
