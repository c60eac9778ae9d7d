"""What the command img2img says when it is refused, and its exit codes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import grpc
import pytest
from click.testing import CliRunner, Result
from google.rpc import error_details_pb2

from img2img.v1 import event_pb2
from img2img_client.cli import main
from tests.cli_runs import WISH, in_a_folder_with_a_photo, run
from tests.fake_job import NAME, State, ending, job
from tests.fake_service import Break, FakeService, Refusal, serving
from tests.golden_file import assert_golden

pytestmark = pytest.mark.usefixtures(in_a_folder_with_a_photo.__name__)


def refuse(*words: str) -> Result:
    """Runs a command that must not get as far as a call."""
    service = FakeService()
    result = run(service, *words)
    assert service.requests == []
    return result


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*WISH, "--output", "out.gif"), "out.gif must end in one of .png, .jpg, .jpeg, .webp"),
        ((*WISH, "--output", "photo.jpg/out.png"), "cannot make the folder photo.jpg"),
        (("generate", "--prompt", "p", "--init-image", "none.jpg"), "cannot read none.jpg"),
        ((*WISH, "--detach", "--timeout", "5"), "--timeout has no meaning with --detach"),
        (("generate", "--prompt", "p"), "Missing option '--init-image'"),
        (("get", "cat"), "'cat' names no job; a job is jobs/10000001 or 10000001"),
        ((*WISH, "--samples", "two"), "'two' is not a valid integer"),
        ((*WISH, "--width", "99999999999"), "width cannot be 99999999999"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_work_is_refused_before_any_call(words: tuple[str, ...], sentence: str) -> None:
    result = refuse(*words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.fixture
def invalid() -> Iterator[FakeService]:
    violation = error_details_pb2.BadRequest.FieldViolation
    bad = error_details_pb2.BadRequest(
        field_violations=[
            violation(field="strength", description="strength must be between 0 and 1"),
            violation(field="width", description="width must be divisible by 8"),
        ]
    )
    wrong = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "bad", "INVALID_REQUEST", (bad,))
    return FakeService(breaks=deque([Break(0, wrong)]))  # type: ignore[return-value]


def test_an_invalid_request_is_one_sentence_a_violation(invalid: FakeService) -> None:
    result = run(invalid, *WISH, "--strength", "1.5", "--width", "513")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == (
        "Error: strength must be between 0 and 1\nError: width must be divisible by 8\n"
    )


def test_an_invalid_request_as_json_is_in_the_golden_file(invalid: FakeService) -> None:
    result = run(invalid, *WISH, "--strength", "1.5", "--width", "513", "--json")
    assert result.exit_code == 2
    assert_golden("cli/invalid.json", result.stdout)


def test_a_refused_call_is_a_sentence_and_status_1() -> None:
    refusal = Refusal(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key", "INVALID_API_KEY")
    result = run(FakeService(refusals=deque([refusal])), "get", "10000001")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "Error: Invalid API key\n")


def test_a_failed_job_is_status_1_and_its_reason() -> None:
    failed = ending(failed=event_pb2.JobFailed(job=job(State.STATE_FAILED)))
    result = run(FakeService(log=[failed]), *WISH)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {NAME} failed (OUT_OF_MEMORY): out of memory at 512x512\n"


def test_a_failed_job_as_json_is_in_the_golden_file() -> None:
    failed = ending(failed=event_pb2.JobFailed(job=job(State.STATE_FAILED)))
    result = run(FakeService(log=[failed]), *WISH, "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    assert_golden("cli/failed.json", result.stdout)


def test_a_job_that_is_lost_from_sight_can_be_followed_again() -> None:
    refusal = Refusal(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key", "INVALID_API_KEY")
    result = run(FakeService(breaks=deque([Break(4, refusal)])), *WISH)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"{NAME} may still be running; follow it: img2img watch 10000001 --after 3",
        "Error: Invalid API key",
    ]


def test_a_service_that_is_not_there_is_named_with_a_hint() -> None:
    with serving(FakeService()) as port:
        pass  # a port where nobody listens any more
    result = CliRunner().invoke(main, ["capabilities", "--server", f"127.0.0.1:{port}"])
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0].startswith(f"Error: cannot reach the service at 127.0.0.1:{port}: ")
    assert lines[1:] == ["Is it running? `img2img-server local` starts it on this machine."]
