"""LoRA files of a prefix of a real bucket are copied into the folder of LoRAs."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from img2img_server.errors import StorageError
from img2img_server.settings import Settings
from img2img_server.storage.interface import StoredFile
from img2img_server.storage.s3_blobs import S3BlobStore, connect_blobs
from img2img_server.worker import lora_prefix
from img2img_server.worker.lora_prefix import LoraPrefix
from img2img_server.worker.server import followed_loras


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
    settings = engine_settings(lora_s3_prefix="other", lora_dir=tmp_path)
    async with connect_blobs(settings) as store:
        await store.prepare(10)
        await put(store, "other/ink.safetensors", b"ink")
        async with followed_loras(settings, store), asyncio.timeout(10):
            await refreshed.wait()
    assert names(tmp_path) == {"ink.safetensors"}


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
        async with asyncio.timeout(10):
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
    for wrong in ("generations/loras", "temp", "/", "a//b"):
        with pytest.raises(ValueError, match="lora_s3_prefix\n"):
            Settings(lora_s3_prefix=wrong, lora_dir=Path("loras"))
    assert Settings(lora_s3_prefix="models/loras/", lora_dir=Path("loras"))
