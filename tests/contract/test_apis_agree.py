"""All APIs agree on defaults, seeds, limits, warnings and the error without a model."""

from __future__ import annotations

import base64
import io
from collections.abc import AsyncIterator
from dataclasses import fields, replace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import json_format
from PIL import ExifTags, Image

from img2img.v1 import job_pb2, service_pb2
from img2img_server.api.deps import service_limits
from img2img_server.domain.models import ModelInfo, ModelKind
from img2img_server.domain.params import Limits
from img2img_server.errors import NoModelError
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.http_stack import (
    ENTERPRISE,
    Gateway,
    body,
    error_body,
    gateway_before,
    legacy_error_body,
    photo_base64,
    running_gateway,
)
from tests.stack import (
    DEV,
    RunningWorker,
    Stack,
    refusal,
    running_api,
    running_worker,
    settings,
    spec,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
KEY = {"Authorization": "Bearer dev-key"}
APIS = ("grpc", "v1", "today", "legacy")
WORDS = " ".join(f"word{index}" for index in range(149))
MODEL = replace(
    FAKE_MODEL,
    default_strength=0.4,
    default_num_inference_steps=5,
    default_guidance_scale=3.0,
    max_num_inference_steps=50,
    side_multiple=16,
    scheduler_max_steps=(("euler", 10),),
    max_side_pixels=1216,
    kind=ModelKind.FLOW,
    loras=("ink", "oil: v2"),
)

BLANK = "it has only spaces or other invisible characters"
LORA_LIST = 'be a list of objects with "name" (a string) and optionally "scale" (a number)'


class Apis:
    """Sends one request to each API of one service and returns the job when it has ended."""

    def __init__(self, today: Gateway, legacy: Gateway) -> None:
        self.today, self.legacy = today, legacy
        self.api = today.stack.api

    async def make(self, name: str, **changes: Any) -> job_pb2.Job:
        if name == "grpc":
            job_id = (await self.api.create(spec(**changes))).id
        elif name == "v1":
            sent = {**body(**changes), "init_image": {"data": photo_base64()}}
            del sent["key"]
            answer = await self.today.http.post("/v1/jobs", json={"spec": sent}, headers=KEY)
            assert answer.status_code == 200, answer.text
            job_id = answer.json()["job"]["id"]
        else:
            gateway = self.today if name == "today" else self.legacy
            answer = await gateway.create(**changes)
            assert answer.json()["status"] == "success", answer.text
            job_id = answer.json()["id"]
        return await self.ended(int(job_id))

    async def ended(self, job_id: int) -> job_pb2.Job:
        async for _ in self.api.watch(f"jobs/{job_id}"):
            pass
        job = await self.api.get(f"jobs/{job_id}")
        assert job.state == job_pb2.Job.STATE_SUCCEEDED
        return job


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def apis() -> AsyncIterator[Apis]:
    engine = FakeEngine(MODEL, max_prompt_words=75)
    async with (
        running_gateway({"engine": engine}) as today,
        gateway_before(today.stack, legacy=True) as legacy,
    ):
        yield Apis(today, legacy)


@pytest.mark.parametrize("name", APIS)
async def test_what_is_left_open_is_the_models_own(name: str, apis: Apis) -> None:
    job = await apis.make(name)
    found = job.spec.strength, job.spec.num_inference_steps, job.spec.guidance_scale
    assert (found, job.warning) == ((0.4, 5, 3.0), "")


@pytest.mark.parametrize("name", APIS)
async def test_minus_one_is_a_random_seed(name: str, apis: Apis) -> None:
    seeds = {(await apis.make(name, seed=-1)).spec.seed for _ in range(3)}
    assert len(seeds) > 1
    assert all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("name", ["grpc", "v1"])
@pytest.mark.parametrize("seed", [804822466654819, 2**63 - 1])
async def test_seeds_may_have_64_bits(name: str, seed: int, apis: Apis) -> None:
    job = await apis.make(name, seed=seed, samples=2)
    assert job.spec.seed == seed
    assert [sample.seed for sample in job.samples] == [seed, (seed + 1) % 2**63]
    # The seed is a string in JSON, so that no parser rounds it, and a number in the responses of
    # the HTTP contract.
    found = await apis.today.fetch(job.id)
    assert f'"seed":{seed},' in found.text.replace(" ", "")


async def test_64_bits_come_back_as_a_string(apis: Apis) -> None:
    seed = 2**63 - 1
    sent = {"spec": {"prompt": "p", "init_image": {"data": photo_base64()}, "seed": str(seed)}}
    answer = await apis.today.http.post("/v1/jobs", json=sent, headers=KEY)
    assert answer.json()["job"]["spec"]["seed"] == str(seed)


@pytest.mark.parametrize("name", ["today", "legacy"])
async def test_the_contract_keeps_its_range_of_seeds(name: str, apis: Apis) -> None:
    gateway = apis.today if name == "today" else apis.legacy
    answer = await gateway.create(seed=2**32)
    assert "seed must be between 0 and 4294967295" in answer.text.replace("The seed", "seed")


@pytest.mark.parametrize("name", APIS)
@pytest.mark.parametrize(
    ("sent", "used", "reported"),
    [
        (
            {"strength": 0.7, "num_inference_steps": 1},
            2,
            "num_inference_steps was raised from 1 to 2 so that one step runs at strength 0.7.",
        ),
        (
            {"strength": 0.04, "num_inference_steps": 20},
            25,
            "num_inference_steps was raised from 20 to 25 so that one step runs at strength 0.04.",
        ),
        ({"strength": 0.0}, 5, "At strength 0 no step runs: the prepared init image is returned."),
        (
            {"strength": 0.0001},
            5,
            "At strength 0.0001 no step runs, not even with num_inference_steps 50, the largest "
            "that the model allows: the prepared init image is returned. The least strength at "
            "which a step runs is 0.02.",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
async def test_a_run_without_steps_is_not_reported_as_a_success(
    sent: dict[str, Any], used: int, reported: str, name: str, apis: Apis
) -> None:
    job = await apis.make(name, **sent)
    assert (job.spec.num_inference_steps, job.warning) == (used, reported)
    assert job.timings.steps == (1 if "raised" in reported else 0)


@pytest.mark.parametrize("method", ["Generate", "CreateJob", "EstimateJob"])
async def test_a_blank_prompt_is_refused_by_every_method(method: str, apis: Apis) -> None:
    broken = spec(prompt=" \n\u200b")
    request = getattr(service_pb2, f"{method}Request")
    call = getattr(apis.api.stub, method)(request(spec=broken), metadata=DEV)
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await (anext(aiter(call)) if method == "Generate" else call)
    assert refused.value.details() == f"prompt is required: {BLANK}"


async def test_a_blank_prompt_is_refused_by_every_path(apis: Apis) -> None:
    text, sent = f"prompt is required: {BLANK}", {"prompt": "  ", "image": photo_base64()}
    spec_sent = {"prompt": "  ", "init_image": {"data": photo_base64()}}
    for path in ("/v1/jobs", "/v1/jobs:estimate"):
        answer = await apis.today.http.post(path, json={"spec": spec_sent}, headers=KEY)
        assert (answer.status_code, answer.json()["message"]) == (400, text)
    answer = await apis.today.http.post("/v1/images/edits", json=sent, headers=KEY)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, text)
    answer = await apis.today.create(prompt="  ")
    errors = {"prompt": [text]}
    expected = error_body("INVALID_REQUEST", "prompt is required", errors=errors)
    assert (answer.status_code, answer.json()) == (400, expected)
    answer = await apis.legacy.create(prompt="  ")
    assert answer.json()["message"] == {"prompt": ["The prompt field is required."]}


@pytest.mark.parametrize("name", APIS)
async def test_a_prompt_that_is_cut_is_reported(name: str, apis: Apis) -> None:
    job = await apis.make(name, prompt=WORDS, negative_prompt=WORDS)
    cut = "was cut after 75 of 149 tokens; the words from 'word75 word76 word77 word78 word79 word8"
    assert job.warning == (
        f"The prompt {cut}…' on have no effect. The negative prompt {cut}…' on have no effect."
    )


@pytest.mark.parametrize("name", APIS)
async def test_an_option_without_effect_is_reported(name: str, apis: Apis) -> None:
    job = await apis.make(name, negative_prompt="blurry", guidance_scale=1.0)
    assert job.warning == (
        "negative_prompt has no effect: guidance_scale is 1, and only above 1 is it used."
    )


@pytest.mark.parametrize("name", ["today", "legacy"])
async def test_fields_that_the_contract_ignores_are_named_but_not_in_legacy(
    name: str, apis: Apis
) -> None:
    ignored = {"scheduler": "UniPCMultistepScheduler", "model_id": "x", "num_inference_steps": 60}
    job = await apis.make(name, **ignored)
    assert job.spec.num_inference_steps == 5
    assert (
        job.warning
        == {
            "today": "The fields scheduler and model_id have no effect here and were ignored. "
            "num_inference_steps was ignored: it must be between 1 and 50.",
            "legacy": "",
        }[name]
    )


async def test_a_changed_hint_is_reported_before_what_follows_from_it(apis: Apis) -> None:
    job = await apis.make("today", strength=0.4, num_inference_steps=0)
    assert job.warning == (
        "num_inference_steps was set to 1, the smallest value allowed. num_inference_steps was "
        "raised from 1 to 3 so that one step runs at strength 0.4."
    )


@pytest.mark.parametrize("name", ["grpc", "v1"])
async def test_a_scheduler_may_be_called_by_its_class_in_diffusers(name: str, apis: Apis) -> None:
    job = await apis.make(name, scheduler="EulerDiscreteScheduler")
    assert (job.spec.scheduler, job.warning) == ("euler", "")


@pytest.mark.parametrize("name", ["DPM++ 2M Karras", "UniPCMultistepScheduler", "LCMScheduler"])
async def test_another_scheduler_is_refused_with_the_known_ones(name: str, apis: Apis) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await apis.api.create(spec(scheduler=name))
    reported = {"scheduler": "scheduler must be one of ddim, euler"}
    assert refusal(caught.value).violations == reported


async def test_fields_of_a_newer_protocol_are_named(apis: Apis) -> None:
    newer = job_pb2.JobSpec.FromString(spec().SerializeToString() + b"\xf8\x3f\x01")
    job = await apis.ended((await apis.api.create(newer)).id)
    assert job.warning == "This server does not know the fields 1023 of JobSpec and ignored them."


@pytest.mark.parametrize(
    ("sent", "reported"),
    [
        ({"num_inference_steps": 51}, "num_inference_steps must be between 1 and 50"),
        ({"width": 264}, "width must be divisible by 16"),
        (
            {"num_inference_steps": 11, "scheduler": "euler"},
            "num_inference_steps must be between 1 and 10",
        ),
    ],
    ids=str,
)
async def test_the_models_own_limits_are_reported_and_hold_at_admission(
    sent: dict[str, Any], reported: str, apis: Apis
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await apis.api.create(spec(**sent))
    assert refusal(caught.value).violations == {next(iter(sent)): reported}
    request = service_pb2.GetCapabilitiesRequest()
    (model,) = (await apis.api.stub.GetCapabilities(request, metadata=DEV)).models
    found = model.max_num_inference_steps, model.min_side_pixels, model.max_side_pixels
    assert (found, model.side_multiple) == ((50, 256, 1216), 16)
    assert dict(model.scheduler_max_steps) == {"euler": 10}


async def test_capabilities_describe_the_model_over_grpc_and_v1(apis: Apis) -> None:
    request = service_pb2.GetCapabilitiesRequest()
    (model,) = (await apis.api.stub.GetCapabilities(request, metadata=DEV)).models
    assert model.kind == model.KIND_FLOW
    assert model.guidance == model.GUIDANCE_CLASSIFIER_FREE
    assert model.strength_rule == model.STRENGTH_RULE_FLOOR
    assert model.takes_negative_prompt
    answer = await apis.today.http.get("/v1/capabilities", headers=KEY)
    (found,) = answer.json()["models"]
    assert json_format.ParseDict(found, service_pb2.Model()) == model
    assert (found["kind"], found["scheduler_max_steps"]) == ("KIND_FLOW", {"euler": 10})


@pytest.mark.parametrize("api", ["grpc", "v1"])
async def test_sides_may_be_as_long_as_the_models_own_limit(api: str, apis: Apis) -> None:
    job = await apis.make(api, width=1216, height=832)
    assert (job.spec.width, job.spec.height) == (1216, 832)


async def test_sides_beyond_the_models_own_limit_are_refused(apis: Apis) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await apis.api.create(spec(width=1232))
    assert refusal(caught.value).violations == {"width": "width must be between 256 and 1216"}


async def test_the_contract_keeps_its_sides_of_1024(apis: Apis) -> None:
    answer = await apis.today.create(width=1216, height=832)
    assert "width must be between 256 and 1024" in answer.text


async def test_steps_are_raised_within_the_limit_of_the_scheduler(apis: Apis) -> None:
    job = await apis.make("grpc", scheduler="euler", strength=0.05)
    assert job.spec.num_inference_steps == 5
    assert job.warning.startswith("At strength 0.05 no step runs, not even with")


async def test_capabilities_list_every_limit_of_the_validator(apis: Apis) -> None:
    request = service_pb2.GetCapabilitiesRequest()
    reported = (await apis.api.stub.GetCapabilities(request, metadata=DEV)).limits
    limits = service_limits(settings())
    for field in fields(Limits):
        assert getattr(reported, field.name) == getattr(limits, field.name), field.name


async def test_a_service_without_a_model_says_so_in_every_api() -> None:
    bus, text = memory_bus(), str(NoModelError())
    worker: RunningWorker
    async with running_api(bus) as api:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await api.create(spec())
        reported = refusal(caught.value)
        assert (reported.code, reported.reason) == (grpc.StatusCode.UNAVAILABLE, "NO_MODEL")
        assert reported.retry_seconds == 5.0
        async with running_worker(memory_bus()) as worker:
            stack = Stack(bus, api, worker)
            async with (
                gateway_before(stack) as today,
                gateway_before(stack, legacy=True) as legacy,
            ):
                answer = await today.create(init_image=photo_base64())
                assert (answer.status_code, answer.json()) == (503, error_body("NO_MODEL", text))
                assert answer.headers["retry-after"] == "5"
                answer = await legacy.create(init_image=photo_base64())
                assert (answer.status_code, answer.json()) == (200, legacy_error_body(text))
                ready = await today.http.get("/readyz")
                expected = {"status": "not ready", "model": "none announced yet"}
                assert (ready.status_code, ready.json()) == (503, expected)


async def test_a_default_model_that_is_not_loaded_may_come_and_another_may_not() -> None:
    bus = memory_bus()
    other = ModelInfo(**{**{f.name: getattr(MODEL, f.name) for f in fields(MODEL)}, "name": "b"})
    async with running_worker(bus, FakeEngine(other)), running_api(bus) as api:
        for name, code, reason in (
            ("", grpc.StatusCode.UNAVAILABLE, "NO_MODEL"),
            ("c", grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND"),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await api.create(spec(model=name))
            reported = refusal(caught.value)
            assert (reported.code, reported.reason) == (code, reason)


async def test_unknown_paths_and_unknown_jobs_have_reasons_of_their_own(apis: Apis) -> None:
    http = apis.today.http
    for path in ("/nowhere", "/v1/nowhere"):
        assert (await http.get(path)).json()["reason"] == "PATH_NOT_FOUND"
    fetched = await http.post(f"{ENTERPRISE}/fetch/10000999", json={"key": "dev-key"})
    assert fetched.json()["reason"] == "JOB_NOT_FOUND"
    events = await http.get("/v1/jobs/10000999/events", headers=KEY)
    assert events.json()["reason"] == "JOB_NOT_FOUND"


@pytest.mark.parametrize("api", ["grpc", "v1"])
async def test_strength_may_be_a_noise_level(api: str, apis: Apis) -> None:
    mode = job_pb2.STRENGTH_MODE_NOISE_LEVEL
    job = await apis.make(api, strength=0.35, strength_mode=mode)
    assert (job.spec.strength_mode, job.warning) == (mode, "")
    assert (job.denoising_steps, job.start_noise) == (job.timings.steps, 0.35)
    assert (await apis.make(api)).spec.strength_mode == job_pb2.STRENGTH_MODE_STEPS


@pytest.mark.parametrize(
    "loras",
    [
        [{"name": "oil: v2", "scale": 0.5}, {"name": "ink"}],
        [{"name": "ink", "scale": "0.25"}],
        [{"name": "ink", "scale": -2}],
        [],
    ],
    ids=["two", "text-number", "negative", "none"],
)
async def test_v1_takes_loras_in_a_list(loras: list[dict[str, Any]], apis: Apis) -> None:
    found = (await apis.make("v1", loras=loras)).spec.loras
    assert [(lora.name, lora.scale) for lora in found] == [
        (each["name"], float(each.get("scale", 1))) for each in loras
    ]


@pytest.mark.parametrize(
    ("loras", "rule"),
    [
        ("ink", LORA_LIST),
        ({"ink": 0.5}, LORA_LIST),
        (["ink"], LORA_LIST),
        ([{"name": "ink", "scale": True}], LORA_LIST),
        ([{"name": "ink", "weight": 1}], LORA_LIST),
        ([{"name": "wool"}], "be of ink, oil: v2; there is no 'wool'"),
        ([{"scale": 1}], "be of ink, oil: v2; there is no ''"),
        ([{"name": "ink", "scale": 2.5}], "have scales between -2 and 2"),
        ([{"name": "ink", "scale": -2.5}], "have scales between -2 and 2"),
        ([{"name": "ink"}] * 2, "have each name once"),
        ([{"name": "ink"}] * 1_000, "not have more than 8 entries"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_v1_names_what_is_wrong_with_loras(loras: Any, rule: str, apis: Apis) -> None:
    sent = {**body(), "init_image": {"data": photo_base64()}, "loras": loras}
    del sent["key"]
    answer = await apis.today.http.post("/v1/jobs", json={"spec": sent}, headers=KEY)
    assert answer.status_code == 400
    ((field, (message,)),) = answer.json()["errors"].items()
    assert (field, message.partition("loras must ")[2]) == ("loras", rule)


@pytest.mark.parametrize(
    "loras",
    [
        {"loras": "oil: v2:-0.5, ink"},
        {"loras[oil: v2]": "-0.5", "loras[ink]": "1"},
    ],
    ids=["text", "scales"],
)
async def test_a_form_of_openai_takes_loras(loras: dict[str, str], apis: Apis) -> None:
    file = base64.b64decode(photo_base64())
    answer = await apis.today.http.post(
        "/v1/images/edits",
        data={"prompt": "a cat", "size": "256x256", **loras},
        files={"image": ("cat.jpg", file, "image/jpeg")},
        headers=KEY,
    )
    assert answer.status_code == 200, answer.text
    found = (await apis.api.get(f"jobs/{answer.headers['img2img-job']}")).spec.loras
    assert [(lora.name, lora.scale) for lora in found] == [("oil: v2", -0.5), ("ink", 1.0)]
    assert "img2img-ignored-fields" not in answer.headers


async def test_json_of_openai_takes_loras_by_name(apis: Apis) -> None:
    sent = {"prompt": "a cat", "size": "256x256", "image": photo_base64()}
    for loras in ({"oil: v2": 0.5, "ink": 1}, [{"name": "oil: v2", "scale": 0.5}, {"name": "ink"}]):
        answer = await apis.today.http.post(
            "/v1/images/edits", json={**sent, "loras": loras}, headers=KEY
        )
        assert answer.status_code == 200, answer.text
        found = (await apis.api.get(f"jobs/{answer.headers['img2img-job']}")).spec.loras
        assert [(lora.name, lora.scale) for lora in found] == [("oil: v2", 0.5), ("ink", 1.0)]
    wrong = await apis.today.http.post(
        "/v1/images/edits", json={**sent, "loras": {"ink": "much"}}, headers=KEY
    )
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "loras")


def wide() -> bytes:
    """Returns a PNG of 300 x 200 pixels that EXIF turns upright."""
    image, exif = Image.new("RGB", (200, 300)), Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


@pytest.mark.parametrize("api", APIS)
async def test_a_missing_size_is_the_models_at_the_aspect_of_the_init_image(
    api: str, apis: Apis
) -> None:
    image = wide()
    if api == "grpc":
        init_image = job_pb2.InitImage(data=image)
        request = job_pb2.JobSpec(prompt="p", init_image=init_image)
        job = await apis.ended((await apis.api.create(request)).id)
    elif api == "v1":
        sent = {"prompt": "p", "init_image": {"data": base64.b64encode(image).decode()}}
        answer = await apis.today.http.post("/v1/jobs", json={"spec": sent}, headers=KEY)
        job = await apis.ended(int(answer.json()["job"]["id"]))
    else:
        gateway = apis.today if api == "today" else apis.legacy
        sent = {"key": "dev-key", "prompt": "p", "init_image": base64.b64encode(image).decode()}
        answer = await gateway.http.post(f"{ENTERPRISE}/img2img", json=sent)
        job = await apis.ended(int(answer.json()["id"]))
    size = job.spec.width, job.spec.height
    assert size == ((624, 416) if api in ("grpc", "v1") else (512, 512))
