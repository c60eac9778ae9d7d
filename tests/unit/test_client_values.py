"""Conversion from protobuf to the client's classes, and from arguments to requests."""

from __future__ import annotations

from dataclasses import fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import get_type_hints

import pytest

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_client import convert, events, requests, resources, spec
from img2img_client.errors import InvalidArgumentError, InvalidRequestError
from img2img_client.spec import Options
from tests.fake_job import NAME, State, job

PAIRS = [
    (resources.Job, job_pb2.Job),
    (spec.Spec, job_pb2.JobSpec),
    (spec.Lora, job_pb2.Lora),
    (resources.Sample, job_pb2.Sample),
    (resources.Image, job_pb2.Image),
    (resources.Timings, job_pb2.Timings),
    (resources.JobError, job_pb2.JobError),
    (resources.Model, service_pb2.Model),
    (resources.Limits, service_pb2.Limits),
    (resources.Capabilities, service_pb2.GetCapabilitiesResponse),
    (resources.Caller, service_pb2.GetCallerResponse),
]


@pytest.mark.parametrize(("cls", "message"), PAIRS, ids=lambda cls: cls.__name__)
def test_a_value_has_every_field_of_its_message(cls: type, message: type) -> None:
    theirs = set(message.DESCRIPTOR.fields_by_name)  # type: ignore[attr-defined]
    named = {field.name for field in fields(cls)}
    ours = {name if name in theirs else name.removesuffix("_seconds") for name in named}
    renamed = {"init_image_url": "init_image"}
    assert {renamed.get(name, name) for name in ours} == theirs


def test_there_is_a_class_with_every_field_for_each_kind_of_event() -> None:
    oneof = event_pb2.JobEvent.DESCRIPTOR.oneofs_by_name["event"]
    # This field is never returned.
    kinds = [field for field in oneof.fields if field.name != "heartbeat"]
    assert set(convert.KINDS) == {field.name for field in kinds}
    envelope = {field.name for field in fields(events.Event)}
    for field in kinds:
        ours = {one.name.removesuffix("_seconds") for one in fields(convert.KINDS[field.name])}
        assert ours - envelope == set(field.message_type.fields_by_name)


def test_every_field_of_a_spec_is_an_option() -> None:
    named = set(get_type_hints(Options)) | {"prompt", "init_image"}
    assert named == set(job_pb2.JobSpec.DESCRIPTOR.fields_by_name)


@pytest.mark.parametrize(
    ("cls", "enum"),
    [
        (resources.State, job_pb2.Job.State),
        (spec.ImageFormat, job_pb2.ImageFormat),
        (spec.Lane, job_pb2.Lane),
        (resources.DeterminismClass, job_pb2.DeterminismClass),
        (events.Stage, event_pb2.StageFinished.Stage),
    ],
)
def test_an_enum_has_every_value_of_the_protocol(
    cls: type[resources.State], enum: type[job_pb2.Job.State]
) -> None:
    prefix = convert.enum_prefix(enum.DESCRIPTOR)
    assert [prefix + one.name for one in cls] == list(enum.keys())


def test_every_field_of_a_job_is_read() -> None:
    message = job(State.STATE_FAILED)
    message.spec.annotations["shelf"] = "3"
    message.spec.loras.add(name="ink", scale=0.5)
    message.spec.init_image.url = "https://example.com/cat.jpg"
    message.eta.FromMilliseconds(1500)
    found = convert.read(resources.Job, message)
    timings = dict.fromkeys((one.name for one in fields(resources.Timings)), 0.0)
    timings |= {"queue_seconds": 0.012, "denoise_seconds": 2.5, "total_seconds": 3.0}
    others = {
        **dict.fromkeys(("negative_prompt", "webhook", "track_id", "scheduler"), ""),
        **dict.fromkeys(("safety_checker", "enhance_prompt", "base64", "temp"), False),
    }
    assert found == resources.Job(
        name=NAME,
        id=10000001,
        state=resources.State.FAILED,
        spec=spec.Spec(
            prompt="an oil painting [of] a cat",
            init_image_url="https://example.com/cat.jpg",
            width=512,
            height=512,
            samples=1,
            strength=0.5,
            seed=7,
            model="atelier",
            num_inference_steps=4,
            guidance_scale=None,
            output_format=spec.ImageFormat.PNG,
            preview_interval_steps=0,
            lane=spec.Lane.UNSPECIFIED,
            annotations={"shelf": "3"},
            loras=(spec.Lora(name="ink", scale=0.5),),
            true_cfg_scale=None,
            strength_mode=spec.StrengthMode.UNSPECIFIED,
            allow_partial=False,
            output_quality=0,
            prompt_weights=False,
            clip_skip=0,
            **others,  # type: ignore[arg-type]
        ),
        samples=(),
        future_urls=(),
        error=resources.JobError(
            reason="OUT_OF_MEMORY", message="out of memory at 512x512", retryable=False
        ),
        timings=resources.Timings(**timings | {"steps": 2}),  # type: ignore[arg-type]
        create_time=datetime(2026, 2, 2, 2, 40, tzinfo=UTC),
        start_time=datetime(2026, 2, 2, 2, 40, 1, tzinfo=UTC),
        end_time=datetime(2026, 2, 2, 2, 40, 4, tzinfo=UTC),
        expire_time=None,
        worker="worker-1",
        device="cpu",
        determinism=resources.DeterminismClass.UNSPECIFIED,
        attempt=1,
        file_prefix="5e0c8a0e",
        warning="",
        eta_seconds=1.5,
        original_prompt="",
        webhook_status="",
        webhook_error="",
        denoising_steps=0,
        start_noise=0.0,
        state_reason="",
        device_seconds=0.0,
    )


