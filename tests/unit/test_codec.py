"""The encoding of messages in NATS, of this version and of neighbouring versions."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from typing import Any, get_args

import msgspec
import pytest
from golden_file import FOLDER

from img2img_server.domain.events import (
    Cancelled,
    EncodedImage,
    Envelope,
    Event,
    Failed,
    Preview,
    Queued,
    SampleFinished,
    SampleStored,
    Stage,
    StageFinished,
    Started,
    StepFinished,
    StorageWaiting,
    Succeeded,
)
from img2img_server.domain.job import (
    Determinism,
    Job,
    JobFailure,
    SampleResult,
    State,
    Timings,
)
from img2img_server.domain.models import ModelInfo, WorkerInfo
from img2img_server.domain.params import ImageFormat, JobParams, Lane
from img2img_server.interfaces.queue import QueuedJob
from img2img_server.nats import codec, subjects

IMAGE = EncodedImage(
    data=b"\xff\xd8\x00", media_type="image/jpeg", sha256="ab" * 32, width=64, height=48
)
EVENTS: tuple[Event, ...] = (
    Queued(position=2, eta_seconds=1.5, requeue_reason="worker lost"),
    Started(stored_samples=(0, 2), worker="w", model="atelier", attempt=2),
    StageFinished(stage=Stage.IMAGE_ENCODED),
    StepFinished(sample=1, step=3, total=14, sigma=0.25),
    Preview(sample=1, step=3, image=IMAGE),
    SampleFinished(sample=1, seed=2**32 - 1, image=IMAGE, nsfw=True),
    SampleStored(sample=1, url="https://x.example/1.png", sha256="cd" * 32, size_bytes=3),
    StorageWaiting(sample=1, reason="the object store cannot be reached"),
    Succeeded(),
    Failed(reason="OUT_OF_MEMORY", message="zu groß", retryable=True),
    Cancelled(),
)
PARAMS = JobParams(
    prompt="ein Leuchtturm, 灯台",
    negative_prompt="blurry",
    width=640,
    samples=2,
    strength=0.35,
    seed=2**32 - 1,
    model="atelier",
    num_inference_steps=4,
    guidance_scale=1.5,
    scheduler="euler",
    output_format=ImageFormat.WEBP,
    preview_interval_steps=2,
    lane=Lane.BATCH,
)
JOB = Job(
    id=10_000_001,
    tenant="acme",
    params=PARAMS,
    file_prefix="5f0c2a6e",
    future_urls=("https://x.example/0.png", "https://x.example/1.png"),
    create_time=1_700_000_000.25,
    state=State.FAILED,
    samples=(SampleResult(index=0, seed=7, nsfw=True), SampleResult(index=1, seed=8, url="u")),
    failure=JobFailure(reason="OUT_OF_MEMORY", message="too large", retryable=True),
    timings=Timings(queue=0.5, denoise=2.25, steps=4, batch_share=0.5),
    start_time=1_700_000_001.0,
    determinism=Determinism.BOUNDED,
    attempt=2,
    cancel_requested=True,
    queue_sequence=12,
)
MODEL = ModelInfo(
    name="atelier",
    family="sd15",
    schedulers=("euler", "ddim"),
    default_num_inference_steps=20,
    default_guidance_scale=7.5,
)
GOLDEN: dict[str, Any] = {
    "job": JOB,
    "queued_job": QueuedJob(job_id=JOB.id, tenant="acme", init_image=bytes(range(256))),
    "worker": WorkerInfo(name="w", model=MODEL, device="cpu", job_seconds=1.5),
    "model": MODEL,
}


def envelope(event: Event) -> Envelope:
    return Envelope(sequence=7, time=1_700_000_000.25, job_id=JOB.id, event=event)


def test_the_examples_have_every_event() -> None:
    assert {type(event) for event in EVENTS} == set(get_args(Event))


@pytest.mark.parametrize("name", GOLDEN)
def test_a_value_comes_back_as_it_was(name: str) -> None:
    value = GOLDEN[name]
    assert codec.decode(codec.encode(value), type(value)) == value


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back_as_it_was(event: Event) -> None:
    assert codec.decode_event(codec.encode_event(envelope(event))) == envelope(event)


# Each file was written by the version of its name. A change that cannot read the files breaks a
# cluster during a rolling update. Run `make gold` only for additions, and for the first release
# after one.
def golden(name: str, today: bytes) -> bytes:
    path = FOLDER / "wire" / f"{name}.msgpack"
    if os.environ.get("GOLD") == "1":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(today)
    return path.read_bytes()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes_of_values_are_read(name: str) -> None:
    value = GOLDEN[name]
    assert codec.decode(golden(name, codec.encode(value)), type(value)) == value


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_golden_bytes_of_events_are_read(event: Event) -> None:
    data = golden(f"event_{type(event).__name__}", codec.encode_event(envelope(event)))
    assert codec.decode_event(data) == envelope(event)


# Bytes of the version before LoRA, deadlines and traces. `make gold` does not rewrite these files,
# because NATS stores such bytes during a rolling update. The beginning of each file's SHA-256:
BEFORE = {
    "job": "3c1d467fb476303b",
    "queued_job": "682da5f125733986",
    "worker": "829e333d533256cb",
    "model": "c76fff20c12b31a1",
}


@pytest.mark.parametrize("name", BEFORE)
def test_messages_of_the_version_before_are_read(name: str) -> None:
    data = (FOLDER / "wire-before" / f"{name}.msgpack").read_bytes()
    assert hashlib.sha256(data).hexdigest().startswith(BEFORE[name])
    value = GOLDEN[name]  # This value has the defaults of the fields that are new since.
    assert codec.encode(value) != data
    assert codec.decode(data, type(value)) == value


def changed(value: object, **changes: object) -> bytes:
    """Returns the bytes of a value with added fields. Fields with the value ... are left out."""
    fields = msgspec.msgpack.decode(codec.encode(value)) | changes
    return codec.encode({key: field for key, field in fields.items() if field is not ...})


# All messages between two roles of neighbouring versions. A field without a default exists since
# the first version. A new field must have a default, so that the golden bytes of the previous
# version can be read.
EXCHANGED = [*GOLDEN.values(), *EVENTS]


@pytest.mark.parametrize("value", EXCHANGED, ids=lambda value: type(value).__name__)
def test_fields_of_a_later_version_are_ignored(value: Any) -> None:
    later = from_the_future(msgspec.msgpack.decode(codec.encode(value)))
    assert codec.decode(codec.encode(later), type(value)) == value


def from_the_future(value: Any) -> Any:
    """Returns a value with one more field in every map, at any depth."""
    if isinstance(value, list):
        return [from_the_future(item) for item in value]
    if not isinstance(value, dict):
        return value
    # The context of a caller's tracer is a map with any keys.
    later = {k: v if k == "trace" else from_the_future(v) for k, v in value.items()}
    return later | {"from_the_future": {"a": [1]}}


@pytest.mark.parametrize("value", EXCHANGED, ids=lambda value: type(value).__name__)
def test_every_field_that_has_a_default_may_be_missing(value: Any) -> None:
    for field in dataclasses.fields(value):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        if default is dataclasses.MISSING:
            continue
        earlier = codec.decode(changed(value, **{field.name: ...}), type(value))
        assert earlier == dataclasses.replace(value, **{field.name: default}), field.name


def test_fields_of_an_earlier_version_take_their_defaults() -> None:
    earlier = codec.decode(changed(JOB, warning=..., queue_sequence=..., timings=...), Job)
    assert (earlier.warning, earlier.queue_sequence, earlier.timings) == ("", 0, Timings())


def test_an_event_with_fields_of_a_later_version_is_read() -> None:
    head = codec.decode_head(codec.encode_event(envelope(Queued(position=1))))
    newer = msgspec.structs.replace(
        head, event=msgspec.Raw(changed(Queued(position=1), priority="high"))
    )
    assert codec.decode_event(codec.encode(newer)) == envelope(Queued(position=1))


def test_an_event_with_a_value_of_a_later_version_is_skipped_unless_it_is_the_last() -> None:
    def later(event: Event, **changes: object) -> bytes:
        head = codec.decode_head(codec.encode_event(envelope(event)))
        return codec.encode(
            msgspec.structs.replace(head, event=msgspec.Raw(changed(event, **changes)))
        )

    assert codec.decode_event(later(StageFinished(stage=Stage.IMAGE_ENCODED), stage="new")) is None
    with pytest.raises(codec.UndecodableError, match="not a Failed"):
        codec.decode_event(later(Failed(reason="r", message="m"), reason=7))


@dataclass(frozen=True)
class Paused:
    """An event type of a later version."""

    seconds: float


def test_an_event_of_a_later_version_has_a_number_and_nothing_else() -> None:
    data = codec.encode_event(envelope(Paused(1.0)))  # type: ignore[arg-type]
    assert codec.decode_event(data) is None
    head = codec.decode_head(data)
    assert (head.sequence, head.type, head.is_terminal) == (7, "Paused", False)


@pytest.mark.parametrize("data", [b"", b"\xc1", b"\x80", b"\x81\xa2id\xa1x", b"\xa3\xff\xff\xff"])
def test_what_is_no_record_is_refused(data: bytes) -> None:
    with pytest.raises(codec.UndecodableError, match="not a Job"):
        codec.decode(data, Job)


def test_the_terminal_events_are_known_by_their_heads() -> None:
    terminal = {
        type(e) for e in EVENTS if codec.decode_head(codec.encode_event(envelope(e))).is_terminal
    }
    assert terminal == {Succeeded, Failed, Cancelled}


TEXTS = (
    "",
    "=",
    "=20",
    " ",
    "a",
    "A",
    "a.b",
    "a=2Eb",
    "*",
    ">",
    "ä",
    "灯台",
    "a-b_c",
    "\n",
    "\x00",
)


def test_tokens_are_plain_and_no_two_names_share_one() -> None:
    tokens = [subjects.token(text) for text in TEXTS]
    assert len(set(tokens)) == len(TEXTS)
    allowed = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_=")
    assert all(token and set(token) <= allowed for token in tokens)


def test_subjects_look_as_documented() -> None:
    assert [
        subjects.jobs_subject("sd 1.5", Lane.REALTIME, 2, "acme"),
        subjects.dead_subject(subjects.jobs_subject("sd 1.5", Lane.BATCH, 0, "acme")),
        subjects.source_filter("sd 1.5", Lane.BATCH, 0, 7),
        subjects.source_consumer("sd 1.5", Lane.BATCH, 0, 7),
        subjects.log_subject(10_000_001),
        subjects.preview_subject(10_000_001, 3),
    ] == [
        "img2img.jobs.sd=201=2E5.realtime.2.62.acme",
        "img2img.dead.sd=201=2E5.batch.0.62.acme",
        "img2img.jobs.sd=201=2E5.batch.0.7.*",
        "worker-sd=201=2E5-batch-0-7",
        "img2img.events.10000001.log",
        "img2img.events.10000001.preview.3",
    ]
