"""The command with stdin and stdout: `-` as the init image and as the output, and `estimate`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_client.cli import main
from tests.cli_runs import REQUEST, in_a_folder_with_a_photo, run
from tests.fake_job import NAME, State, events, job
from tests.fake_service import Break, FakeService, last, serving
from tests.golden_file import assert_golden
from tests.readme import ROOT

IMAGE = b"\x89PNG image of sample 0"
STDIN = ("generate", "--prompt", "p", "--init-image", "-")
pytestmark = pytest.mark.usefixtures(in_a_folder_with_a_photo.__name__)


def run_with(service: FakeService, stdin: bytes, *words: str) -> Result:
    """Runs a command with bytes on stdin."""
    with serving(service) as port:
        server = ("--server", f"127.0.0.1:{port}")
        return CliRunner().invoke(main, [*words, *server], input=stdin)


@pytest.mark.parametrize("command", ["generate", "estimate"])
def test_the_init_image_is_read_from_stdin(command: str) -> None:
    service, photo = FakeService(), bytes(range(256))
    result = run_with(service, photo, command, *STDIN[1:])
    assert result.exit_code == 0, result.output
    assert service.requests[-1].spec.init_image.data == photo  # type: ignore[attr-defined]


def test_an_empty_stdin_is_refused_before_any_call() -> None:
    service = FakeService()
    result = run_with(service, b"", *STDIN)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--init-image: stdin is empty" in result.stderr
    assert not service.requests


@pytest.mark.parametrize("words", [(*STDIN, "--output", "-"), ("watch", NAME, "--output", "-")])
def test_stdout_gets_the_bytes_of_the_image_and_stderr_everything_else(
    words: tuple[str, ...],
) -> None:
    # The stream breaks after the image, which must not be written twice.
    service = FakeService()
    service.breaks.append(Break(after=len(service.log) - 1))
    result = run_with(service, b"photo", *words)
    assert (result.exit_code, result.stdout_bytes) == (0, IMAGE)
    assert f"{NAME} with " in result.stderr
    assert [path.name for path in Path().iterdir()] == ["photo.jpg"]


def test_the_format_of_stdout_is_that_of_the_option() -> None:
    service = FakeService(log=events(media_type="image/webp"))
    result = run(service, *REQUEST, "--output", "-", "--format", "webp")
    assert result.exit_code == 0
    sent = last(service.requests, service_pb2.GenerateRequest).spec
    assert sent.output_format == job_pb2.IMAGE_FORMAT_WEBP


def test_the_default_file_has_the_suffix_of_the_format() -> None:
    service = FakeService(log=events(media_type="image/jpeg"))
    assert run(service, *REQUEST, "--format", "jpeg").exit_code == 0
    assert Path("10000001.jpeg").read_bytes() == IMAGE


def test_a_job_that_fails_writes_nothing_to_stdout() -> None:
    *log, end = events()
    failed = event_pb2.JobFailed(job=job(State.STATE_FAILED))
    log.append(event_pb2.JobEvent(sequence=end.sequence, job=NAME, failed=failed))
    service = FakeService(log=log)
    result = run(service, *REQUEST, "--output", "-")
    assert (result.exit_code, result.stdout_bytes) == (1, b"")
    assert f"Error: {NAME} failed" in result.stderr


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--json",), "--json"),
        (("--detach",), "--detach"),
        (("--samples", "2"), "--samples"),
        (("--preview-every", "1"), "--preview-every"),
    ],
)
def test_options_that_print_more_than_one_image_cannot_be_combined_with_stdout(
    words: tuple[str, ...], option: str
) -> None:
    service = FakeService()
    result = run(service, *REQUEST, "--output", "-", *words)
    assert result.exit_code == 2
    assert f"cannot be combined with {option}" in result.stderr
    assert not service.requests


def test_a_watched_job_with_several_images_is_not_written_to_stdout() -> None:
    result = run(FakeService(log=events(samples=2)), "watch", NAME, "--output", "-")
    assert (result.exit_code, result.stdout_bytes) == (2, b"")
    assert "has several images" in result.stderr


def test_a_format_that_is_not_that_of_the_file_is_refused() -> None:
    result = run(FakeService(), *REQUEST, "--output", "out.png", "--format", "webp")
    assert result.exit_code == 2
    assert "--format: out.png is not a webp file" in result.stderr


@pytest.mark.parametrize(
    ("words", "stream"), [(STDIN, "stdin"), ((*REQUEST, "--output", "-"), "stdout")]
)
def test_a_terminal_is_neither_read_nor_written(words: tuple[str, ...], stream: str) -> None:
    """A person who forgets the pipe gets an error, not a terminal full of bytes."""
    main_side, terminal = os.openpty()
    code = "from img2img_command import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *words, "--server", "127.0.0.1:1"],
        stdin=terminal if stream == "stdin" else subprocess.DEVNULL,
        stdout=terminal if stream == "stdout" else subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT)])},
    )
    os.close(terminal)
    os.close(main_side)
    assert done.returncode == 2
    assert f"{stream}, which is a terminal" in done.stderr


@pytest.mark.parametrize("form", ["txt", "json"])
def test_an_estimate_prints_the_golden_file(form: str) -> None:
    service = FakeService()
    extra = ["--json"] if form == "json" else []
    result = run(service, "estimate", "--prompt", "p", "--steps", "30", *extra)
    assert (result.exit_code, result.stderr) == (0, "")
    assert_golden(f"cli/estimate.{form}", result.stdout)
    [request] = service.requests
    assert isinstance(request, service_pb2.EstimateJobRequest)
    assert request.spec.num_inference_steps == 30
    assert not request.spec.HasField("init_image")
