"""`img2img-server fetch-model` against a real S3 server and a hub of one model."""

from __future__ import annotations

import asyncio
import errno
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import urllib3
from huggingface_hub import constants
from minio import Minio

from img2img_server.engine.family import ModelError
from img2img_server.engine.load import load_engine
from img2img_server.engine.model_spec import packaged_model, read_model_spec
from img2img_server.engine.options import EngineOptions
from img2img_server.fetch_model import LIST, fetch_model
from img2img_server.setting_names import PREFIX
from img2img_server.settings import Settings
from img2img_server.storage.s3_access import S3Access
from tests.fake_hub import hub, use_hub
from tests.tiny_models import write_sd

LAST = "vae/diffusion_pytorch_model.safetensors"  # the file that is listed last


@functools.cache
def small() -> dict[str, bytes]:
    """Returns the files of a small model that loads."""
    with tempfile.TemporaryDirectory() as folder:
        found = content(write_sd(Path(folder) / "model"))
    found = {name: data for name, data in found.items() if not name.startswith("words/")}
    return {**found, "tokenizer/chat_template.jinja": b"{{ messages }}"}


@pytest.fixture
def model_bucket(engine_settings: Callable[..., Settings]) -> Settings:
    """Yields settings for a bucket with a small model below models/tiny."""
    settings = engine_settings()
    put(settings, {f"models/tiny/{name}": data for name, data in small().items()})
    return settings


def put(settings: Settings, files: dict[str, bytes]) -> None:
    with urllib3.PoolManager() as connections:
        client = S3Access.from_settings(settings).client(connections)
        if not client.bucket_exists(settings.s3_bucket):
            client.make_bucket(settings.s3_bucket)
        for name, data in files.items():
            client.put_object(settings.s3_bucket, name, BytesIO(data), len(data))


