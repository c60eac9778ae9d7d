"""Creates ICC profiles for tests: matrix profiles, grey profiles and a CMYK profile."""

from __future__ import annotations

import struct

import numpy as np

# Primaries (x, y of red, green, blue) with a white of D65, and the exponent of the tone curve.
DISPLAY_P3 = ((0.680, 0.320, 0.265, 0.690, 0.150, 0.060), 0.0)
ADOBE_RGB = ((0.640, 0.330, 0.210, 0.710, 0.150, 0.060), 2.19921875)
SRGB = ((0.640, 0.330, 0.300, 0.600, 0.150, 0.060), 0.0)
_D50 = np.array([0.9642, 1.0, 0.8249])
_D65 = np.array([0.95047, 1.0, 1.08883])
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def rgb_profile(space: tuple[tuple[float, ...], float]) -> bytes:
    """Returns a matrix profile. gamma 0: the curve of sRGB."""
    (rx, ry, gx, gy, bx, by), gamma = space
    primaries = np.array([[x, y, 1 - x - y] for x, y in ((rx, ry), (gx, gy), (bx, by))]).T
    matrix = primaries * np.linalg.solve(primaries, _D65)
    cones = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ _D65))
    adapted = np.linalg.inv(_BRADFORD) @ cones @ _BRADFORD @ matrix
    tags = {b"wtpt": xyz(_D50)}
    for number, name in enumerate((b"r", b"g", b"b")):
        tags[name + b"XYZ"] = xyz(adapted[:, number])
        tags[name + b"TRC"] = curve(gamma)
    return profile(b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    return profile(b"GRAY", b"XYZ ", {b"wtpt": xyz(_D50), b"kTRC": curve(gamma)})


def cmyk_profile() -> bytes:
    """Returns a CMYK profile that differs from Pillow's: a table to Lab with two steps for each
    ink.
    """
    table = bytearray()
    for cyan, magenta, yellow, black in np.ndindex(2, 2, 2, 2):
        light = 1 - black * 0.9
        lightness = 255 * light * (1 - 0.25 * cyan - 0.3 * magenta - 0.05 * yellow)
        a = 128 + 60 * light * (magenta - cyan * 0.7)
        b = 128 + 70 * light * (yellow - cyan * 0.6)
        table += bytes(int(np.clip(value, 0, 255)) for value in (lightness, a, b))
    identity = b"".join(struct.pack(">i", int(value * 65536)) for value in np.eye(3).ravel())
    curves = bytes(range(256))
    content = b"mft1\0\0\0\0\x04\x03\x02\0" + identity + curves * 4 + bytes(table) + curves * 3
    return profile(b"CMYK", b"Lab ", {b"wtpt": xyz(_D50), b"A2B0": content}, kind=b"prtr")


def profile(
    space: bytes, connection: bytes, tags: dict[bytes, bytes], *, kind: bytes = b"mntr"
) -> bytes:
    """Returns a version 2 profile with these tags."""
    tags = {
        b"desc": b"desc\0\0\0\0\0\0\0\x05test\0" + bytes(78),
        b"cprt": b"text\0\0\0\0none\0",
    } | tags
    table, body = struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    size = 128 + len(table) + len(body)
    header = struct.pack(">I4sI4s4s4s", size, b"test", 0x02400000, kind, space, connection)
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + xyz(_D50)[8:]
    return header + bytes(128 - len(header)) + table + body


def xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve(gamma: float) -> bytes:
    if gamma:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    x = np.linspace(0, 1, 1024)
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    return b"curv\0\0\0\0" + struct.pack(">I1024H", 1024, *np.rint(linear * 65535).astype(int))
