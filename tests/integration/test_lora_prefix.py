"""LoRA files of a prefix of a real bucket are copied into the folder of LoRAs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from img2img_server.engine.catalogue import read_catalogue
from img2img_server.errors import StorageError
from img2img_server.settings import Settings
from img2img_server.storage.interface import StoredFile
from img2img_server.storage.s3_blobs import S3BlobStore, connect_blobs
from img2img_server.worker import lora_prefix
from img2img_server.worker.lora_prefix import LoraPrefix
from img2img_server.worker.model_loader import EngineLoader
from img2img_server.worker.server import followed_loras
from tests.tiny_models import WIDTH, write_sd


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


async def put(store: S3BlobStore, key: str, data: bytes) -> None:
    await store.put(key, data, "application/octet-stream")


async def test_files_below_the_prefix_are_copied_replaced_and_deleted(
    engine_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    (tmp_path / "own.safetensors").write_bytes(b"of the operator")
    async with connect_blobs(engine_settings()) as store:
        await store.prepare(10)
        await put(store, "loras/ink.safetensors", b"first")
        await put(store, "loras/own.safetensors", b"another one")
        await put(store, "loras/notes.txt", b"no LoRA")
        await put(store, "loras/deep/oil.safetensors", b"not directly below")
        await put(store, "loras-other/wax.safetensors", b"another prefix")
        found = LoraPrefix(store, "loras", tmp_path)
        await found.refresh()
        assert names(tmp_path) == {"ink.safetensors", "own.safetensors"}
        assert (tmp_path / "ink.safetensors").read_bytes() == b"first"

        before = (tmp_path / "ink.safetensors").stat()
        await LoraPrefix(store, "loras/", tmp_path).refresh()
        assert (tmp_path / "ink.safetensors").stat() == before, "an equal file is not copied again"

        await put(store, "loras/ink.safetensors", b"second")
        await found.refresh()
        assert (tmp_path / "ink.safetensors").read_bytes() == b"second"

        for key in ("loras/ink.safetensors", "loras/own.safetensors"):
            await store.delete(key)
        await found.refresh()
    assert names(tmp_path) == {"own.safetensors"}
    assert (tmp_path / "own.safetensors").read_bytes() == b"of the operator"


async def test_a_worker_follows_the_prefix_of_its_settings(
    engine_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refreshed = asyncio.Event()

    async def refresh(prefix: LoraPrefix) -> None:
        await whole_refresh(prefix)
        refreshed.set()

    whole_refresh = LoraPrefix.refresh
    monkeypatch.setattr(LoraPrefix, "refresh", refresh)
    folder = tmp_path / "made" / "loras"
    settings = engine_settings(lora_s3_prefix="other", lora_dir=folder)
    async with connect_blobs(settings) as store:
        await store.prepare(10)
        await put(store, "other/ink.safetensors", b"ink")
        async with followed_loras(store, settings), asyncio.timeout(30):
            await refreshed.wait()
    assert names(folder) == {"ink.safetensors"}


class Failing:
    """A store that fails from its second listing on, and in the middle of one copy."""

    def __init__(self) -> None:
        self.listings = 0
        self.listed = asyncio.Event()

    async def files(self, prefix: str) -> list[StoredFile]:
        self.listings += 1
        if self.listings == 4:
            self.listed.set()
        if self.listings > 1:
            raise StorageError("the object store cannot be reached")
        oil = [StoredFile(f"loras/{name}.safetensors", "tag", 4) for name in ("oil", "wax")]
        return [StoredFile("loras/ink.safetensors", "tag", 4), *oil]

    async def save(self, key: str, file: Path) -> None:
        await asyncio.to_thread(file.write_bytes, b"ha")
        if key == "loras/wax.safetensors":
            return
        raise StorageError("the object store closed the connection")


async def test_files_stay_while_the_bucket_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lora_prefix, "PAUSE_SECONDS", 0.0)
    (tmp_path / "oil.safetensors").write_bytes(b"oil")
    (tmp_path / ".from-bucket.json").write_text('{"oil.safetensors": "tag"}')
    store = Failing()
    with caplog.at_level(logging.WARNING):
        following = asyncio.create_task(LoraPrefix(store, "loras", tmp_path).follow())
        async with asyncio.timeout(30):
            await store.listed.wait()
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
    assert names(tmp_path) == {"oil.safetensors", "wax.safetensors"}, "no half copied file"
    assert not [path for path in os.listdir(tmp_path) if path.endswith(".part")]
    warnings = [record.getMessage() for record in caplog.records]
    assert [text.count("closed") for text in warnings] == [1, 0], "each failure is logged once"


class Versions:
    """A store with one file, whose content is its tag."""

    tag = "first"
    partial = Path()

    async def files(self, prefix: str) -> list[StoredFile]:
        return [StoredFile("loras/ink.safetensors", self.tag, 5)]

    async def save(self, key: str, file: Path) -> None:
        self.partial = file
        await asyncio.to_thread(file.write_text, self.tag)


async def test_a_file_whose_copy_could_not_be_noted_is_still_one_of_the_bucket(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Versions()
    prefix, target = LoraPrefix(store, "loras", tmp_path), tmp_path / "ink.safetensors"

    def write(self: LoraPrefix, copied: Mapping[str, str]) -> None:
        if target.exists():
            raise OSError("no space left on device")
        whole_write(self, copied)

    whole_write = LoraPrefix._write_copied
    with monkeypatch.context() as patched:
        patched.setattr(LoraPrefix, "_write_copied", write)
        with pytest.raises(OSError, match="no space"):
            await prefix.refresh()
    assert target.read_text() == "first"
    store.tag = "second"
    await prefix.refresh()
    assert target.read_text() == "second"
    assert str(os.getpid()) in store.partial.name, "two processes do not share a partial file"


def test_the_prefix_needs_a_folder() -> None:
    with pytest.raises(ValueError, match="IMG2IMG_LORA_S3_PREFIX"):
        Settings(lora_s3_prefix="loras")
    for wrong in ("generations/loras", "temp", "/", "a//b", "a/../b", "."):
        with pytest.raises(ValueError, match="lora_s3_prefix\n"):
            Settings(lora_s3_prefix=wrong, lora_dir=Path("loras"))
    assert Settings(lora_s3_prefix="models/loras/", lora_dir=Path("loras"))


def lora_bytes(seed: int) -> bytes:
    """Returns a LoRA file for the text encoder of a small model."""
    layer = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    random = torch.Generator().manual_seed(seed)
    down, up = (torch.randn(shape, generator=random) for shape in ((2, WIDTH), (WIDTH, 2)))
    return save({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up})


async def test_each_model_of_a_catalogue_offers_the_files_of_its_own_prefix(
    engine_settings: Callable[..., Settings],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A file that is no LoRA, and a folder that cannot be written, change nothing for others."""
    write_sd(tmp_path / "model")
    (tmp_path / "blocked").write_text("a file in place of the folder")
    (tmp_path / "models.toml").write_text(
        '[[models]]\nname = "a"\nsource = "model"\nlora_s3_prefix = "entries/a"\n'
        '[[models]]\nname = "c"\nsource = "model"\nlora_dir = "blocked"\n'
        'lora_s3_prefix = "entries/c"\n'
        '[[models]]\nname = "b"\nsource = "model"\nlora_dir = "b"\nlora_s3_prefix = "entries/b/"\n'
    )
    settings = engine_settings(
        models_file=tmp_path / "models.toml",
        lora_dir=tmp_path / "all",
        warm_up_sizes="64x64",
        device="cpu",
    )
    refreshed: dict[str, asyncio.Event] = {name: asyncio.Event() for name in ("a", "b")}
    whole_refresh = LoraPrefix.refresh

    async def refresh(prefix: LoraPrefix) -> None:
        await whole_refresh(prefix)
        refreshed[prefix._folder.name].set()

    monkeypatch.setattr(LoraPrefix, "refresh", refresh)
    models = read_catalogue(settings)
    async with connect_blobs(settings) as store:
        await store.prepare(10)
        await put(store, "entries/a/ink.safetensors", lora_bytes(1))
        await put(store, "entries/a/broken.safetensors", b"no LoRA")
        await put(store, "entries/b/oil.safetensors", lora_bytes(2))
        async with followed_loras(store, *(each.settings for each in models)), asyncio.timeout(30):
            for event in refreshed.values():
                await event.wait()
    assert names(tmp_path / "all/entries/a") == {"ink.safetensors", "broken.safetensors"}
    assert names(tmp_path / "b") == {"oil.safetensors"}
    assert "lora_prefix_unreadable: entries/c/" in caplog.text
    loader = EngineLoader(settings)
    for model, offered, refused in zip(models, ("ink", "", "oil"), (1, 0, 0), strict=True):
        loaded = await loader.load(model)
        info = loaded.engine.model
        await loader.unload(loaded)
        assert info.loras == ((offered,) if offered else ())
        assert len(info.refused_loras) == refused
