"""What the command img2img says when it is refused, and its exit codes."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator

import grpc
import pytest
from click.testing import CliRunner, Result
from google.rpc import error_details_pb2

from img2img.v1 import event_pb2
from img2img_client.cli import main
from img2img_client.resources import Image
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
        ((*WISH, "--output", "photo.jpg/out.png"), "cannot create the folder photo.jpg"),
        (
            ("generate", "--prompt", "p", "--init-image", "none.jpg"),
            "cannot read the init image none.jpg",
        ),
        ((*WISH, "--detach", "--timeout", "5"), "--timeout cannot be combined with --detach"),
        (("generate", "--prompt", "p"), "Missing option '--init-image'"),
        (("get", "cat"), "'cat' is not the name of a job"),
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
            violation(field="strength", description="too high", reason="OUT_OF_RANGE"),
            violation(field="width", description="not a multiple", reason="NOT_DIVISIBLE"),
        ]
    )
    wrong = Refusal(grpc.StatusCode.INVALID_ARGUMENT, "bad", "INVALID_REQUEST", (bad,))
    return FakeService(breaks=deque([Break(0, wrong)]))  # type: ignore[return-value]


def test_an_invalid_request_is_one_sentence_a_violation(invalid: FakeService) -> None:
    result = run(invalid, *WISH, "--strength", "1.5", "--width", "513")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "Error: too high\nError: not a multiple\n"


def test_an_invalid_request_as_json_is_in_the_golden_file(invalid: FakeService) -> None:
    result = run(invalid, *WISH, "--strength", "1.5", "--width", "513", "--json")
    assert result.exit_code == 2
    assert_golden("cli/invalid.json", result.stdout)


UNKNOWN_KEY = Refusal(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key", "INVALID_API_KEY")
GIVE_KEY = "Set your key with --api-key or IMG2IMG_API_KEY."
DEFAULT_KEY = f"No key was given, so dev-key was used. {GIVE_KEY}"


@pytest.mark.parametrize(
    ("words", "hint"), [((), DEFAULT_KEY), (("--api-key", "mine"), GIVE_KEY)], ids=["none", "mine"]
)
def test_a_refused_key_is_status_1_with_a_hint(words: tuple[str, ...], hint: str) -> None:
    result = run(FakeService(refusals=deque([UNKNOWN_KEY])), "get", "10000001", *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == ["Error: Invalid API key", hint]


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


def test_a_job_that_is_left_after_an_error_was_cancelled() -> None:
    result = run(FakeService(breaks=deque([Break(4, UNKNOWN_KEY)])), *WISH)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"{NAME} was cancelled",
        "Error: Invalid API key",
        DEFAULT_KEY,
    ]


def test_a_job_that_is_lost_from_sight_can_be_followed_again() -> None:
    service = FakeService(breaks=deque([Break(4, UNKNOWN_KEY)]), refusals=deque([UNKNOWN_KEY] * 2))
    result = run(service, *WISH)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"{NAME} may still be running; follow it with: img2img watch 10000001 --after 3",
        "Error: Invalid API key",
        DEFAULT_KEY,
    ]


def test_a_watch_of_a_job_that_does_not_exist_says_nothing_else() -> None:
    missing = Refusal(grpc.StatusCode.NOT_FOUND, "jobs/99 does not exist", "JOB_NOT_FOUND")
    for breaks in (Break(0, missing), Break(3, missing)):
        result = run(FakeService(breaks=deque([breaks])), "watch", "99")
        assert (result.exit_code, result.stderr) == (1, "Error: jobs/99 does not exist\n")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_timeout_says_that_the_job_was_cancelled(extra: list[str]) -> None:
    service = FakeService(pause_after=3)
    result = run(service, *WISH, "--timeout", "1.5", *extra)
    sentence = f"timed out after 1.5 s; {NAME} was cancelled"
    assert (result.exit_code, result.stderr) == (1, f"Error: {sentence}\n")
    assert service.cancelled.is_set()
    if extra:
        error = json.loads(result.stdout)["error"]
        assert error["message"] == sentence
        assert (error["code"], error["reason"]) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        assert error["metadata"] == {"job": NAME}


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "soon", "1e999"])
def test_a_timeout_that_is_no_time_is_refused(seconds: str) -> None:
    result = refuse(*WISH, "--timeout", seconds)
    assert result.exit_code == 2
    assert f"'{seconds}' is not a number of seconds above 0." in result.stderr


def test_a_service_that_is_not_there_is_named_with_a_hint() -> None:
    with serving(FakeService()) as port:
        pass  # a port where nobody listens any more
    result = CliRunner().invoke(main, ["capabilities", "--server", f"127.0.0.1:{port}"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: cannot reach the service at 127.0.0.1:{port}: "
        "nothing listens there (connection refused)",
        "Is it running? `img2img-server local` starts it on this machine.",
    ]


def test_the_hint_is_only_for_a_service_that_does_not_run() -> None:
    result = run(FakeService(), "capabilities", "--tls")
    assert result.exit_code == 1
    assert "the server does not speak TLS" in result.stderr
    assert "Is it running?" not in result.stderr


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("photo.jpg", "photo.jpg contains no valid PEM certificate"),
        ("none.pem", "'none.pem' does not exist"),
        (".", "'.' is a directory"),
    ],
)
def test_a_ca_file_that_is_none_is_refused_with_its_name(name: str, sentence: str) -> None:
    result = refuse("capabilities", "--ca-file", name)
    assert result.exit_code == 2
    assert "--ca-file" in result.stderr
    assert sentence in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "field"),
    [
        (("generate", "--prompt", "p", "--init-image", "none.jpg"), 2, "init_image"),
        (("generate", "--prompt", "p"), 2, "init_image"),
        ((*WISH, "--no-such-flag"), 2, "no_such_flag"),
        ((*WISH, "--samples", "two"), 2, "samples"),
        ((*WISH, "--output", "out.gif"), 2, "output"),
        ((*WISH, "--timeout", "-1"), 2, "timeout_seconds"),
        ((*WISH, "--detach", "--timeout", "5"), 2, ""),
        ((*WISH, "--width", "99999999999"), 2, "width"),
        ((*WISH, "--api-key", "schlüssel"), 2, "api_key"),
        ((*WISH, "--ca-file", "photo.jpg"), 2, "ca_file"),
        (("watch", NAME, "--output", "out.jpg"), 2, ""),
        (("get", "cat"), 2, "job"),
        (("get",), 2, "job"),
        (("no-such-command",), 2, ""),
        (("admin", "no-such-command"), 2, ""),
        ((), 2, "json"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, tuple) else "",
)
def test_every_mistake_is_one_json_object(words: tuple[str, ...], code: int, field: str) -> None:
    service = FakeService()
    with serving(service) as port:
        where = ["--server", f"127.0.0.1:{port}"] if words and words[0] != "admin" else []
        where = [] if words == ("no-such-command",) else where
        result = CliRunner().invoke(main, [*words, *where, "--json"])
    assert result.exit_code == code
    error = json.loads(result.stdout)["error"]
    assert (error["reason"], error["code"]) == ("INVALID_REQUEST", "INVALID_ARGUMENT")
    assert error["message"] in result.stderr.replace("\n", " ")
    assert [violation["field"] for violation in error["violations"]] == [field]


def test_a_server_that_is_none_is_one_json_object() -> None:
    for server in ("http://127.0.0.1:1", "img2img.example.com", "a b"):
        result = CliRunner().invoke(main, ["capabilities", "--json", "--server", server])
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"]["reason"] == "INVALID_REQUEST"


def test_a_file_that_cannot_be_written_is_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image, "save", full)
    result = run(FakeService(), *WISH, "--json")
    assert result.exit_code == 1
    message = "cannot write the output: No space left on device"
    assert json.loads(result.stdout) == {
        "error": {"reason": "FILE_NOT_WRITTEN", "message": message}
    }


def test_a_fault_of_the_command_itself_is_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Image, "save", broken)
    result = run(FakeService(), *WISH, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["reason"] == "INTERNAL"
