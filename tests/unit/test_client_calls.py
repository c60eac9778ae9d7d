"""Calls of both clients against a scripted service: the same results and errors."""

from __future__ import annotations

import inspect
from collections import deque
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2

import img2img_client as api
from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_client import Retry
from tests.client_runs import BOTH, Run
from tests.fake_job import NAME, State, ending, events, job
from tests.fake_service import INVALID, STOPPING, Break, FakeService, Refusal, last, serving


@pytest.fixture(params=BOTH.values(), ids=BOTH.keys())
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


def test_the_error_of_an_unreachable_service_has_its_address(run: Run) -> None:
    service = FakeService()
    with serving(service) as port:
        pass  # From here on, nothing listens on the port.

    def use(client: Any) -> Any:
        other = type(client)(
            f"127.0.0.1:{port}", retry=Retry(connect_seconds=0.05, first_delay_seconds=0.01)
        )
        return other.get(1)

    with pytest.raises(api.UnavailableError) as caught:
        run(service, use)
    assert str(caught.value).startswith(f"cannot reach the service at 127.0.0.1:{port}: ")
    assert caught.value.code == "UNAVAILABLE"


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        (
            Refusal(grpc.StatusCode.UNAUTHENTICATED, "no", "INVALID_API_KEY"),
            api.UnauthenticatedError,
        ),
        (Refusal(grpc.StatusCode.PERMISSION_DENIED, "no", "X"), api.PermissionDeniedError),
        (Refusal(grpc.StatusCode.NOT_FOUND, "no", "MODEL_NOT_FOUND"), api.NotFoundError),
        (Refusal(grpc.StatusCode.ALREADY_EXISTS, "no", "X"), api.RequestIdReusedError),
        (Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no", "JOB_ENDED"), api.JobEndedError),
        (
            Refusal(grpc.StatusCode.FAILED_PRECONDITION, "no", "DEADLINE_TOO_SHORT"),
            api.DeadlineTooShortError,
        ),
        (Refusal(grpc.StatusCode.INTERNAL, "no", "INTERNAL"), api.InternalError),
        (Refusal(grpc.StatusCode.DATA_LOSS, "no", "NEW_REASON"), api.RpcError),
    ],
    ids=lambda value: value.reason if isinstance(value, Refusal) else "",
)
def test_every_status_becomes_its_error(
    run: Run, refusal: Refusal, kind: type[api.RpcError]
) -> None:
    service = FakeService(refusals=deque([refusal]))
    with pytest.raises(api.RpcError) as caught:
        run(service, lambda client: client.create("p", b"photo"))
    error = caught.value
    assert type(error) is kind
    found = (str(error), error.code, error.reason, error.metadata, error.retry_seconds)
    assert found == ("no", refusal.code.name, refusal.reason, {"made": "up"}, None)
    assert len(service.requests) == 1


def test_a_full_queue_reports_when_to_retry(run: Run) -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=Duration(seconds=30, nanos=500_000_000))
    full = Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "Rate limit", "QUEUE_FULL", (retry,))
    with pytest.raises(api.QueueFullError) as caught:
        run(FakeService(breaks=deque([Break(0, full)])), lambda c: c.generate("p", b"photo"))
    assert caught.value.retry_seconds == 30.5


def test_an_invalid_request_lists_every_violation(run: Run) -> None:
    service = FakeService(breaks=deque([Break(0, INVALID)]))
    with pytest.raises(api.InvalidRequestError) as caught:
        run(service, lambda client: client.generate("p", b"photo", strength=1.5, width=513))
    assert caught.value.violations == (
        api.Violation("strength", "too high", "OUT_OF_RANGE"),
        api.Violation("width", "not a multiple", "NOT_DIVISIBLE"),
    )
    assert str(caught.value) == "too high; not a multiple"
    assert len(service.requests) == 1


def test_generate_returns_the_images_with_their_links(run: Run, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"photo")
    service = FakeService(log=events(samples=2))
    result = run(service, lambda client: client.generate("p", photo, samples=2))
    sent = last(service.requests, service_pb2.GenerateRequest).spec
    assert sent.init_image.data == b"photo"
    assert sent.output_format == job_pb2.IMAGE_FORMAT_PNG
    assert [(p.index, p.seed, p.data, p.url) for p in result.images] == [
        (0, 7, b"\x89PNG image of sample 0", "http://127.0.0.1:8080/generations/5e0c8a0e-0.png"),
        (1, 8, b"\x89PNG image of sample 1", "http://127.0.0.1:8080/generations/5e0c8a0e-1.png"),
    ]
    assert result.job.state is api.State.SUCCEEDED
    assert result.job.timings.total_seconds == 3.0


def test_a_url_is_sent_for_the_service_to_download(run: Run) -> None:
    service = FakeService()
    run(service, lambda client: client.generate("p", "https://example.com/photo.jpg"))
    sent = last(service.requests, service_pb2.GenerateRequest).spec.init_image
    assert sent == job_pb2.InitImage(url="https://example.com/photo.jpg")


def test_images_of_expired_events_have_only_links(run: Run) -> None:
    end = events()[-1]
    service = FakeService(log=[end])
    stream_result = run(service, lambda client: client.watch(NAME).result())
    (image,) = stream_result.images
    assert (image.data, image.url) == (
        b"",
        "http://127.0.0.1:8080/generations/5e0c8a0e-0.png",
    )


def test_a_failed_job_raises_its_reason(run: Run) -> None:
    failed = ending(failed=event_pb2.JobFailed(job=job(State.STATE_FAILED)))
    with pytest.raises(api.JobFailedError) as caught:
        run(FakeService(log=[failed]), lambda client: client.generate("p", b"photo"))
    assert str(caught.value) == f"{NAME} failed: out of memory at 512x512"
    assert (caught.value.reason, caught.value.retryable) == ("OUT_OF_MEMORY", False)
    assert caught.value.job.name == NAME


