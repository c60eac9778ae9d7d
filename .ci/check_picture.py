"""Fails unless FILE is a PNG of WIDTH x HEIGHT that shows something.

python .ci/check_picture.py FILE WIDTH HEIGHT
"""

import sys
from pathlib import Path

from PIL import Image, ImageStat

LEAST_SPREAD = 10.0  # standard deviation of a channel, of 255; a blank picture has 0


def main(file: str, width: str, height: str) -> int:
    """Returns 1 and says why when the picture is not as wanted."""
    with Image.open(Path(file)) as picture:
        picture.load()
        spread = max(ImageStat.Stat(picture.convert("RGB")).stddev)
        found = (picture.format, picture.size)
    if found != ("PNG", (int(width), int(height))):
        print(f"{file}: wanted a PNG of {width}x{height}, found {found}", file=sys.stderr)
        return 1
    if spread < LEAST_SPREAD:
        print(f"{file}: the picture is blank (spread {spread:.1f})", file=sys.stderr)
        return 1
    print(f"{file}: PNG, {width}x{height}, spread {spread:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
