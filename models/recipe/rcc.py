"""Reads Qt's binary resource files (.rcc), in which GCompris ships its photographs."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

_DIRECTORY, _ZLIB = 2, 1
_ENTRY_BYTES = {1: 14, 2: 22, 3: 22}


def read_rcc(path: Path) -> dict[str, bytes]:
    """Returns every file of the bundle by its path, `/gcompris/src/…/kitten.webp`."""
    blob = path.read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{path} is not a Qt resource file")
    version, tree, data, names = struct.unpack(">IIII", blob[4:20])
    size = _ENTRY_BYTES[version]

    def name_at(offset: int) -> str:
        start = names + offset
        (length,) = struct.unpack(">H", blob[start : start + 2])
        return blob[start + 6 : start + 6 + 2 * length].decode("utf-16-be")

    def walk(index: int, prefix: str) -> Iterator[tuple[str, bytes]]:
        at = tree + index * size
        name_offset, flags = struct.unpack(">IH", blob[at : at + 6])
        path_here = f"{prefix}/{name_at(name_offset)}" if index else prefix
        if flags & _DIRECTORY:
            count, first = struct.unpack(">II", blob[at + 6 : at + 14])
            for child in range(first, first + count):
                yield from walk(child, path_here)
            return
        (offset,) = struct.unpack(">I", blob[at + 10 : at + 14])
        start = data + offset
        (length,) = struct.unpack(">I", blob[start : start + 4])
        raw = blob[start + 4 : start + 4 + length]
        yield path_here, zlib.decompress(raw[4:]) if flags & _ZLIB else raw

    return dict(walk(0, ""))