def test_a_cancelled_job_raises(run: Run) -> None:
    cancelled = ending(cancelled=event_pb2.JobCancelled(job=job(State.STATE_CANCELLED)))
    with pytest.raises(api.JobCancelledError, match=f"{NAME} was cancelled"):
        run(FakeService(log=[cancelled]), lambda client: client.generate("p", b"photo"))


def test_create_is_retried_with_the_same_request_id(run: Run) -> None:
    service = FakeService(refusals=deque([Refusal(grpc.StatusCode.UNAVAILABLE)] * 2))
    made = run(service, lambda client: client.create("p", b"photo"))
    assert (made.name, made.state) == (NAME, api.State.QUEUED)
    sent = {request.request_id for request in service.requests}  # type: ignore[attr-defined]
    assert len(service.requests) == 3
    assert service.request_ids == sent
    assert len(sent) == 1


@pytest.mark.parametrize("given", [NAME, "10000001", 10000001])
def test_a_job_is_named_by_its_name_or_its_number(run: Run, given: str | int) -> None:
    service = FakeService()
    run(service, lambda client: client.get(given))
    run(service, lambda client: client.cancel(given))
    run(service, lambda client: client.redeliver_webhook(given))
    assert service.requests == [
        service_pb2.GetJobRequest(name=NAME),
        service_pb2.CancelJobRequest(name=NAME),
        service_pb2.RedeliverWebhookRequest(name=NAME),
    ]


def test_an_invalid_job_name_is_rejected_before_any_call(run: Run) -> None:
    service = FakeService()
    with pytest.raises(api.InvalidArgumentError):
        run(service, lambda client: client.get("jobs/cat"))
    assert service.requests == []


def test_a_list_reads_page_after_page(run: Run) -> None:
    pages = {
        "": service_pb2.ListJobsResponse(
            jobs=[job_pb2.Job(name="jobs/3"), job_pb2.Job(name="jobs/2")], next_page_token="more"
        ),
        "more": service_pb2.ListJobsResponse(jobs=[job_pb2.Job(name="jobs/1")]),
    }
    service = FakeService(pages=pages, refusals=deque([STOPPING]))
    found = run(service, lambda client: client.list("failed", api.State.CANCELLED, page_size=2))
    assert [one.name for one in found] == ["jobs/3", "jobs/2", "jobs/1"]
    states = [State.STATE_FAILED, State.STATE_CANCELLED]
    assert service.requests[1:] == [
        service_pb2.ListJobsRequest(page_size=2, states=states),
        service_pb2.ListJobsRequest(page_size=2, states=states, page_token="more"),
    ]


def test_the_caller_is_read(run: Run) -> None:
    found = run(FakeService(), lambda client: client.caller())
    assert found == api.Caller(tenant="shop", key_id="0a1b", permissions=("manage",))


def test_capabilities_are_read(run: Run) -> None:
    found = run(FakeService(), lambda client: client.capabilities())
    assert found == api.Capabilities(
        server_version="0.1.0",
        models=(
            api.Model(
                name="atelier",
                family="sd",
                schedulers=("ddim", "euler"),
                default_num_inference_steps=20,
                default_guidance_scale=3.5,
                default_strength=0.7,
                workers=1,
                device="cpu",
                native_size=512,
                loras=("ink",),
                max_num_inference_steps=50,
                min_side_pixels=256,
                max_side_pixels=1024,
                side_multiple=16,
                kind=api.ModelKind.DIFFUSION,
                guidance=api.Guidance.CLASSIFIER_FREE,
                strength_rule=api.StrengthRule.FLOOR,
                takes_negative_prompt=True,
                takes_prompt_weights=True,
                max_clip_skip=12,
                embeddings=("<worn>",),
                state=api.ModelState.LOADED,
                load_failures=("w2: a part is missing",),
                refused_loras={"wool": "it belongs to another model"},
                scheduler_max_steps={"lcm": 40},
            ),
        ),
        limits=api.Limits(
            max_prompt_characters=2000,
            min_side_pixels=256,
            max_side_pixels=1024,
            side_multiple=8,
            max_samples=4,
            max_num_inference_steps=100,
            max_guidance_scale=30.0,
            max_image_bytes=20_971_520,
            max_image_pixels=64_000_000,
            max_message_bytes=34 * 2**20,
            max_queued_jobs=15,
            retention_seconds=86_400.0,
            init_image_media_types=("image/png", "image/jpeg", "image/webp"),
            max_negative_prompt_characters=2000,
            max_lora_scale=2.0,
            max_clip_skip=32,
            max_preview_interval_steps=100,
            max_annotations=16,
            max_annotation_name_characters=63,
            max_annotation_characters=2000,
            max_track_id_characters=191,
            max_url_characters=4096,
            max_seed=2**63 - 1,
            min_strength=0.0,
            max_strength=1.0,
            max_loras=8,
            min_lora_scale=-2.0,
        ),
    )


def test_a_call_has_the_signature_and_the_documentation_of_a_method() -> None:
    for kind in (api.Client, api.AsyncClient):
        assert inspect.isfunction(kind.get)
        assert inspect.getdoc(kind.get) == "Returns the current record of a job."
        assert list(inspect.signature(kind.get).parameters) == ["self", "job"]
        client = kind("127.0.0.1:1")
        assert list(inspect.signature(client.cancel).parameters) == ["job"]
        assert inspect.iscoroutinefunction(client.cancel) is (kind is api.AsyncClient)
