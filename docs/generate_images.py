"""Makes the pictures of the README with a running service: `make serve`, then run this.

after.jpg is what `make demo` makes; looks.jpg shows one photo in several looks, each named only by
its prompt.
"""

import io
from pathlib import Path

from PIL import Image

from img2img_client import Client

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "images"
DEMO = "an oil painting of a cat"
LOOKS = (
    "a watercolour",
    "a pencil sketch",
    "a comic",
    "a mosaic",
    "stained glass",
    "neon at night",
)
SIDE = 256  # pixels of one picture in looks.jpg


def main() -> None:
    """Writes both pictures."""
    OUT.mkdir(exist_ok=True)
    with Client(api_key="dev-key") as client:
        save(make(client, DEMO, "cat.jpg"), "after.jpg")
        strip = Image.new("RGB", (SIDE * 3, SIDE * 2))
        for number, look in enumerate(LOOKS):
            picture = make(client, look, "coffee.jpg").resize(
                (SIDE, SIDE), Image.Resampling.LANCZOS
            )
            strip.paste(picture, (number % 3 * SIDE, number // 3 * SIDE))
        save(strip, "looks.jpg")


def make(client: Client, prompt: str, photo: str) -> Image.Image:
    """One picture of the example photo."""
    path = ROOT / "examples" / photo
    result = client.generate(prompt, path, strength=0.7, seed=1)
    return Image.open(io.BytesIO(result.images[0].data)).convert("RGB")


def save(picture: Image.Image, name: str) -> None:
    """JPEG, so that the repository stays small."""
    picture.save(OUT / name, quality=90, subsampling=0)


if __name__ == "__main__":
    main()
