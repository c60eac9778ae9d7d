"""Word lists for captions: wordings of the styles, and subjects of images."""

from __future__ import annotations


def _words(block: str, separator: str | None = None) -> list[str]:
    return [word.strip() for word in block.replace("\n", " ").strip().split(separator)]


# The first wording is the style's own name.
WORDINGS: dict[str, tuple[str, ...]] = {
    "photo": ("photo", "photograph", "realistic photo", "original photo", "photorealistic"),
    "pencil sketch": (
        "pencil sketch",
        "pencil drawing",
        "graphite sketch",
        "sketch",
        "pencil",
        "drawn with a pencil",
        "hand-drawn sketch",
    ),
    "charcoal": ("charcoal", "charcoal drawing", "charcoal sketch", "drawn in charcoal"),
    "ink drawing": (
        "ink drawing",
        "ink",
        "pen and ink",
        "ink illustration",
        "line art",
        "india ink",
    ),
    "oil painting": (
        "oil painting",
        "oil paint",
        "oil on canvas",
        "impressionist painting",
        "painting",
        "painted in oil",
        "thick brush strokes",
    ),
    "watercolour": (
        "watercolour",
        "watercolor",
        "watercolour painting",
        "watercolor painting",
        "aquarelle",
        "painted in watercolour",
    ),
    "pastel": ("pastel", "pastel drawing", "soft pastel", "chalk pastel", "chalk drawing"),
    "cartoon": ("cartoon", "cartoon style", "cel shaded", "anime", "animated film", "toon"),
    "comic halftone": (
        "comic halftone",
        "comic",
        "comic book",
        "pop art",
        "halftone",
        "comic strip",
        "graphic novel",
    ),
    "pixel art": ("pixel art", "pixelated", "8-bit", "pixels", "retro game", "8 bit pixel art"),
    "mosaic": ("mosaic", "mosaic tiles", "tiled mosaic", "roman mosaic", "ceramic tiles"),
    "stained glass": (
        "stained glass",
        "stained glass window",
        "leaded glass",
        "church window",
    ),
    "black and white": (
        "black and white",
        "monochrome",
        "black-and-white photo",
        "greyscale",
        "grayscale",
        "b&w",
    ),
    "sepia": ("sepia", "sepia toned", "sepia photograph", "brown toned old photo"),
    "neon": ("neon", "neon lights", "neon glow", "glowing neon", "cyberpunk", "synthwave"),
    "night": ("night", "at night", "night scene", "moonlight", "midnight", "in the dark"),
    "sunset": ("sunset", "at sunset", "golden hour", "sunrise", "evening glow", "at dusk"),
    "fog": ("fog", "foggy", "in the fog", "mist", "misty", "hazy"),
    "snow": ("snow", "snowy", "in the snow", "winter", "snowfall", "covered in snow"),
    "vintage": (
        "vintage",
        "vintage film",
        "retro",
        "faded film",
        "old colour photo",
        "polaroid",
        "analog film",
        "1970s film photo",
    ),
}

# Wordings that cannot follow "a … of": they are used alone or after the subject.
SCENES = ("night", "sunset", "fog", "snow", "neon")

SUBJECTS = _words("""
apple pear orange banana lemon cherry strawberry grapes bread cake coffee tea cup bottle glass bowl
plate spoon table chair sofa lamp bed window door wall room kitchen house cottage castle palace
tower church cathedral temple mosque bridge road street city town village market shop harbour
port ship boat canoe train tram bus car truck bicycle motorcycle aeroplane helicopter rocket
astronaut moon planet star sun sky cloud rain storm rainbow mountain hill valley canyon cliff
cave forest wood tree leaf flower rose tulip sunflower dahlia grass meadow field garden park
river stream waterfall lake pond sea ocean beach island desert dune rock stone ice fire
man woman child boy girl baby face portrait person people crowd family couple friend king queen
soldier sailor farmer doctor teacher dancer singer painter worker knight pirate wizard robot
cat kitten dog puppy horse pony cow calf sheep goat pig hen chicken rooster duck goose swan bird
owl eagle parrot macaw kingfisher toucan penguin fish shark whale dolphin crab turtle frog lizard
chameleon crocodile dragon dinosaur snake spider bee butterfly caterpillar lion tiger leopard
jaguar cheetah wolf fox bear panda koala kangaroo lemur monkey gorilla gibbon elephant giraffe
rhinoceros camel zebra deer moose bison squirrel rabbit mouse hedgehog bat
guitar piano violin drum book letter newspaper clock watch phone camera computer keyboard screen
hat coat dress shirt shoe glove scarf umbrella bag box key ring crown sword flag toy ball doll
balloon kite candle mirror vase basket rope wheel engine machine factory mill windmill lighthouse
pyramid statue monument fountain gate stairs roof chimney fence barn farm tractor stadium school
hospital library museum theatre station airport square
""")

ADJECTIVES = _words("""
old young big small tall tiny red blue green yellow white pink purple grey golden silver
wooden happy sad angry quiet busy empty lonely famous beautiful pretty strange ancient modern
wild friendly sleeping running flying standing sitting smiling
""")

PLACES = _words(
    """
in a garden|by the sea|on a table|in the city|on a hill|near a river|in a field|by the window|
under a tree|in the desert|on the beach|in the mountains|in a forest|at the harbour|in the park|
in front of a house|on the road|in space
""",
    "|",
)

EXTRAS = _words(
    """
highly detailed|masterpiece|best quality|4k|beautiful|soft light|dramatic|elegant|high contrast|
sharp focus|centered|wide angle|close up|artstation|award winning|intricate|colourful|calm|
simple|professional|studio|by a great artist|very detailed|warm|cold|bright
""",
    "|",
)

FLAWS = _words(
    """
blurry|low quality|worst quality|ugly|deformed|bad anatomy|jpeg artifacts|noise|watermark|text|
signature|cropped|out of focus|lowres|distorted|bad|error|extra fingers|duplicate
""",
    "|",
)
