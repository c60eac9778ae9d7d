"""Weight files: which are chosen, and the sentence for each broken one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from img2img_server.engine.family import ModelError
from img2img_server.engine.weight_files import choose_weights, read_header, weights_of

UNET = "diffusion_pytorch_model"
WHOLE = save({"a.weight": torch.ones(2, 3), "b.bias": torch.ones(4, dtype=torch.float16)})


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([f"{UNET}.safetensors", f"{UNET}.fp16.safetensors"], [f"{UNET}.safetensors"]),
        ([f"{UNET}.non_ema.safetensors", f"{UNET}.fp16.safetensors"], [f"{UNET}.fp16.safetensors"]),
        ([f"{UNET}.bin", f"{UNET}.fp16.safetensors"], [f"{UNET}.fp16.safetensors"]),
        (["model.bf16.safetensors", "model.fp16.safetensors"], ["model.fp16.safetensors"]),
        (["pytorch_model.bin", "pytorch_model.fp16.bin"], ["pytorch_model.bin"]),
        (["model.ema.safetensors"], ["model.ema.safetensors"]),
        (["config.json", "adapter_model.safetensors"], None),
        (
            [
                *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
                *("model.safetensors.index.json", "model.fp16.safetensors"),
            ],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        ),
        (
            ["model.fp16-00001-of-00001.safetensors", "model.safetensors.index.fp16.json"],
            ["model.fp16-00001-of-00001.safetensors"],
        ),
        (
            [f"{UNET}-00001-of-00001.fp16.safetensors", f"{UNET}.safetensors.index.fp16.json"],
            [f"{UNET}-00001-of-00001.fp16.safetensors"],
        ),
    ],
    ids=lambda value: "+".join(value) if value else "none",
)
def test_the_best_weights_of_a_folder_are_chosen(
    names: list[str], chosen: list[str] | None
) -> None:
    found = choose_weights(names)

    assert (list(found.files) if found else None) == chosen


def test_complete_weights_come_before_better_ones_that_lack_shards() -> None:
    names = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    found = choose_weights([*names, "model.fp16.safetensors"])

    assert found is not None
    assert found.files == ("model.fp16.safetensors",)


def test_a_header_has_the_tensors_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(WHOLE)
    header = read_header(tmp_path / "x.safetensors")

    assert {name: (entry.dtype, entry.shape) for name, entry in header.items()} == {
        "a.weight": ("F32", (2, 3)),
        "b.bias": ("F16", (4,)),
    }


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
BROKEN = {
    "empty": (b"", "is empty: fetch the file again"),
    "lfs": (POINTER, "is a pointer of Git LFS .* run `git lfs pull`"),
    "page": (b"<!DOCTYPE html><html>not found", "is an HTML or XML page"),
    "pickle": (b"PK\x03\x04" + b"x/data.pkl", "is a pickle with the name of a safetensors file"),
    "archive": (b"PK\x03\x04" + bytes(100), "is an archive: unpack it"),
    "cut": (WHOLE[:-1], f"is cut off: it has {len(WHOLE) - 1} bytes instead of {len(WHOLE)}"),
    "cut-header": (WHOLE[:40], "is cut off in its header, after 40 bytes"),
    "cut-length": (WHOLE[:5], "is not a safetensors file"),
    "longer": (WHOLE + b"x", "has bytes after its end"),
    "text": (b"these are no weights at all", "is not a safetensors file"),
    "no-tensors": (save({}), "has no tensors"),
    "no-offsets": ((17).to_bytes(8, "little") + b'{"a": {"x": "y"}}', "its header is damaged"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, kind: str) -> None:
    data, sentence = BROKEN[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)

    with pytest.raises(ModelError, match=sentence) as caught:
        weights_of(tmp_path)
    assert str(file) in str(caught.value)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    (tmp_path / shards[0]).write_bytes(WHOLE)
    with pytest.raises(ModelError, match=r"no index of them, model\.safetensors\.index\.json"):
        weights_of(tmp_path)
    index = {"weight_map": {"a.weight": shards[0], "b.bias": shards[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(ModelError, match=f"lacks {shards[1]}, which model.safetensors.index.json"):
        weights_of(tmp_path)


def test_a_pickle_is_refused_unless_pickles_are_allowed(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")

    with pytest.raises(ModelError, match=r"bin is a pickle.*IMG2IMG_ALLOW_PICKLES"):
        weights_of(tmp_path)
    assert weights_of(tmp_path, allow_pickles=True).is_pickle


def test_weights_with_unknown_names_are_named(tmp_path: Path) -> None:
    (tmp_path / "my_unet.safetensors").write_bytes(WHOLE)

    with pytest.raises(ModelError, match=r"has no weights, only my_unet\.safetensors"):
        weights_of(tmp_path)
