"""The command img2img as a process: real signals, a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import grpc
import pytest

from img2img.v1 import service_pb2
from tests.fake_job import NAME, events
from tests.fake_service import Break, FakeService, Refusal, serving

COMMAND = [sys.executable, "-c", "from img2img_command import main; main()"]
CONTROL = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")
WAIT_SECONDS = 60.0


def start(
    port: int,
    *words: str,
    stdout: int = subprocess.PIPE,
    stderr: int = subprocess.PIPE,
    columns: int = 100,
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *words, "--server", f"127.0.0.1:{port}"],
        stdout=stdout,
        stderr=stderr,
        text=True,
        env={**os.environ, "COLUMNS": str(columns), "TERM": "xterm-256color"},
    )


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    (tmp_path / "photo.jpg").write_bytes(b"photo")
    output = str(tmp_path / "out.png")
    init_image = str(tmp_path / "photo.jpg")
    return ["generate", "--prompt", "p", "--init-image", init_image, "--output", output]


def wait_for_preview(arguments: list[str]) -> None:
    """Waits until the command has processed six events; the sixth has a preview."""
    preview = Path(arguments[-1]).with_name("out-preview.jpg")
    deadline = time.monotonic() + WAIT_SECONDS
    while not preview.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "extra"),
    [
        (signal.SIGINT, []),
        (signal.SIGINT, ["--json"]),
        (signal.SIGTERM, []),
        (signal.SIGHUP, []),  # the terminal was closed
    ],
)
def test_signals_cancel_the_job_and_exit_with_130(
    arguments: list[str], sent: signal.Signals, extra: list[str]
) -> None:
    service = FakeService(pause_after=6)
    with serving(service) as port:
        process = start(port, *arguments, *extra)
        wait_for_preview(arguments)
        process.send_signal(sent)
        stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    assert service.requests[1:] == [
        service_pb2.CancelJobRequest(name=NAME),
        service_pb2.GetJobRequest(name=NAME),
    ]
    text = f"{NAME} was cancelled"
    assert stderr == f"{text}\n"
    if extra:
        error = {"reason": "INTERRUPTED", "message": text}
        assert json.loads(stdout) == {"name": NAME, "state": "cancelled", "error": error}
    else:
        assert stdout == ""


def test_ctrl_c_does_not_cancel_a_watched_job(arguments: list[str]) -> None:
    service = FakeService(pause_after=6)
    with serving(service) as port:
        process = start(port, "watch", NAME, *arguments[-2:])
        wait_for_preview(arguments)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stderr) == (130, f"{NAME} keeps running\n")
    assert service.requests == [service_pb2.WatchJobRequest(name=NAME)]


def test_a_terminal_shows_the_queue_the_steps_and_the_end(arguments: list[str]) -> None:
    lost = Break(9, Refusal(grpc.StatusCode.UNAVAILABLE))
    service = FakeService(log=events(samples=2), breaks=deque([lost]))
    ours, theirs = pty.openpty()
    with serving(service) as port:
        process = start(port, *arguments, "--json", stderr=theirs)
        os.close(theirs)
        shown = read_terminal(ours)
        stdout, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0
    assert json.loads(stdout)["state"] == "succeeded"
    *_, head, first, second = [line.strip() for line in shown.splitlines() if line.strip()]
    assert re.fullmatch(rf"✓ {NAME} done \d+\.\d s", head)
    assert re.fullmatch(r"sample 0 ━+ 2/2 seed 7, stored", first)
    assert re.fullmatch(r"sample 1 ━+ 2/2 seed 8, stored", second)


@pytest.mark.parametrize("columns", [40, 60])
def test_a_narrow_terminal_shows_the_whole_time_and_all_steps(
    arguments: list[str], columns: int
) -> None:
    ours, theirs = pty.openpty()
    with serving(FakeService()) as port:
        process = start(port, *arguments, "--json", stderr=theirs, columns=columns)
        os.close(theirs)
        shown = read_terminal(ours)
        process.communicate(timeout=WAIT_SECONDS)
    *_, head, bar = [line.strip() for line in shown.splitlines() if line.strip()]
    assert re.fullmatch(rf"✓ {NAME} done \d+\.\d s", head)
    assert re.fullmatch(r"sample 0 ━+ 2/2 seed 7, stored", bar)


def test_a_terminal_shows_the_loss_of_the_connection_and_the_reconnect(
    arguments: list[str],
) -> None:
    first, second = FakeService(pause_after=4), FakeService(pause_after=4)
    ours, theirs = pty.openpty()
    with serving(first) as port:
        process = start(port, *arguments, stderr=theirs)
        os.close(theirs)
        shown = read_until(ours, "denoising")
    shown += read_until(ours, "connection lost, retrying: cannot reach")
    with serving(second, port):
        shown += read_until(ours, "reconnected")
        process.send_signal(signal.SIGINT)
        shown += read_terminal(ours)
        process.communicate(timeout=WAIT_SECONDS)
    assert "transport" not in shown  # gRPC's own log is not printed
    assert process.returncode == 130
    assert second.requests[0] == service_pb2.WatchJobRequest(name=NAME, after_sequence=4)


def read_until(descriptor: int, text: str) -> str:
    """Returns the output up to the moment when the terminal has shown the text."""
    shown, deadline = b"", time.monotonic() + WAIT_SECONDS
    while text not in CONTROL.sub("", shown.decode(errors="ignore")):
        assert time.monotonic() < deadline, shown
        readable, _, _ = select.select([descriptor], [], [], 1.0)
        if readable:
            shown += os.read(descriptor, 65536)
    return CONTROL.sub("", shown.decode(errors="ignore"))


def read_terminal(descriptor: int) -> str:
    """Returns the output until the other side closes, without control sequences."""
    parts = []
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # EIO means that the other side is closed.
            part = b""
        if not part:
            break
        parts.append(part)
    os.close(descriptor)
    return CONTROL.sub("", b"".join(parts).decode())


def test_a_connection_that_fails_prints_one_line_and_nothing_of_grpc(
    arguments: list[str],
) -> None:
    with serving(FakeService()) as port:
        process = start(port, *arguments, "--tls")
        stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stdout) == (1, "")
    [line] = stderr.splitlines()
    assert "the server does not speak TLS" in line


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is not here")
@pytest.mark.parametrize("words", [["capabilities"], ["capabilities", "--tls"]])
@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_full_stdout_exits_with_1_and_an_error_message(
    words: list[str], extra: list[str]
) -> None:
    with serving(FakeService()) as port, open("/dev/full", "wb") as full:
        process = start(port, *words, *extra, stdout=full.fileno())
        _, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 1
    assert "Traceback" not in stderr
    assert stderr.startswith("Error: cannot ")


def test_ctrl_c_while_connecting_is_one_object_and_130(arguments: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        process = start(silent.getsockname()[1], *arguments, "--json")
        silent.accept()[0].close()  # The command is connecting.
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 130
    error = {"reason": "INTERRUPTED", "message": "stopped by Ctrl-C"}
    assert json.loads(stdout)["error"] == error
    assert "Traceback" not in stderr


def test_only_the_object_is_printed_without_a_terminal(arguments: list[str]) -> None:
    with serving(FakeService()) as port:
        process = start(port, *arguments, "--json")
        stdout, stderr = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout)["name"] == NAME
