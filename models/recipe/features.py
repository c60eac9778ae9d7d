"""Computes numbers that describe a style: colours, tones, edges at three scales and regular
patterns.
"""

from __future__ import annotations

import cv2
import numpy as np

_SLOPES = (0.0, 0.01, 0.03, 0.06, 0.1, 0.2, 0.4, 9.0)
# Wave vectors per 32 pixels of the dots (2, 2), the tiles (2, 0) and the leading of stained glass
# (1, 1).
_WAVES = ((1, 1), (1, -1), (2, 2), (2, -2), (2, 0), (0, 2), (4, 0), (0, 4))
_WINDOW = 256


def _shares(values: np.ndarray, bins: int, top: float = 1.0) -> list[float]:
    counts, _ = np.histogram(values, bins=bins, range=(0, top))
    return list(counts / max(1, values.size))


def _colour(image: np.ndarray) -> list[float]:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    vivid = hsv[..., 1] > 0.15
    hues = _shares(hsv[..., 0][vivid], 8, 360.0)
    return [
        *image.mean((0, 1)),
        *image.std((0, 1)),
        vivid.mean(),
        hsv[..., 1].std(),
        *_shares(hsv[..., 1], 6),
        *hues,
    ]


def _edges(grey: np.ndarray) -> list[float]:
    out: list[float] = []
    for scale in (1, 2, 4):
        size = (grey.shape[1] // scale, grey.shape[0] // scale)
        small = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
        slope = np.hypot(np.diff(small, axis=0)[:, 1:], np.diff(small, axis=1)[1:])
        counts, _ = np.histogram(slope, bins=_SLOPES)
        bend = cv2.Laplacian(small, cv2.CV_32F)
        skew = float(np.mean(bend**3) / (np.mean(bend**2) ** 1.5 + 1e-9))
        out += [*(counts / slope.size), float(np.abs(bend).mean()), skew]
    return out


def _patterns(grey: np.ndarray) -> list[float]:
    out: list[float] = []
    for axis in (0, 1):
        steps = np.abs(np.diff(grey, axis=axis)).mean(axis=1 - axis)
        for period in (8, 16):
            whole = steps[: len(steps) // period * period].reshape(-1, period).mean(axis=0)
            out += [whole.max() / (whole.mean() + 1e-6), whole.std() / (whole.mean() + 1e-6)]
    window = np.outer(np.hanning(_WINDOW), np.hanning(_WINDOW))
    square = grey[:_WINDOW, :_WINDOW]
    power = np.abs(np.fft.fft2((square - square.mean()) * window)) ** 2
    cycles = _WINDOW // 32
    for kx, ky in _WAVES:
        x, y = kx * cycles, ky * cycles
        around = np.roll(power, (3 - y, 3 - x), (0, 1))[:7, :7]
        out.append(float(np.log(around[2:5, 2:5].mean() / (np.median(around) + 1e-9) + 1e-9)))
    return out


def features(photo: np.ndarray) -> np.ndarray:
    """Returns the features of a uint8 RGB image of at least 256x256."""
    image = photo.astype(np.float32) / 255
    grey = image @ np.array([0.299, 0.587, 0.114], np.float32)
    vector = [*_colour(image), *_shares(grey, 12), *_edges(grey), *_patterns(grey)]
    return np.array(vector, np.float32)
