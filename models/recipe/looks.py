"""Defines the styles. Each one is a deterministic, local, pixel-aligned rendering of a photo."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

from recipe.strokes import (
    blur,
    cells,
    colours,
    dabs,
    edges,
    flakes,
    lattice,
    luminance,
    outline,
    rgb,
    smooth,
    stretch,
    strokes,
    tint,
)


def photo(image: np.ndarray) -> np.ndarray:
    return image


def pencil_sketch(image: np.ndarray) -> np.ndarray:
    grey = luminance(image)
    dodge = np.clip(grey / (blur(grey, 6) + 0.02), 0, 1) ** 2.5
    shade = 0.30 * np.clip(0.6 - stretch(grey), 0, 1)
    return rgb(np.clip(0.97 * dodge - shade + strokes(grey, 11, 1.6), 0.12, 1))


def charcoal(image: np.ndarray) -> np.ndarray:
    grey = stretch(blur(luminance(image), 1.5))
    dark = np.clip(1.3 - 1.6 * grey, 0, 1)
    rubbed = dark - strokes(luminance(image), 13, 3.0)
    drawn = np.clip(0.9 - rubbed - 0.9 * edges(image, 2.2, 12), 0, 1)
    return tint(drawn, "0c0b0a", "6f655a", "d3c2a4")


def ink_drawing(image: np.ndarray) -> np.ndarray:
    grey = stretch(blur(luminance(image), 1.0))
    ink = np.maximum(np.clip(edges(image, 1.6, 26), 0, 1), grey < 0.3)
    ink = np.clip((blur(ink.astype(np.float32), 0.8) - 0.3) * 3, 0, 1)
    return tint(1 - ink, "101a4a", "fbf3d9")


def oil_painting(image: np.ndarray) -> np.ndarray:
    paint = dabs(colours(image, 1.45), 5)
    bristle = blur(luminance(paint), 0.8)
    relief = bristle - np.roll(bristle, (2, 2), (0, 1))
    return np.clip((paint - 0.5) * 1.15 + 0.5 + 1.5 * relief[..., None], 0, 1)


def watercolour(image: np.ndarray) -> np.ndarray:
    wash = smooth(image, 4, 0.16, 9)
    wash = blur(colours(1 - (1 - wash) * 0.70, 1.4, 5), 1.0)
    rim = edges(wash, 2.0, 7)
    bloom = strokes(luminance(image), 5, 0.5)
    return np.clip(wash + 0.04 + bloom[..., None] - 0.5 * rim[..., None], 0, 1)


def pastel(image: np.ndarray) -> np.ndarray:
    soft = colours(blur(smooth(image, 2), 2.2), 1.15)
    soft = 0.47 + 0.5 * soft + np.array([0.04, 0.0, 0.03], np.float32)
    return np.clip(soft + strokes(luminance(image), 15, 1.4)[..., None], 0, 1)


def cartoon(image: np.ndarray) -> np.ndarray:
    flat = colours(smooth(blur(image, 1.0), 5, 0.25, 9) ** 0.8, 1.9, 4)
    lines = np.maximum(0.9 * outline(image, 0.45, 1.6), np.clip(edges(image, 3.0, 12) - 0.35, 0, 1))
    return np.clip(1.12 * flat + 0.06, 0, 1) * (1 - np.clip(1.2 * lines, 0, 1)[..., None])


def comic_halftone(image: np.ndarray) -> np.ndarray:
    flat = colours(smooth(image, 3), 2.0, 3)
    x, y = lattice(image.shape)
    dot = 0.5 + 0.25 * (np.cos(2 * np.pi * (x + y) / 16) + np.cos(2 * np.pi * (x - y) / 16))
    shade = np.clip(1 - stretch(luminance(image)) * 1.15, 0, 1)
    dots = np.clip((shade - dot) * 5 + 0.5, 0, 1)
    page = 0.35 * np.array([1, 0.93, 0.62], np.float32) + 0.65 * np.clip(flat * 1.15, 0, 1)
    page = page * (1 - 0.5 * dots[..., None])
    return page * (1 - 0.8 * outline(image, 0.5)[..., None])


def pixel_art(image: np.ndarray) -> np.ndarray:
    block = colours(cells(image, 16), 1.7)
    return np.clip(np.round(block * 4) / 4, 0, 1).astype(np.float32)


def mosaic(image: np.ndarray) -> np.ndarray:
    x, y = (axis % 16 for axis in lattice(image.shape))
    tiles = colours(0.45 * cells(image, 16) + 0.55 * smooth(image, 2), 1.35)
    bevel = 0.06 * ((x < 4) | (y < 4)) - 0.06 * ((x > 11) | (y > 11))
    edge = np.minimum(np.minimum(x, 15 - x), np.minimum(y, 15 - y))
    corner = np.minimum(x, 15 - x) + np.minimum(y, 15 - y) < 3
    grout = 0.45 * ((edge < 1) | corner).astype(np.float32)[..., None]
    return np.clip((tiles + bevel[..., None]) * (1 - grout) + 0.95 * grout, 0, 1)


def stained_glass(image: np.ndarray) -> np.ndarray:
    x, y = lattice(image.shape)
    across, down = (x + y) % 32, (x - y) % 32
    lead = np.minimum(np.minimum(across, 32 - across), np.minimum(down, 32 - down))
    glass = colours(smooth(blur(image, 1.2), 2, 0.15), 2.6)
    glow = 0.92 + 0.25 * np.clip(lead / 16, 0, 1)
    black = 0.6 * np.clip((2.6 - lead) / 1.5, 0, 1)
    black = np.maximum(black, outline(blur(image, 1.5), 0.4, 1.6))
    return np.clip(glass * glow[..., None] * (1 - black[..., None]), 0, 1)


def black_and_white(image: np.ndarray) -> np.ndarray:
    grey = luminance(image)
    return rgb(np.clip((grey - 0.5) * 1.35 + 0.5, 0, 1))


def sepia(image: np.ndarray) -> np.ndarray:
    return tint(luminance(image), "1f1208", "8a5a2e", "e8c48c", "fff1d2")


def neon(image: np.ndarray) -> np.ndarray:
    soft = blur(image, 1.3)
    dx, dy = cv2.Sobel(soft, -1, 1, 0), cv2.Sobel(soft, -1, 0, 1)
    strength = np.clip(np.sqrt((dx**2 + dy**2).sum(axis=2)) * 1.3 - 0.2, 0, 1)
    hue = tint(luminance(blur(image, 4)), "00e5ff", "ff2bd6", "b14cff", "ffe14c")
    tube = hue * strength[..., None]
    glow = blur(tube, 6) * 0.6
    base = np.array([0.03, 0.01, 0.09], np.float32) + 0.42 * luminance(image)[..., None] * hue
    return np.clip(base + tube + glow + 0.5 * np.clip(strength - 0.75, 0, 1)[..., None], 0, 1)


def night(image: np.ndarray) -> np.ndarray:
    grey = luminance(image)[..., None]
    moon = (0.35 * image + 0.65 * grey) ** 1.3 * np.array([0.36, 0.48, 0.84], np.float32)
    lamps = np.clip(image - 0.86, 0, 1) * np.array([2.4, 1.9, 0.9], np.float32)
    return np.clip(moon + lamps + np.array([0.0, 0.01, 0.05], np.float32), 0, 1)


def sunset(image: np.ndarray) -> np.ndarray:
    graded = tint(luminance(image), "1c0a33", "8e2457", "f2682f", "ffb648", "fff0b0")
    return np.clip(0.68 * graded + 0.38 * image * np.array([1.1, 0.75, 0.6], np.float32), 0, 1)


def fog(image: np.ndarray) -> np.ndarray:
    haze = np.array([0.80, 0.83, 0.86], np.float32)
    faded = colours(blur(image, 1.4), 0.45)
    return (0.42 * faded + 0.58 * haze).astype(np.float32)


def snow(image: np.ndarray) -> np.ndarray:
    grey = blur(luminance(image), 1.0)
    lit = np.clip((grey - np.roll(grey, 4, axis=0)) * 3 + (grey - 0.45) * 1.9, 0, 1)
    cold = 0.25 * colours(image, 0.6) + 0.75 * tint(grey, "2c4a86", "7fa6dd", "dcecff")
    lit = np.maximum(0.94 * lit, flakes(image.shape))[..., None]
    return np.clip(cold * (1 - lit) + np.array([0.96, 0.98, 1.0], np.float32) * lit, 0, 1)


def vintage(image: np.ndarray) -> np.ndarray:
    faded = 0.5 + 0.62 * (colours(image, 0.85) - 0.46)
    grey = luminance(image)[..., None]
    shadows = np.array([-0.10, 0.06, 0.10], np.float32) * (1 - grey)
    lights = np.array([0.10, 0.02, -0.08], np.float32) * grey
    return np.clip(faded + 1.6 * shadows + 1.3 * lights, 0, 1)


Look = Callable[[np.ndarray], np.ndarray]

LOOKS: dict[str, Look] = {
    "photo": photo,
    "pencil sketch": pencil_sketch,
    "charcoal": charcoal,
    "ink drawing": ink_drawing,
    "oil painting": oil_painting,
    "watercolour": watercolour,
    "pastel": pastel,
    "cartoon": cartoon,
    "comic halftone": comic_halftone,
    "pixel art": pixel_art,
    "mosaic": mosaic,
    "stained glass": stained_glass,
    "black and white": black_and_white,
    "sepia": sepia,
    "neon": neon,
    "night": night,
    "sunset": sunset,
    "fog": fog,
    "snow": snow,
    "vintage": vintage,
}
NAMES = tuple(LOOKS)


def render(name: str, image: np.ndarray) -> np.ndarray:
    """Renders the photo (uint8) in a style, at the same size. Textures start at the top left
    corner.
    """
    drawn = LOOKS[name](image.astype(np.float32) / 255)
    return (np.clip(drawn, 0, 1) * 255 + 0.5).astype(np.uint8)