def test_a_state_of_a_newer_service_is_unspecified() -> None:
    assert convert.read(resources.Job, job_pb2.Job(state=99)).state is resources.State.UNSPECIFIED  # type: ignore[arg-type]


def test_a_file_may_be_given_as_path_text_or_bytes(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(b"photo")
    for source in (file, str(file), b"photo"):
        assert spec_of(source, {}).init_image.data == b"photo"
    for url in ("HTTPS://example.com/cat.jpg", "data:;base64,AAAA", "DATA:,x"):
        assert spec_of(url, {}).init_image.url == url


@pytest.mark.parametrize(
    "loras",
    [
        {"ink": 0.8, "oil": 1},
        [("ink", 0.8), ("oil", 1)],
        (("ink", 0.8), "oil"),
    ],
    ids=["mapping", "pairs", "pair-and-name"],
)
def test_loras_may_be_given_by_name_or_as_pairs(loras: spec.Loras) -> None:
    found = spec_of(b"photo", {"loras": loras}).loras
    scales = [(lora.name, lora.scale if lora.HasField("scale") else 1.0) for lora in found]
    assert scales == [("ink", 0.8), ("oil", 1.0)]


def test_a_text_is_the_name_of_one_lora() -> None:
    assert list(spec_of(b"photo", {"loras": "ink:0.8"}).loras) == [job_pb2.Lora(name="ink:0.8")]
    assert list(spec_of(b"photo", {"loras": []}).loras) == []


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        spec_of(tmp_path / "none.jpg", {})


def test_values_that_do_not_fit_the_protocol_are_listed_before_any_call() -> None:
    options: Options = {"width": 2**40, "output_format": "gif", "strength": "much"}  # type: ignore[typeddict-item]
    options["loras"] = ["ink", 0.8]  # type: ignore[list-item]
    with pytest.raises(InvalidRequestError) as caught:
        spec_of(bytes(34 * 2**20), options)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["output_format", "width", "strength", "loras", "init_image"]


def test_an_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError):
        spec_of(b"photo", {"strenght": 0.5})  # type: ignore[typeddict-unknown-key]


def test_every_generate_gets_its_own_request_id() -> None:
    first, second = (
        requests.new_job(service_pb2.GenerateRequest, "p", b"photo", {}) for _ in range(2)
    )
    assert len(first.request_id) == 36
    assert first.request_id != second.request_id


def spec_of(init_image: spec.ImageSource, options: Options) -> job_pb2.JobSpec:
    return requests.new_job(service_pb2.CreateJobRequest, "p", init_image, options).spec  # type: ignore[arg-type]


IMAGE = resources.Image(
    data=b"\xff\xd8", media_type="image/jpeg", size_bytes=2, sha256="", width=8, height=8
)


def test_an_image_is_saved_only_if_the_suffix_matches_its_format(tmp_path: Path) -> None:
    for name in ("out.jpg", "out.JPEG", "out"):
        assert IMAGE.save(tmp_path / name).read_bytes() == b"\xff\xd8"
    with pytest.raises(InvalidArgumentError) as caught:
        IMAGE.save(tmp_path / "out.png")
    assert caught.value.violations[0].field == "path"
    assert not (tmp_path / "out.png").exists()


def test_an_image_without_data_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        replace(IMAGE, data=b"").save(tmp_path / "out.jpg")
    assert caught.value.violations[0].field == "data"
