"""Fails unless FILE is a PNG of WIDTH x HEIGHT that was generated from PHOTO: similar, but not
equal.

python .ci/check_image.py FILE PHOTO WIDTH HEIGHT
"""

import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageOps, ImageStat

LEAST_SPREAD = 10.0  # standard deviation of a channel, of 255; a blank image has 0
LEAST_CHANGE = 4.0  # mean difference from PHOTO, of 255
# mean difference of both images after blurring, of 255; for an unrelated image it is larger
MOST_CHANGE = 60.0


def difference(one: Image.Image, other: Image.Image) -> float:
    """Returns the mean absolute difference over all channels, of 255."""
    means = ImageStat.Stat(ImageChops.difference(one, other)).mean
    return sum(means) / len(means)


def main(file: str, photo: str, width: str, height: str) -> int:
    """Returns 1 and prints the reason if the image fails a check."""
    with Image.open(Path(file)) as image, Image.open(Path(photo)) as source:
        found = (image.format, image.size)
        made = image.convert("RGB")
        before = ImageOps.fit(source.convert("RGB"), made.size)
    spread = max(ImageStat.Stat(made).stddev)
    change = difference(made, before)
    blur = ImageFilter.GaussianBlur(16)
    coarse_change = difference(made.filter(blur), before.filter(blur))
    if found != ("PNG", (int(width), int(height))):
        print(f"{file}: wanted a PNG of {width}x{height}, found {found}", file=sys.stderr)
        return 1
    if spread < LEAST_SPREAD:
        print(f"{file}: the image is blank (spread {spread:.1f})", file=sys.stderr)
        return 1
    if change < LEAST_CHANGE or coarse_change > MOST_CHANGE:
        print(f"{file}: differs by {change:.1f}, blurred {coarse_change:.1f}", file=sys.stderr)
        return 1
    print(f"{file}: PNG, {width}x{height}, spread {spread:.1f}, {change:.1f} from the photo")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