def content(folder: Path) -> dict[str, bytes]:
    """Returns the files of a folder by name, without the lists of those that were fetched."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LIST)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def entries(folder: Path) -> set[Path]:
    return set(folder.iterdir())


async def test_a_model_is_fetched_from_s3_whole_and_once(
    model_bucket: Settings, tmp_path: Path
) -> None:
    source, folder = f"s3://{model_bucket.s3_bucket}/models/tiny", tmp_path / "cache" / "tiny"
    fetched = [await asyncio.to_thread(fetch_model, model_bucket, source, folder) for _ in range(2)]
    assert fetched == [True, False]
    assert content(tmp_path / "cache") == {f"tiny/{name}": data for name, data in small().items()}
    assert read_model_spec(str(folder)).name == "tiny"


async def test_of_many_who_fetch_at_the_same_time_one_wins_and_all_find_it(
    model_bucket: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = f"s3://{model_bucket.s3_bucket}/models/tiny/", tmp_path / "tiny"
    names = iter(f"pod-{number}" for number in range(4))
    monkeypatch.setattr("socket.gethostname", lambda: next(names))
    fetched = await asyncio.gather(
        *(asyncio.to_thread(fetch_model, model_bucket, source, folder) for _ in range(4))
    )
    assert fetched.count(True) == 1
    assert content(tmp_path) == {f"tiny/{name}": data for name, data in small().items()}


def damage(folder: Path, how: str) -> None:
    """Leaves a fetched model incomplete."""
    if how == "cut off":
        path = folder / LAST
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "missing":
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    elif how == "no text":
        (folder / "unet" / "config.json").write_bytes(b"\xff" * 9)
    else:
        (folder / "model_index.json").unlink()


@pytest.mark.parametrize("how", ["cut off", "missing", "no text", "no index"])
async def test_a_fetched_model_that_became_incomplete_is_fetched_again(
    how: str, model_bucket: Settings, tmp_path: Path
) -> None:
    source, folder = f"s3://{model_bucket.s3_bucket}/models/tiny", tmp_path / "tiny"
    await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    damage(folder, how)
    assert content(folder) != small()
    again = [await asyncio.to_thread(fetch_model, model_bucket, source, folder) for _ in range(2)]
    assert again == [True, False]
    assert content(folder) == small()
    assert entries(tmp_path) == {folder}


async def test_a_file_that_was_added_to_a_fetched_model_is_kept(
    model_bucket: Settings, tmp_path: Path
) -> None:
    source, folder = f"s3://{model_bucket.s3_bucket}/models/tiny", tmp_path / "tiny"
    await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    (folder / "img2img.toml").write_text("name = 'mine'\n")
    assert not await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    damage(folder, "cut off")
    left = content(tmp_path)
    with pytest.raises(ModelError, match=r"tiny is no complete model .*such as img2img\.toml"):
        await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    assert content(tmp_path) == left


def fill(folder: Path, kind: str) -> None:
    """Writes files that were not fetched into a folder."""
    if kind == "other models":
        files = {f"{name}/{file}": data for name in "ab" for file, data in small().items()}
    elif kind == "pickles":
        files = {name.replace("safetensors", "bin"): data for name, data in small().items()}
    else:
        unserved = small()["model_index.json"].replace(b"StableDiffusionPipeline", b"OwnPipeline")
        files = small() | {"model_index.json": unserved, "img2img.toml": b"family = 'own'"}
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("other models", "models is no complete model .*such as a/.*: name a folder that does not"),
        ("pickles", "models/.* is a pickle.*IMG2IMG_ALLOW_PICKLES"),
        ("unserved", "models is no complete model .*OwnPipeline"),
    ],
)
async def test_a_folder_with_files_that_were_not_fetched_is_left_as_it_is(
    kind: str, said: str, model_bucket: Settings, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    fill(folder, kind)
    left = content(tmp_path)
    source = f"s3://{model_bucket.s3_bucket}/models/tiny"
    with pytest.raises(ModelError, match=said):
        await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    assert content(tmp_path) == left
    assert entries(tmp_path) == {folder}


async def test_a_fetched_model_that_cannot_be_read_now_is_left_as_it_is(
    model_bucket: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = f"s3://{model_bucket.s3_bucket}/models/tiny", tmp_path / "tiny"
    await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    whole = Path.open

    def fail(path: Path, *args: Any, **options: Any) -> Any:
        if str(path) == str(folder / LAST):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return whole(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(ModelError, match=rf"{LAST} cannot be read: Input/output error"):
        await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    monkeypatch.undo()
    assert content(tmp_path) == {f"tiny/{name}": data for name, data in small().items()}


@pytest.mark.parametrize("is_whole", [True, False])
async def test_what_another_process_writes_before_the_folder_is_replaced_is_kept(
    is_whole: bool, model_bucket: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = f"s3://{model_bucket.s3_bucket}/models/tiny", tmp_path / "tiny"
    await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    damage(folder, "cut off")
    rename = Path.rename

    def rename_late(path: Path, target: Path) -> Path:
        if path == folder:
            if is_whole:
                (folder / LAST).write_bytes(small()[LAST])
            (folder / "img2img.toml").write_text("name = 'mine'\n")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_late)
    fetching = asyncio.to_thread(fetch_model, model_bucket, source, folder)
    if is_whole:
        assert not await fetching
        assert entries(tmp_path) == {folder}
    else:
        with pytest.raises(ModelError, match=rf"{folder} is no complete .*such as img2img\.toml"):
            await fetching
    assert (folder / "img2img.toml").read_text() == "name = 'mine'\n"


async def test_an_empty_folder_is_filled(model_bucket: Settings, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    source = f"s3://{model_bucket.s3_bucket}/models/tiny"
    assert await asyncio.to_thread(fetch_model, model_bucket, source, folder)
    assert content(folder) == small()


@contextmanager
def killed_at(name: str) -> Iterator[None]:
    """Kills the download at the file with that name, which is listed last."""
    whole = Minio.fget_object

    def fget(client: Minio, bucket: str, key: str, path: str) -> object:
        if key.endswith(name):
            raise OSError("killed")
        return whole(client, bucket, key, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Minio, "fget_object", fget)
        with pytest.raises(ModelError, match="killed"):
            yield


async def test_who_was_killed_goes_on_where_it_was(model_bucket: Settings, tmp_path: Path) -> None:
    source = f"s3://{model_bucket.s3_bucket}/models/tiny"
    with killed_at(LAST):
        await asyncio.to_thread(fetch_model, model_bucket, source, tmp_path / "tiny")
    [draft] = entries(tmp_path)
    left = draft / "unet" / "config.json"
    changed = left.read_bytes().replace(b'"sample_size": 8', b'"sample_size": 9')
    assert changed != left.read_bytes()
    # The file has the same length, so it is not downloaded again, which the test checks below.
    left.write_bytes(changed)
    (left.parent / "diffusion_pytorch_model.safetensors").write_bytes(b"shorter")
    assert await asyncio.to_thread(fetch_model, model_bucket, source, tmp_path / "tiny")
    assert content(tmp_path / "tiny") == small() | {"unet/config.json": changed}


@pytest.mark.parametrize("prefix", ["models/tiny", "models/tiny-2"])
async def test_who_was_killed_begins_again_when_the_source_is_another(
    prefix: str, model_bucket: Settings, tmp_path: Path
) -> None:
    first = f"s3://{model_bucket.s3_bucket}/models/tiny"
    with killed_at(LAST):
        await asyncio.to_thread(fetch_model, model_bucket, first, tmp_path / "tiny")
    others = tmp_path / ".tiny.another-host.0123456789ab"
    others.mkdir()
    corrected = small() | {
        "unet/config.json": small()["unet/config.json"].replace(b'e": 8', b'e": 9')
    }
    put(model_bucket, {f"{prefix}/{name}": data for name, data in corrected.items()})
    source = f"s3://{model_bucket.s3_bucket}/{prefix}"
    assert await asyncio.to_thread(fetch_model, model_bucket, source, tmp_path / "tiny")
    assert content(tmp_path / "tiny") == corrected
    assert entries(tmp_path) == {tmp_path / "tiny", others}


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("models/nothing", "there is nothing at"),
        ("models/tiny/unet", "is no diffusers model: it has no model_index.json"),
    ],
)
async def test_what_is_no_model_is_refused_and_leaves_no_folder(
    model_bucket: Settings, tmp_path: Path, prefix: str, said: str
) -> None:
    source = f"s3://{model_bucket.s3_bucket}/{prefix}"
    with pytest.raises(ModelError, match=said):
        await asyncio.to_thread(fetch_model, model_bucket, source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


async def test_a_bucket_that_is_not_there_is_named(model_bucket: Settings, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"s3://elsewhere/x cannot be fetched: .*NoSuchBucket"):
        await asyncio.to_thread(fetch_model, model_bucket, "s3://elsewhere/x", tmp_path / "x")


async def run(*arguments: object, **environment: str) -> tuple[int, str]:
    """Runs the command as a process. Returns its exit code and its output."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(PREFIX)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "img2img_server", "fetch-model", *map(str, arguments)),
        env={**clean, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


async def test_a_model_is_fetched_from_the_hub_without_pickles_and_second_precisions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = {"unet/diffusion_pytorch_model.bin": b"pickle", "tiny.safetensors": b"all in one"}
    others["unet/diffusion_pytorch_model.fp16.safetensors"] = b"half"
    home, folder = {"HF_HOME": str(tmp_path / "home")}, tmp_path / "tiny"
    async with hub(small() | others) as (address, asked):
        code, said = await run("owner/tiny", folder, HF_ENDPOINT=address, **home)
        assert code == 0, said
        assert sorted(asked) == sorted(small())
    assert content(folder) == small()
    # No server runs at this address any more.
    use_hub(monkeypatch, address)
    await asyncio.to_thread(fetch_model, Settings(), "owner/tiny", folder)


async def test_a_model_of_no_family_on_the_hub_is_refused_before_its_weights_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = json.dumps({"_class_name": "FluxKontextPipeline", "unet": ["diffusers", "X"]})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    options = EngineOptions.of(Settings(model="owner/tiny", device="cpu"))
    sentence = "owner/tiny is made for the pipeline FluxKontextPipeline, which is not served"
    async with hub({**small(), "model_index.json": index.encode()}) as (address, asked):
        use_hub(monkeypatch, address)
        with pytest.raises(ModelError, match=sentence):
            await asyncio.to_thread(load_engine, options)
    assert [name for name in asked if not name.endswith(".json")] == []
    assert "model_index.json" in asked


async def test_the_command_says_in_one_sentence_what_went_wrong(tmp_path: Path) -> None:
    code, said = await run(
        "owner/tiny",
        tmp_path / "m",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert "img2img-server fetch-model: owner/tiny cannot be downloaded: no connection to" in last


def test_the_packaged_model_has_the_file_that_tells_a_model() -> None:
    assert (packaged_model() / "model_index.json").is_file()
