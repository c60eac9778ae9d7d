"""Rewrites short prompts for requests with enhance_prompt, by rules.

Terms for medium, light, composition and quality are added. A term is added only where the prompt
says nothing of its kind, and only one that fits the prompt: a sketch gets no camera terms, a night
scene no sun, and a monochrome image no colours.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Final

MAX_CHARACTERS: Final = 2000
NO_REWRITER: Final = "enhance_prompt has no effect: this service has no prompt rewriter."
_MANY_WORDS: Final = 40
_MANY_PARTS: Final = 4
# (red hat:1.3), <lora:name:0.8>. Neither part may contain a bracket, nor the first a colon, so that
# the expression has one way to match and never backtracks.
_WEIGHTS: Final = re.compile(r"[(\[<][^()\[\]<>:]*:[^()\[\]<>]*[)\]>]")


def _any(*words: str) -> re.Pattern[str]:
    """Returns a pattern that matches any of the words or phrases, also in the plural."""
    return re.compile(rf"\b(?:{'|'.join(words)})(?:s|es)?\b", re.IGNORECASE)


# The first entry that matches is the prompt's own medium.
_MEDIA: Mapping[str, re.Pattern[str]] = {
    "flat": _any(
        *("pixel ?art", "logo", "icon", "vector", "flat design", "low[- ]poly", "sticker"),
        *("line ?art", "stencil", "mosaic", "stained glass", "cartoon", "comic", "8[- ]bit"),
    ),
    "drawn": _any(
        *("sketch", "drawing", "pencil", "charcoal", "ink", "engraving", "etching", "doodle"),
        *("woodcut", "chalk", "crayon", "manga", "ukiyo[- ]e", "linocut"),
    ),
    "painted": _any(
        *("painting", "painted", "watercolou?r", "oil on canvas", "gouache", "acrylic", "fresco"),
        *("pastel", "impressionis[mt]", "illustration", "anime", "concept art", "van gogh"),
        "monet",
    ),
    "rendered": _any("3d", "render", "cgi", "octane", "unreal engine", "blender", "claymation"),
    "photo": _any(
        *("photo", "photograph", "photography", "photorealistic", "film", "polaroid", "dslr"),
        *("camera", "snapshot", "35 ?mm", "macro", "cinematic", "realistic"),
    ),
}
_STYLE_OF_ITS_OWN = _any("style", "in the manner of", "abstract", "minimalis[mt]", "surreal")
_ROUGH = _any(
    *("blurry", "blurred", "grainy", "grain", "glitch", "lo-?fi", "rough", "noisy", "faded"),
    *("abstract", "minimalis[mt]", "childlike", "naive", "unfinished"),
)
_COLOURLESS = _any("monochrome", "black and white", "black-and-white", "grayscale", "greyscale")

_LIGHT = _any(
    *("light", "lighting", "lit", "sunlit", "moonlit", "backlit", "glow", "glowing", "shadow"),
    *("sunshine", "neon", "candle", "lamp", "silhouette", "bright", "dark", "dim", "ray"),
)
# Time and place in the prompt, and the light that fits them.
_SCENES: Sequence[tuple[re.Pattern[str], Sequence[str]]] = (
    (
        _any("night", "midnight", "moon", "star", "stars", "starry"),
        ("moonlight", "soft light in the dark"),
    ),
    (
        _any("dusk", "dawn", "sunset", "sunrise", "evening", "twilight"),
        ("low light at the horizon", "long soft shadows", "warm low sun"),
    ),
    (
        _any("fog", "mist", "rain", "rainy", "snow", "storm", "winter", "cloud", "cloudy"),
        ("soft overcast light", "diffuse light"),
    ),
    (
        _any("room", "kitchen", "interior", "indoor", "studio", "table", "cafe", "library"),
        ("soft window light", "even studio light"),
    ),
)
_ANY_LIGHT = ("soft natural light", "gentle side light", "warm golden light")
_COLOURED = re.compile(r"warm|golden|vivid|rich colou?rs", re.IGNORECASE)

_COMPOSITION = _any(
    *("close-?up", "wide", "view", "shot", "angle", "composition", "panorama", "panoramic"),
    *("from above", "from below", "aerial", "perspective", "portrait", "centred", "centered"),
    *("foreground", "background", "symmetrical", "framing", "isometric"),
)
_FACES = _any("woman", "women", "man", "men", "girl", "boy", "child", "face", "person", "lady")
_PLACES = _any(
    *("harbou?r", "landscape", "mountain", "city", "street", "forest", "sea", "beach", "valley"),
    *("field", "lake", "river", "village", "skyline", "desert", "garden", "coast", "castle"),
)
_COMPOSITIONS: Sequence[tuple[re.Pattern[str], Sequence[str]]] = (
    (_FACES, ("head and shoulders", "centred composition")),
    (_PLACES, ("wide view", "clear foreground and depth")),
)
_ANY_COMPOSITION = ("balanced composition", "the subject in the centre")

_NEW_MEDIA = ("photograph", "oil painting", "digital painting")
_MEDIUM_OF = {"photograph": "photo", "oil painting": "painted", "digital painting": "painted"}
_QUALITY = _any(
    *("detailed", "detail", "sharp", "high quality", "masterpiece", "intricate", "crisp"),
    *("4k", "8k", "hd", "uhd", "fine"),
)
_QUALITIES: Mapping[str, Sequence[str]] = {
    "photo": ("sharp focus, fine detail", "crisp detail, natural colours"),
    "painted": ("visible brushwork, fine detail", "rich texture, careful detail"),
    "drawn": ("confident lines, fine hatching", "clean lines, careful shading"),
    "rendered": ("clean materials, fine detail", "smooth surfaces, crisp edges"),
    "flat": ("clean edges", "clear shapes"),
    "": ("fine detail", "careful detail"),
}


def rewrite(prompt: str, seed: int) -> str:
    """Returns the prompt with terms added; the same prompt and seed give the same text.

    Empty and elaborate prompts come back unchanged, and so do prompts that would exceed
    MAX_CHARACTERS. The call takes microseconds, and milliseconds for the longest prompts.
    """
    if not prompt.strip() or is_elaborate(prompt):
        return prompt
    text = ", ".join([prompt.rstrip(" \t\r\n.,;"), *_terms(prompt, seed)])
    return text if len(text) <= MAX_CHARACTERS else prompt


def is_elaborate(prompt: str) -> bool:
    """Returns whether the prompt is long, a list of tags, or has weighted words."""
    parts = [part for part in re.split(r"[,;|\n]", prompt) if part.strip()]
    return (
        len(prompt.split()) > _MANY_WORDS
        or len(parts) >= _MANY_PARTS
        or _WEIGHTS.search(prompt) is not None
    )


def _terms(prompt: str, seed: int) -> list[str]:
    """Returns the terms to add: medium, light, composition and quality, in this order."""
    terms = []
    medium = next((name for name, words in _MEDIA.items() if words.search(prompt)), "")
    if not medium and not _STYLE_OF_ITS_OWN.search(prompt):
        added = _pick(_NEW_MEDIA, prompt, seed, "medium")
        medium = _MEDIUM_OF[added]
        terms.append(added)
    if medium not in ("flat", "drawn") and not _LIGHT.search(prompt):
        terms.append(_pick(_fitting(prompt, _SCENES, _ANY_LIGHT), prompt, seed, "light"))
    if medium != "flat" and not _COMPOSITION.search(prompt):
        options = _fitting(prompt, _COMPOSITIONS, _ANY_COMPOSITION)
        terms.append(_pick(options, prompt, seed, "composition"))
    if not _QUALITY.search(prompt) and not _ROUGH.search(prompt):
        terms.append(_pick(_without_colour(prompt, _QUALITIES[medium]), prompt, seed, "quality"))
    return terms


def _fitting(
    prompt: str, table: Sequence[tuple[re.Pattern[str], Sequence[str]]], otherwise: Sequence[str]
) -> Sequence[str]:
    found = next((terms for words, terms in table if words.search(prompt)), otherwise)
    return _without_colour(prompt, found)


def _without_colour(prompt: str, terms: Sequence[str]) -> Sequence[str]:
    if not _COLOURLESS.search(prompt):
        return terms
    return [term for term in terms if not _COLOURED.search(term) and "colour" not in term]


def _pick(options: Sequence[str], prompt: str, seed: int, kind: str) -> str:
    """Returns one of the options by a hash, so every machine and version picks the same one."""
    digest = hashlib.sha256(f"{seed}/{kind}/{prompt}".encode()).digest()
    return options[int.from_bytes(digest[:8]) % len(options)]
