"""Packs data and weights for a training machine into small pieces, and unpacks the weights.

`python -m recipe.pack pack FOLDER` writes the photos (JPEG), the tokenizer and the current weights;
`weights FOLDER` the tokenizer and weights only; `unpack FOLDER` writes them into build/. A piece
has at most 16 MB, for channels with such a limit. Weights are in half precision and without the
state of the optimizers: training resumes from their running average.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path

import torch
from PIL import Image

from recipe import paths
from recipe.autoencoder import CHECKPOINT as DECODER
from recipe.checkpoint import half, lay_down, read, single
from recipe.encoder import ENCODER, encoder_state
from recipe.photos import photos
from recipe.runtime import save
from recipe.train import CHECKPOINT as DENOISER

PIECE_BYTES = 16_000_000
LONGEST_SIDE = 1024  # pixels of the longer side of a packed photo
TEXT_FILES = ("vocab.json", "merges.txt")


def _weights() -> bytes | None:
    """Returns the encoder and, if they are trained, the decoder and the denoiser."""
    if not ENCODER.exists():
        return None
    kept: dict[str, object] = {"encoder": half(encoder_state())}
    for path in (DECODER, DENOISER):
        if path.exists():
            state = read(path)
            carried = {"average": half(state["average"])}
            kept[path.stem] = {**carried, "step": state["step"], "spent": state["spent"]}
    buffer = io.BytesIO()
    torch.save(kept, buffer)
    return buffer.getvalue()


def _jpeg(path: Path) -> bytes:
    image = Image.open(path).convert("RGB")
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=94)
    return buffer.getvalue()


def pack(folder: Path, with_photos: bool) -> list[Path]:
    """Writes the pieces; returns their names, such as `atelier.000`."""
    content: dict[str, bytes] = {}
    if with_photos:
        for photo in photos():
            content[f"photos/{photo.split}/{photo.id}.jpg"] = _jpeg(photo.path)
    for name in TEXT_FILES:
        if (paths.TEXT / name).exists():
            content[f"text/{name}"] = (paths.TEXT / name).read_bytes()
    weights = _weights()
    if weights is not None:
        content["weights.pt"] = weights
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    whole = buffer.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("atelier.[0-9][0-9][0-9]"):
        stale.unlink()
    pieces = []
    for number, start in enumerate(range(0, len(whole), PIECE_BYTES)):
        piece = folder / f"atelier.{number:03d}"
        piece.write_bytes(whole[start : start + PIECE_BYTES])
        pieces.append(piece)
    print(f"{len(content)} files, {len(whole) / 1e6:.1f} MB in {len(pieces)} pieces")
    return pieces


def unpack(folder: Path) -> None:
    """Replaces the content of build/ by that of the pieces."""
    pieces = sorted(folder.glob("atelier.[0-9][0-9][0-9]"))
    whole = b"".join(piece.read_bytes() for piece in pieces)
    with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
        for member in archive:
            file = archive.extractfile(member)
            if file is not None:
                _lay_down(member.name, file.read())


def _lay_down(name: str, data: bytes) -> None:
    target = paths.BUILD / name
    if name == "weights.pt":
        kept = torch.load(io.BytesIO(data), weights_only=True)
        save(single(kept["encoder"]), ENCODER)
        for path in (DECODER, DENOISER):
            if path.stem in kept:
                lay_down(path, **kept[path.stem])
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if name.startswith("photos/"):
        Image.open(io.BytesIO(data)).save(target.with_suffix(".png"), compress_level=1)
    else:
        target.write_bytes(data)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("pack", "weights", "unpack"))
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.what == "unpack":
        unpack(args.folder)
    else:
        pack(args.folder, with_photos=args.what == "pack")
