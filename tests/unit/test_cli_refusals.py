"""Error messages and exit codes of the command img2img."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator

import grpc
import pytest
from click.testing import CliRunner, Result

from img2img.v1 import event_pb2
from img2img_client.cli import main
from img2img_client.resources import Image
from tests.cli_runs import REQUEST, in_a_folder_with_a_photo, run
from tests.fake_job import NAME, State, ending, job
from tests.fake_service import INVALID, Break, FakeService, Refusal, serving
from tests.golden_file import assert_golden

pytestmark = pytest.mark.usefixtures(in_a_folder_with_a_photo.__name__)


def refuse(*words: str) -> Result:
    """Runs a command that must not make any call."""
    service = FakeService()
    result = run(service, *words)
    assert service.requests == []
    return result


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*REQUEST, "--output", "out.gif"), "out.gif must end in one of .png, .jpg, .jpeg, .webp"),
        ((*REQUEST, "--output", "photo.jpg/out.png"), "cannot create the folder photo.jpg"),
        (
            ("generate", "--prompt", "p", "--init-image", "none.jpg"),
            "cannot read the init image none.jpg",
        ),
        ((*REQUEST, "--detach", "--timeout", "5"), "--timeout cannot be combined with --detach"),
        (("generate", "--prompt", "p"), "Missing option '--init-image'"),
        (("get", "cat"), "'cat' is not the name of a job"),
        ((*REQUEST, "--samples", "two"), "'two' is not a valid integer"),
        ((*REQUEST, "--width", "99999999999"), "width cannot be 99999999999"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_invalid_command_line_is_rejected_before_any_call(
    words: tuple[str, ...], sentence: str
) -> None:
    result = refuse(*words)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


@pytest.fixture
def invalid() -> Iterator[FakeService]:
    return FakeService(breaks=deque([Break(0, INVALID)]))  # type: ignore[return-value]


def test_an_invalid_request_prints_one_line_for_each_violation(invalid: FakeService) -> None:
    result = run(invalid, *REQUEST, "--strength", "1.5", "--width", "513")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr == "Error: too high\nError: not a multiple\n"


def test_an_invalid_request_as_json_is_in_the_golden_file(invalid: FakeService) -> None:
    result = run(invalid, *REQUEST, "--strength", "1.5", "--width", "513", "--json")
    assert result.exit_code == 2
    assert_golden("cli/invalid.json", result.stdout)


UNKNOWN_KEY = Refusal(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key", "INVALID_API_KEY")
GIVE_KEY = "Set your key with --api-key or IMG2IMG_API_KEY."
DEFAULT_KEY = f"No key was given, so dev-key was used. {GIVE_KEY}"


@pytest.mark.parametrize(
    ("words", "hint"), [((), DEFAULT_KEY), (("--api-key", "mine"), GIVE_KEY)], ids=["none", "mine"]
)
def test_a_rejected_key_exits_with_1_and_a_hint(words: tuple[str, ...], hint: str) -> None:
    result = run(FakeService(refusals=deque([UNKNOWN_KEY])), "get", "10000001", *words)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines() == ["Error: Invalid API key", hint]


def test_a_failed_job_exits_with_1_and_prints_its_reason() -> None:
    failed = ending(failed=event_pb2.JobFailed(job=job(State.STATE_FAILED)))
    result = run(FakeService(log=[failed]), *REQUEST)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == f"Error: {NAME} failed (OUT_OF_MEMORY): out of memory at 512x512\n"


def test_a_failed_job_as_json_is_in_the_golden_file() -> None:
    failed = ending(failed=event_pb2.JobFailed(job=job(State.STATE_FAILED)))
    result = run(FakeService(log=[failed]), *REQUEST, "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    assert_golden("cli/failed.json", result.stdout)


def test_an_error_in_a_stream_cancels_the_job_and_reports_it() -> None:
    result = run(FakeService(breaks=deque([Break(4, UNKNOWN_KEY)])), *REQUEST)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"{NAME} was cancelled",
        "Error: Invalid API key",
        DEFAULT_KEY,
    ]


def test_a_job_of_unknown_state_comes_with_the_command_to_follow_it() -> None:
    service = FakeService(breaks=deque([Break(4, UNKNOWN_KEY)]), refusals=deque([UNKNOWN_KEY] * 2))
    result = run(service, *REQUEST)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"{NAME} may still be running; follow it with: img2img watch 10000001 --after 3",
        "Error: Invalid API key",
        DEFAULT_KEY,
    ]


def test_a_watch_of_a_missing_job_prints_only_the_error() -> None:
    missing = Refusal(grpc.StatusCode.NOT_FOUND, "jobs/99 does not exist", "JOB_NOT_FOUND")
    for breaks in (Break(0, missing), Break(3, missing)):
        result = run(FakeService(breaks=deque([breaks])), "watch", "99")
        assert (result.exit_code, result.stderr) == (1, "Error: jobs/99 does not exist\n")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_timeout_says_that_the_job_was_cancelled(extra: list[str]) -> None:
    service = FakeService(pause_after=3)
    result = run(service, *REQUEST, "--timeout", "1.5", *extra)
    sentence = f"timed out after 1.5 s; {NAME} was cancelled"
    assert (result.exit_code, result.stderr) == (1, f"Error: {sentence}\n")
    assert service.cancelled.is_set()
    if extra:
        error = json.loads(result.stdout)["error"]
        assert error["message"] == sentence
        assert (error["code"], error["reason"]) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
        assert error["metadata"] == {"job": NAME}


@pytest.mark.parametrize("seconds", ["-1", "0", "nan", "inf", "soon", "1e999"])
def test_an_invalid_timeout_is_rejected(seconds: str) -> None:
    result = refuse(*REQUEST, "--timeout", seconds)
    assert result.exit_code == 2
    assert f"'{seconds}' is not a number of seconds above 0." in result.stderr


def test_an_unreachable_local_service_is_reported_with_a_hint() -> None:
    with serving(FakeService()) as port:
        pass  # From here on, nothing listens on the port.
    result = CliRunner().invoke(main, ["capabilities", "--server", f"127.0.0.1:{port}"])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"Error: cannot reach the service at 127.0.0.1:{port}: "
        "nothing listens there (connection refused)",
        "If it is not running, start it with `img2img-server local`.",
    ]


def test_the_hint_is_only_for_a_service_that_does_not_run() -> None:
    result = run(FakeService(), "capabilities", "--tls")
    assert result.exit_code == 1
    assert "the server does not speak TLS" in result.stderr
    assert "If it is not running" not in result.stderr


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("photo.jpg", "photo.jpg contains no valid PEM certificate"),
        ("none.pem", "'none.pem' does not exist"),
        (".", "'.' is a directory"),
    ],
)
def test_an_invalid_ca_file_is_rejected_by_name(name: str, sentence: str) -> None:
    result = refuse("capabilities", "--ca-file", name)
    assert result.exit_code == 2
    assert "--ca-file" in result.stderr
    assert sentence in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "field"),
    [
        (("generate", "--prompt", "p", "--init-image", "none.jpg"), 2, "init_image"),
        (("generate", "--prompt", "p"), 2, "init_image"),
        ((*REQUEST, "--no-such-flag"), 2, "no_such_flag"),
        ((*REQUEST, "--samples", "two"), 2, "samples"),
        ((*REQUEST, "--output", "out.gif"), 2, "output"),
        ((*REQUEST, "--timeout", "-1"), 2, "timeout_seconds"),
        ((*REQUEST, "--detach", "--timeout", "5"), 2, ""),
        ((*REQUEST, "--width", "99999999999"), 2, "width"),
        ((*REQUEST, "--api-key", "schlüssel"), 2, "api_key"),
        ((*REQUEST, "--ca-file", "photo.jpg"), 2, "ca_file"),
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


def test_an_invalid_server_is_one_json_object() -> None:
    for server in ("http://127.0.0.1:1", "img2img.example.com", "a b"):
        result = CliRunner().invoke(main, ["capabilities", "--json", "--server", server])
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"]["reason"] == "INVALID_REQUEST"


def test_a_file_that_cannot_be_written_is_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image, "save", full)
    result = run(FakeService(), *REQUEST, "--json")
    assert result.exit_code == 1
    message = "cannot write the output: No space left on device"
    assert json.loads(result.stdout) == {
        "error": {"reason": "FILE_NOT_WRITTEN", "message": message}
    }


def test_a_bug_of_the_command_is_one_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Image, "save", broken)
    result = run(FakeService(), *REQUEST, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["reason"] == "INTERNAL"
