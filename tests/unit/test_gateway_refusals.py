"""HTTP errors for the statuses of the api, and the messages of rare responses."""

from __future__ import annotations

from typing import Any

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from img2img.v1 import job_pb2
from img2img_server import errors
from img2img_server.api.convert_service import status_of
from img2img_server.compat.modelslab import responses, sentences
from img2img_server.compat.modelslab.errors import ErrorKind, RequestError
from img2img_server.compat.modelslab.response_formats import Current, Legacy, Plain
from img2img_server.domain.violations import out_of_range, required
from img2img_server.gateway.upstream import refusal
from img2img_server.gateway.v1.errors import ErrorFormat
from img2img_server.imaging.base import FetchError

CODES = {code.value[0]: code for code in grpc.StatusCode}


def failed(error: errors.ServiceError) -> AioRpcError:
    """Returns an error of the api as a gRPC client receives it."""
    details = status_of(error)
    trailing = Metadata(("grpc-status-details-bin", details.SerializeToString()))
    return AioRpcError(CODES[details.code], Metadata(), trailing, details.message)


def body_of(form: Plain, error: RequestError) -> Any:
    """Returns the JSON that the caller receives."""
    return form.error(error)[0]


@pytest.mark.parametrize(
    ("error", "case", "message", "retry_seconds"),
    [
        (errors.UnauthenticatedError(), ErrorKind.BAD_KEY, "Invalid API key", 30),
        (errors.ApiKeyMissingError(), ErrorKind.BAD_KEY, "Invalid API key", 30),
        (errors.StreamTokenInvalidError(), ErrorKind.BAD_KEY, "Invalid API key", 30),
        (
            errors.PermissionDeniedError("operate"),
            ErrorKind.FORBIDDEN,
            str(errors.PermissionDeniedError("operate")),
            30,
        ),
        (errors.JobNotFoundError("jobs/1"), ErrorKind.UNKNOWN_JOB, "Request not found", 30),
        (
            errors.ModelNotFoundError("m", ()),
            ErrorKind.UNAVAILABLE,
            ErrorKind.UNAVAILABLE.message,
            30,
        ),
        (
            errors.QueueFullError(15, 4.2),
            ErrorKind.RATE_LIMIT,
            str(errors.QueueFullError(15)),
            5,
        ),
        (errors.QueueFullError(15, 0.0), ErrorKind.RATE_LIMIT, str(errors.QueueFullError(15)), 1),
        (
            errors.RateLimitedError(60, 0.4),
            ErrorKind.RATE_LIMIT,
            str(errors.RateLimitedError(60, 0.4)),
            1,
        ),
        (
            errors.TooManyCallsError(9),
            ErrorKind.RATE_LIMIT,
            str(errors.TooManyCallsError(9)),
            1,
        ),
        (errors.TooManyWatchersError(9), ErrorKind.UNAVAILABLE, ErrorKind.UNAVAILABLE.message, 5),
        (errors.ServerBusyError("x", 7.0), ErrorKind.UNAVAILABLE, ErrorKind.UNAVAILABLE.message, 7),
        (errors.UnavailableError(), ErrorKind.UNAVAILABLE, ErrorKind.UNAVAILABLE.message, 1),
        (errors.NoModelError(), ErrorKind.UNAVAILABLE, str(errors.NoModelError()), 5),
        (errors.InternalError("x"), ErrorKind.FAULT, ErrorKind.FAULT.message, 30),
        (
            errors.StorageKeysMissingError(),
            ErrorKind.UNAVAILABLE,
            str(errors.StorageKeysMissingError()),
            30,
        ),
        (
            errors.MessageTooLargeError(),
            ErrorKind.UNAVAILABLE,
            str(errors.MessageTooLargeError()),
            30,
        ),
        (
            errors.RequestIdReusedError("x"),
            ErrorKind.REQUEST_ID_REUSED,
            str(errors.RequestIdReusedError("x")),
            30,
        ),
        (
            errors.JobEndedError("jobs/1", "failed"),
            ErrorKind.JOB_ENDED,
            "jobs/1 has already failed",
            30,
        ),
        (
            errors.ApiKeyExpiredError(),
            ErrorKind.BAD_KEY,
            str(errors.ApiKeyExpiredError()),
            30,
        ),
        (
            errors.UploadNotFoundError("u"),
            ErrorKind.UNKNOWN_UPLOAD,
            str(errors.UploadNotFoundError("u")),
            30,
        ),
        (
            errors.UploadExpiredError("u"),
            ErrorKind.UPLOAD_EXPIRED,
            str(errors.UploadExpiredError("u")),
            30,
        ),
        (
            errors.UploadIncompleteError("u"),
            ErrorKind.UPLOAD_INCOMPLETE,
            str(errors.UploadIncompleteError("u")),
            30,
        ),
        (errors.NoWebhookError("jobs/1"), ErrorKind.FAULT, ErrorKind.FAULT.message, 30),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_error_of_the_api_is_a_refusal(
    error: errors.ServiceError, case: ErrorKind, message: str, retry_seconds: int
) -> None:
    reported = refusal(failed(error))
    found = reported.kind, reported.reason, reported.retry_seconds
    assert found == (case, error.reason, retry_seconds)
    assert body_of(ErrorFormat(), reported)["message"] == str(error)
    fixed = sentences.error_sentence(error.reason, error.metadata) or message
    assert body_of(Current(), reported)["message"] == fixed


def test_every_error_of_the_tree_is_in_the_table_above() -> None:
    met = {
        "InvalidRequestError",
        # The gateway sends messages of the methods' types.
        "MalformedRequestError",
        # only health and reflection raise this error
        "RequestTooLargeError",
        # only CancelJob raises this error, and the gateway does not call CancelJob
        "JobEndedError",
        # only RedeliverWebhook raises this error, and the gateway does not call that method
        "JobNotEndedError",
        # only RedeliverWebhook raises this error, and the gateway does not call that method
        "NoWebhookError",
        # only RedeliverWebhook raises this error, and the gateway does not call that method
        "TooManyWebhooksError",
        # only Generate raises this error, and the gateway does not call Generate
        "DeadlineTooShortError",
        # only LoadModel and UnloadModel raise this error, and the gateway calls neither
        "NoCatalogueError",
        # tests/contract/test_v1_uploads.py and test_stream_tokens.py have the next four
        "UploadsDisabledError",
        "UploadsFullError",
        "StreamTokenExpiredError",
        "StreamTokenKeysMissingError",
        "ApiKeyExpiredError",
        "ApiKeyMissingError",
        "StreamTokenInvalidError",
        "UploadNotFoundError",
        "UploadExpiredError",
        "UploadIncompleteError",
        "UnauthenticatedError",
        "PermissionDeniedError",
        "JobNotFoundError",
        "ModelNotFoundError",
        "RequestIdReusedError",
        "StorageKeysMissingError",
        "MessageTooLargeError",
        "QueueFullError",
        "RateLimitedError",
        "TooManyCallsError",
        "TooManyWatchersError",
        "ServerBusyError",
        "UnavailableError",
        "NoModelError",
        "InternalError",
    }
    assert {kind.__name__ for kind in errors.ServiceError.__subclasses__()} == met


def test_violations_keep_their_sentences() -> None:
    broken = [FetchError("the server answered 403: no").violation, out_of_range("width", 8, 9)]
    reported = refusal(failed(errors.InvalidRequestError(broken)))
    assert (reported.kind, reported.violations) == (ErrorKind.FIELDS, broken)
    assert body_of(Plain(), reported)["message"] == broken[0].text


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (errors.QueueFullError(15), "Rate limit exceeded. Maximum 15 queued requests allowed."),
        (
            errors.RateLimitedError(60, 1.0),
            "Rate limit exceeded. Maximum 60 requests per minute allowed.",
        ),
        (errors.TooManyCallsError(9), "Rate limit exceeded. Maximum 9 open calls allowed."),
    ],
)
def test_the_contract_keeps_its_sentences(error: errors.ServiceError, sentence: str) -> None:
    why = refusal(failed(error))
    assert body_of(Current(), why)["message"] == sentence
    assert body_of(Plain(), why)["message"] == str(error)


