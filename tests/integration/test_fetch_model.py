"""`img2img-server fetch-model` against a real S3 server and a hub of one model."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from io import BytesIO
from pathlib import Path

import pytest
import urllib3
from aiohttp import web
from minio import Minio

from img2img_server.engine.family import ModelError
from img2img_server.engine.model_spec import packaged_model, read_model_spec
from img2img_server.fetch_model import fetch_model
from img2img_server.settings import PREFIX, Settings
from img2img_server.storage.s3_access import S3Access
from tests.web_peers import serving

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SMALL = {
    "model_index.json": b'{"_class_name": "StableDiffusionPipeline"}',
    "unet/config.json": b'{"sample_size": 64}',
    "unet/diffusion_pytorch_model.safetensors": bytes(range(256)) * 1000,
    "tokenizer/chat_template.jinja": b"{{ messages }}",
}


@pytest.fixture
def model_bucket(engine_settings: Callable[..., Settings]) -> Settings:
    """Yields settings for a bucket with a small model below models/tiny."""
    settings = engine_settings()
    put(settings, {f"models/tiny/{name}": data for name, data in SMALL.items()})
    return settings


def put(settings: Settings, files: dict[str, bytes]) -> None:
    with urllib3.PoolManager() as connections:
        client = S3Access.from_settings(settings).client(connections)
        if not client.bucket_exists(settings.s3_bucket):
            client.make_bucket(settings.s3_bucket)
        for name, data in files.items():
            client.put_object(settings.s3_bucket, name, BytesIO(data), len(data))


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def entries(folder: Path) -> set[Path]:
    return set(folder.iterdir())


async def test_a_model_is_fetched_from_s3_whole_and_once(
    model_bucket: Settings, tmp_path: Path
) -> None:
    source, folder = f"s3://{model_bucket.s3_bucket}/models/tiny", tmp_path / "cache" / "tiny"
    fetched = [await asyncio.to_thread(fetch_model, model_bucket, source, folder) for _ in range(2)]
    assert fetched == [True, False]
    assert content(tmp_path / "cache") == {f"tiny/{name}": data for name, data in SMALL.items()}
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
    assert content(tmp_path) == {f"tiny/{name}": data for name, data in SMALL.items()}


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
    with killed_at(".safetensors"):
        await asyncio.to_thread(fetch_model, model_bucket, source, tmp_path / "tiny")
    [draft] = entries(tmp_path)
    left = draft / "unet" / "config.json"
    changed = b"x" * len(SMALL["unet/config.json"])
    # The file has the same length, so it is not downloaded again, which the test checks below.
    left.write_bytes(changed)
    (left.parent / "diffusion_pytorch_model.safetensors").write_bytes(b"shorter")
    assert await asyncio.to_thread(fetch_model, model_bucket, source, tmp_path / "tiny")
    assert content(tmp_path / "tiny") == SMALL | {"unet/config.json": changed}


@pytest.mark.parametrize("prefix", ["models/tiny", "models/tiny-2"])
async def test_who_was_killed_begins_again_when_the_source_is_another(
    prefix: str, model_bucket: Settings, tmp_path: Path
) -> None:
    first = f"s3://{model_bucket.s3_bucket}/models/tiny"
    with killed_at(".safetensors"):
        await asyncio.to_thread(fetch_model, model_bucket, first, tmp_path / "tiny")
    others = tmp_path / ".tiny.another-host.0123456789ab"
    others.mkdir()
    corrected = SMALL | {"unet/config.json": SMALL["unet/config.json"].replace(b"64", b"32")}
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


@asynccontextmanager
async def hub(files: dict[str, bytes]) -> AsyncIterator[tuple[str, list[str]]]:
    """Yields the address of a small hub that supports downloads, and the received requests."""
    asked: list[str] = []

    async def info(_: web.Request) -> web.Response:
        siblings = [{"rfilename": name} for name in files]
        return web.json_response({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings})

    async def tree(_: web.Request) -> web.Response:
        entries = [
            {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
            for name, data in files.items()
        ]
        return web.json_response(entries)

    async def resolve(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if request.method == "GET":
            asked.append(name)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(files[name])}"'}
        return web.Response(body=files[name], headers=headers)

    async with serving(
        web.get("/api/models/owner/tiny/revision/{revision}", info),
        web.get("/api/models/owner/tiny/tree/{revision}", tree),
        web.get("/owner/tiny/resolve/{revision}/{name:.+}", resolve),
    ) as port:
        yield f"http://127.0.0.1:{port}", asked


def digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()


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
    tmp_path: Path,
) -> None:
    others = {"unet/diffusion_pytorch_model.bin": b"pickle", "tiny.safetensors": b"all in one"}
    others["unet/diffusion_pytorch_model.fp16.safetensors"] = b"half"
    home, folder = {"HF_HOME": str(tmp_path / "home")}, tmp_path / "tiny"
    async with hub(SMALL | others) as (address, asked):
        code, said = await run("owner/tiny", folder, HF_ENDPOINT=address, **home)
        assert code == 0, said
        assert sorted(asked) == sorted(SMALL)
    assert content(folder) == SMALL
    again, said = await run(
        "owner/tiny", folder, HF_ENDPOINT=address, **home
    )  # No server runs at this address any more.
    assert again == 0, said


async def test_a_model_of_no_family_on_the_hub_is_refused_before_its_weights_are_downloaded(
    tmp_path: Path,
) -> None:
    index = json.dumps({"_class_name": "FluxKontextPipeline", "unet": ["diffusers", "X"]})
    code = (
        "from img2img_server.engine.load import load_engine\n"
        "from img2img_server.engine.options import EngineOptions\n"
        "from img2img_server.settings import Settings\n"
        "load_engine(EngineOptions.of(Settings(model='owner/tiny', device='cpu')))\n"
    )
    async with hub({**SMALL, "model_index.json": index.encode()}) as (address, asked):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", code),
            env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path)},
            stderr=asyncio.subprocess.PIPE,
        )
        _, said = await process.communicate()
    sentence = "owner/tiny is made for the pipeline FluxKontextPipeline, which is not served"
    assert sentence in said.decode()
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
    assert "img2img-server fetch-model: owner/tiny cannot be fetched:" in last


def test_the_packaged_model_has_the_file_that_tells_a_model() -> None:
    assert (packaged_model() / "model_index.json").is_file()
