"""Generates the images of the README with a running service: run `make serve`, then this script.

after.jpg is the result of `make demo`; styles.jpg shows one photo in several styles, each named
only by its prompt.
"""

import io
from pathlib import Path

from PIL import Image

from img2img_client import Client

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images"
DEMO = "an oil painting of a cat"
STYLES = (
    "a watercolour",
    "a pencil sketch",
    "a comic",
    "a mosaic",
    "stained glass",
    "neon at night",
)
SIDE = 256  # pixels of one image in styles.jpg


def main() -> None:
    """Writes both files."""
    OUT.mkdir(exist_ok=True)
    with Client(api_key="dev-key") as client:
        save(generate(client, DEMO, "cat.jpg"), "after.jpg")
        strip = Image.new("RGB", (SIDE * 3, SIDE * 2))
        for number, style in enumerate(STYLES):
            image = generate(client, style, "coffee.jpg").resize(
                (SIDE, SIDE), Image.Resampling.LANCZOS
            )
            strip.paste(image, (number % 3 * SIDE, number // 3 * SIDE))
        save(strip, "styles.jpg")


def generate(client: Client, prompt: str, photo: str) -> Image.Image:
    """Returns an image generated from the example photo."""
    path = ROOT / "examples" / photo
    result = client.generate(prompt, path, strength=0.7, seed=1)
    return Image.open(io.BytesIO(result.images[0].data)).convert("RGB")


def save(image: Image.Image, name: str) -> None:
    """Writes a JPEG file, which keeps the repository small."""
    image.save(OUT / name, quality=90, subsampling=0)


if __name__ == "__main__":
    main()
