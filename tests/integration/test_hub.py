"""Models of a hub: they are read like folders, and each failure has a sentence of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog
import torch
from aiohttp import web
from huggingface_hub import constants

from img2img_server.engine import hub as hub_module
from img2img_server.engine.diffusers.load import load_tiny_vae
from img2img_server.engine.diffusers.local_model import LocalModel, find_model
from img2img_server.engine.family import ModelError
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.worker.downloads import forget_downloads
from tests.fake_hub import hub, use_hub

TOML = b"name = 'pebble'\n[defaults]\nnum_inference_steps = 3\n"
TURBO = {
    "model_index.json": json.dumps(
        {
            "_class_name": "StableDiffusionXLPipeline",
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"],
            "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        }
    ).encode(),
    "scheduler/scheduler_config.json": json.dumps(
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"}
    ).encode(),
    "unet/config.json": b'{"sample_size": 64}',
    "unet/diffusion_pytorch_model.fp16.safetensors": b"half of the UNet",
    "unet/diffusion_pytorch_model.non_ema.safetensors": b"others",
    "vae/config.json": b"{}",
    "vae/diffusion_pytorch_model.safetensors": b"weights",
    "vae/diffusion_pytorch_model.fp16.safetensors": b"half",
    "safety_checker/model.safetensors": b"unused",
    "sd_xl_turbo_1.0.safetensors": b"all in one",
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    yield
    structlog.reset_defaults()


async def find(source: str = "owner/tiny") -> LocalModel:
    return await asyncio.to_thread(find_model, source)


@pytest.mark.parametrize("source", ["owner/tiny", "owner/tiny@v2", "owner/tiny@refs/pr/1"])
async def test_a_hub_id_is_read_like_the_folder(
    source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hub({**TURBO, "img2img.toml": TOML}) as (address, asked):
        use_hub(monkeypatch, address)
        found = await find(source)
    spec = read_model_spec(source, found)

    assert (spec.name, spec.family, spec.scheduler, spec.native_size) == (
        *("pebble", "sdxl", "euler_a"),
        512,
    )
    assert (spec.num_inference_steps, spec.guidance_scale) == (3, 0.0)
    used = set(TURBO) - {
        *("unet/diffusion_pytorch_model.non_ema.safetensors", "sd_xl_turbo_1.0.safetensors"),
        *("vae/diffusion_pytorch_model.fp16.safetensors", "safety_checker/model.safetensors"),
    }
    assert sorted(asked) == sorted({*used, "img2img.toml"})

    # The hub is away now; the cache has the revision by its name.
    use_hub(monkeypatch, "http://127.0.0.1:9")
    assert (await find(source)).path == found.path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert (await find(source)).path == found.path
    cache = Path(constants.HF_HUB_CACHE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert await asyncio.to_thread(forget_downloads, source, cache) > 0
    assert not found.path.exists()


def error(status: int, code: str = "", message: str = "") -> web.Response:
    headers = {key: value for key, value in (("X-Error-Code", code),) if value}
    return web.Response(status=status, headers={**headers, "X-Error-Message": message or "no"})


BAD_TOKEN = "Invalid credentials in Authorization header"
FAULTS = {
    "gated": (error(401, "GatedRepo"), "", r"is gated, .* \(401\): ask for access .* set HF_TOKEN"),
    "not-admitted": (error(403, "GatedRepo"), "hf_x", r"is gated, .*403.* the account of HF_TOKEN"),
    "missing": (error(404, "RepoNotFound"), "", r"there is no model owner/tiny at .* set HF_TOKEN"),
    "hidden": (error(401, "RepoNotFound"), "", "there is no model owner/tiny at"),
    "token": (error(401, message=BAD_TOKEN), "hf_x", "refused the token in HF_TOKEN"),
    "revision": (error(404, "RevisionNotFound"), "", "owner/tiny has no revision main at"),
    "limited": (error(429), "", "limits the number of requests"),
    "broken": (error(503), "", r"is out of order \(503\): try again later"),
    "page": (web.Response(text="<html>"), "", "cannot be downloaded: JSONDecodeError"),
}


@pytest.mark.parametrize("kind", FAULTS)
async def test_each_failure_of_a_hub_has_a_sentence_of_its_own(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response, token, sentence = FAULTS[kind]
    if token:
        monkeypatch.setenv("HF_TOKEN", token)

    async def fault(_: web.Request) -> web.StreamResponse:
        return web.Response(
            status=response.status, body=response.body, headers=response.headers.copy()
        )

    async with hub(TURBO, fault) as (address, _):
        use_hub(monkeypatch, address)
        with pytest.raises(ModelError, match=sentence) as caught:
            await find()
    assert "\n" not in str(caught.value)


async def test_files_that_only_need_access_are_reported_as_gated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fault(request: web.Request) -> web.StreamResponse | None:
        return error(401, "GatedRepo") if "resolve" in request.path else None

    async with hub(TURBO, fault) as (address, _):
        use_hub(monkeypatch, address)
        with pytest.raises(ModelError, match=r"is gated, .* set HF_TOKEN"):
            await find()


async def test_a_hub_that_does_not_answer_is_reported_within_the_stated_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never, called = asyncio.Event(), asyncio.Event()

    async def fault(_: web.Request) -> None:
        called.set()
        await never.wait()

    monkeypatch.setattr(hub_module, "ANSWER_SECONDS", 0.3)
    async with hub(TURBO, fault) as (address, _):
        use_hub(monkeypatch, address)
        with pytest.raises(ModelError, match="did not answer in time"):
            await find()
        assert called.is_set()
        never.set()


async def test_a_hub_that_is_away_is_named_with_what_to_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    use_hub(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"no connection to http://127.0.0.1:9 .*HF_ENDPOINT"):
        await find()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"is not in the cache .* HF_HUB_OFFLINE is set"):
        await find()


async def test_pickles_of_a_hub_are_refused_before_they_are_downloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pickles = {
        name.replace(".safetensors", ".bin"): data
        for name, data in TURBO.items()
        if not name.startswith("sd_")
    }
    async with hub(pickles) as (address, asked):
        use_hub(monkeypatch, address)
        with pytest.raises(ModelError, match="is a pickle, which can run code"):
            await find()
    assert [name for name in asked if name.endswith(".bin")] == []


async def test_a_model_without_readable_weights_is_refused_before_its_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {name: data for name, data in TURBO.items() if not name.startswith("unet/diffusion")}
    async with hub({**files, "unet/model.onnx": b"other"}) as (address, asked):
        use_hub(monkeypatch, address)
        with pytest.raises(ModelError, match=r"no weights of the unet .* are model\.onnx: name a"):
            await find()
    assert not [name for name in asked if name.endswith(".safetensors")]


async def test_a_download_that_was_cut_off_is_no_model_while_the_hub_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def fault(request: web.Request) -> web.StreamResponse | None:
        return error(401, "GatedRepo") if "unet/diffusion" in request.path else None

    async with hub(TURBO, fault) as (address, _):
        use_hub(monkeypatch, address)
        with pytest.raises(ModelError, match="is gated"):
            await find()
    use_hub(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"cache .* lacks files of the \w+ of owner/tiny, and "):
        await find()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"of owner/tiny, and HF_HUB_OFFLINE is set: unset it"):
        await find()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    async with hub(TURBO) as (address, asked):
        use_hub(monkeypatch, address)
        await find()
    # The refusal may have ended downloads of other parts, too.
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in asked


def test_the_path_of_a_file_is_no_hub_id() -> None:
    with pytest.raises(ModelError, match=r"there is no model at models/photo\.safetensors"):
        read_model_spec("models/photo.safetensors")


async def test_a_download_is_shown_while_it_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = asyncio.Event()
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(hub_module, "_PROGRESS_SECONDS", 0.05)
    caplog.set_level("INFO", hub_module.__name__)
    real = hub_module._log.info

    def info(message: str, *arguments: object) -> None:
        real(message, *arguments)
        if message.startswith("model_downloading"):
            loop.call_soon_threadsafe(shown.set)

    monkeypatch.setattr(hub_module._log, "info", info)

    async def fault(request: web.Request) -> None:
        if request.path.endswith("non_ema.safetensors") or "vae/diffusion" in request.path:
            await shown.wait()

    async with hub(TURBO, fault) as (address, _):
        use_hub(monkeypatch, address)
        await find()
    assert any("model_downloading: owner/tiny" in line for line in caplog.messages)


async def test_the_class_of_a_tiny_autoencoder_is_checked_before_its_weights_are_downloaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "config.json": b'{"_class_name": "AutoencoderKL"}',
        "diffusion_pytorch_model.safetensors": b"weights",
    }
    async with hub(files) as (address, asked):
        use_hub(monkeypatch, address)
        with pytest.raises(ModelError, match="owner/tiny has an autoencoder of the class") as error:
            await asyncio.to_thread(load_tiny_vae, "owner/tiny", torch.float32)
    assert error.value.setting == "tiny_vae"
    assert asked == ["config.json"]
