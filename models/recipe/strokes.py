"""Functions from which the styles are built. Images are RGB float32 in 0..1, height x width x 3.

Strokes are derived from the image. The few regular patterns (dots, tiles, leading) repeat every
16 or 32 pixels from the image's corner: 2 or 4 cells of the 8-pixel latent grid. A pattern that
repeats within one cell would give equal latents everywhere, and no decoder could draw it.
"""

from __future__ import annotations

import cv2
import numpy as np

PERIOD = 32


def luminance(image: np.ndarray) -> np.ndarray:
    return image @ np.array([0.299, 0.587, 0.114], np.float32)


def rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2).astype(np.float32)


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(image, (0, 0), sigma)


def stretch(grey: np.ndarray) -> np.ndarray:
    """Returns the local contrast: each pixel compared with its wide neighbourhood."""
    return np.clip(0.5 + (grey - blur(grey, 24)) * 1.4 + (grey - 0.5) * 0.5, 0, 1)


def smooth(image: np.ndarray, passes: int = 3, colour: float = 0.12, space: int = 7) -> np.ndarray:
    """Smooths regions and keeps edges."""
    for _ in range(passes):
        image = cv2.bilateralFilter(image.astype(np.float32), space, colour, space)
    return image


def edges(image: np.ndarray, sigma: float = 1.2, gain: float = 9.0) -> np.ndarray:
    """Returns the strength 0..1 of dark lines, thick enough for the latents."""
    grey = luminance(image)
    line = blur(grey, sigma * 1.6) - blur(grey, sigma)
    return np.clip(blur(np.maximum(line, 0), 0.7) * gain, 0, 1)


def outline(image: np.ndarray, threshold: float = 0.35, width: float = 1.0) -> np.ndarray:
    """Returns the strength 0..1 of bold contours from the colour gradient."""
    soft = blur(smooth(image, 2), 1.2)
    dx, dy = cv2.Sobel(soft, -1, 1, 0), cv2.Sobel(soft, -1, 0, 1)
    magnitude = np.sqrt((dx**2 + dy**2).sum(axis=2))
    return np.clip((blur(magnitude, width) - threshold) / threshold, 0, 1)


def colours(image: np.ndarray, saturation: float, levels: int = 0) -> np.ndarray:
    """Scales the saturation; `levels` > 0 posterises the brightness, not the hue."""
    grey = luminance(image)[..., None]
    image = np.clip(grey + (image - grey) * saturation, 0, 1)
    if levels:
        value = image.max(axis=2, keepdims=True)
        scaled = value * levels
        floor = np.floor(scaled)
        step = np.clip((scaled - floor - 0.5) * 6 + 0.5, 0, 1)
        image = np.clip(image * (floor + step) / levels / (value + 1e-3), 0, 1)
    return image.astype(np.float32)


def lattice(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pixel coordinates (x, y) of the repeating cell."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return x % PERIOD, y % PERIOD


def flakes(shape: tuple[int, ...]) -> np.ndarray:
    """Returns soft white dots 0..1, scattered over the repeating cell."""
    x, y = lattice(shape)
    out = np.zeros(shape[:2], np.float32)
    for left, top, radius in ((5, 7, 3.2), (21, 3, 2.2), (13, 20, 2.6), (27, 25, 3.0)):
        dx, dy = (np.abs(axis - at) for axis, at in ((x, left), (y, top)))
        far = np.hypot(np.minimum(dx, PERIOD - dx), np.minimum(dy, PERIOD - dy))
        out = np.maximum(out, np.clip(radius + 0.5 - far, 0, 1))
    return out


def strokes(grey: np.ndarray, length: int = 9, gain: float = 1.0) -> np.ndarray:
    """Returns the fine detail of the image smeared along a diagonal, mean about 0."""
    detail = grey - blur(grey, 2.5)
    kernel = np.eye(length, dtype=np.float32)[::-1] / length
    return gain * cv2.filter2D(detail, -1, np.ascontiguousarray(kernel))


def cells(image: np.ndarray, size: int) -> np.ndarray:
    """Fills each size x size square with its mean colour."""
    height, width = image.shape[:2]
    padded = cv2.copyMakeBorder(
        image, 0, -height % size, 0, -width % size, borderType=cv2.BORDER_REFLECT
    )
    small = cv2.resize(
        padded, (padded.shape[1] // size, padded.shape[0] // size), interpolation=cv2.INTER_AREA
    )
    return np.repeat(np.repeat(small, size, axis=0), size, axis=1)[:height, :width]


def dabs(image: np.ndarray, radius: int, shades: int = 40) -> np.ndarray:
    """Gives each pixel the mean colour of the most frequent shade around it, like a flat brush."""
    shade = np.floor(luminance(image) * (shades - 1e-3))
    size = (2 * radius + 1, 2 * radius + 1)
    most = np.zeros(image.shape[:2], np.float32)
    out = image.copy()
    for value in range(shades):
        inside = (shade == value).astype(np.float32)
        share = cv2.blur(inside, size)
        wins = share > most
        mean = cv2.blur(image * inside[..., None], size) / np.maximum(share, 1e-6)[..., None]
        out[wins], most[wins] = mean[wins], share[wins]
    return out


def tint(grey: np.ndarray, *stops: str) -> np.ndarray:
    """Maps 0..1 to a gradient through the hex colours."""
    table = np.array([[int(s[i : i + 2], 16) / 255 for i in (0, 2, 4)] for s in stops], np.float32)
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(grey, at, table[:, c]) for c in range(3)], -1).astype(np.float32)