@pytest.mark.parametrize(
    ("code", "case"),
    [
        (grpc.StatusCode.UNAVAILABLE, ErrorKind.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ErrorKind.UNAVAILABLE),
        (grpc.StatusCode.CANCELLED, ErrorKind.UNAVAILABLE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, ErrorKind.TOO_LARGE),
        (grpc.StatusCode.INVALID_ARGUMENT, ErrorKind.FAULT),
        (grpc.StatusCode.UNKNOWN, ErrorKind.FAULT),
    ],
)
def test_statuses_of_grpc_itself_have_no_details(code: grpc.StatusCode, case: ErrorKind) -> None:
    reported = refusal(AioRpcError(code, Metadata(), Metadata(), "from gRPC"))
    assert (reported.kind, reported.message) == (case, case.message)


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (job_pb2.Job(state=job_pb2.Job.STATE_CANCELLED), "Cancelled"),
        (job_pb2.Job(error=job_pb2.JobError(reason="QUEUE_CLEARED", message="x")), "Queue cleared"),
        (
            job_pb2.Job(error=job_pb2.JobError(reason="OUT_OF_MEMORY", message="out of memory")),
            "Processing failed: out of memory",
        ),
    ],
)
def test_a_failure_says_why(job: job_pb2.Job, message: str) -> None:
    assert responses.failure(job) == message


def test_an_unknown_estimate_is_a_number_all_the_same() -> None:
    assert responses.processing(job_pb2.Job(), "", "")["eta"] == 1.0


def test_links_come_in_sample_order() -> None:
    samples = [job_pb2.Sample(index=index, url=f"link {index}") for index in (2, 0, 1)]
    assert responses.links(job_pb2.Job(samples=samples)) == ["link 0", "link 1", "link 2"]


def test_a_job_made_over_grpc_has_all_28_keys_of_meta_too() -> None:
    spec = job_pb2.JobSpec(prompt="x", track_id="a", init_image=job_pb2.InitImage(data=b"x"))
    meta = responses.meta(job_pb2.Job(id=10_000_001, spec=spec))
    assert len(meta) == 28
    assert (meta["init_image"], meta["track_id"], meta["instant_response"]) == ("base64", "a", "no")


def test_the_cause_is_reported_next_to_the_contracts_sentence() -> None:
    sentence = "Unable to fetch image from provided URL"
    violations = [FetchError("the server answered 403: no").violation, required("width")]
    why = refusal(failed(errors.InvalidRequestError(violations)))
    assert why.violations == violations
    explained = "init_image cannot be downloaded: the server answered 403: no"
    body = body_of(ErrorFormat(), why)
    assert (body["message"], body["violations"][0]["message"]) == (explained, explained)
    reported = body_of(Current(), why)
    assert reported["message"] == sentence
    assert reported["errors"] == {
        "init_image": [f"{sentence}: the server answered 403: no"],
        "width": ["width is required"],
    }
    wanted = {"init_image": [f"{sentence}."], "width": ["The width field is required."]}
    assert body_of(Legacy(), why)["message"] == wanted
