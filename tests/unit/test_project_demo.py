"""The script of `make demo`: its error messages, and its cleanup.

Small shell scripts replace the two commands; the real ones run in CI's `make demo`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.readme import ROOT

READY = "img2img is ready: gRPC 127.0.0.1:4321, HTTP http://127.0.0.1:8080"
SERVER = f"""\
#!/bin/sh
trap 'echo stopping >&2; echo yes > "$DEMO/stopped"; kill $!; exit 0' TERM
echo "not ready yet" >&2
echo "starting"
echo "{READY}"
sleep 60 > /dev/null 2>&1 & wait
"""
CLIENT = """\
#!/bin/sh
echo "$@" > "$DEMO/client"
"""


@dataclass
class Stage:
    """A copy of the script in a folder with commands of the test."""

    root: Path

    def command(self, name: str, script: str) -> None:
        path = self.root / "bin" / name
        path.write_text(textwrap.dedent(script))
        path.chmod(0o755)

    def start(self, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "bin/python", self.root / "examples/demo.py"],
            env={**os.environ, "DEMO": str(self.root), **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, **env: str) -> tuple[int, str, str]:
        with self.start(**env) as process:
            out, err = process.communicate(timeout=30)
        return process.returncode, out, err


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    (tmp_path / "bin").mkdir()
    (tmp_path / "examples").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / "examples/demo.py").write_bytes((ROOT / "examples/demo.py").read_bytes())
    stage = Stage(tmp_path)
    stage.command("img2img-server", SERVER)
    stage.command("img2img", CLIENT)
    return stage


def test_the_demo_asks_for_the_image_and_stops_the_server(stage: Stage) -> None:
    code, out, err = stage.run()
    assert (code, err) == (0, "")
    assert out.splitlines()[-2:] == [
        f"The image is {stage.root}/demo/output.png.",
        "The service is stopped. `make serve` keeps it running, with links and a playground.",
    ]
    asked = (stage.root / "client").read_text().split()
    assert asked[:3] == ["generate", "--server", "127.0.0.1:4321"]
    assert asked[-2:] == ["--output", "demo/output.png"]
    assert (stage.root / "stopped").exists()
    log = (stage.root / "demo/server.log").read_text().splitlines()
    assert log == [
        "not ready yet",
        "starting",
        READY,
        "stopping",
    ]


SETTINGS = [
    f"IMG2IMG_{name}"
    for name in ("GRPC_PORT", "HTTP_PORT", "METRICS_PORT", "STATE_DIR", "API_KEYS_FILE")
]


def test_the_demo_runs_next_to_another_service_except_where_the_user_chose_otherwise(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    reported = "".join(f'echo "{name}=${name}" >> "$DEMO/ports"\n' for name in SETTINGS)
    stage.command(
        "img2img-server",
        SERVER.replace("echo starting", "true").replace(
            'echo "starting"\n', f'echo "starting"\n{reported}'
        ),
    )
    assert stage.run(IMG2IMG_HTTP_PORT="8123", IMG2IMG_API_KEYS_FILE="keys.toml")[0] == 0
    assert (stage.root / "ports").read_text().splitlines() == [
        "IMG2IMG_GRPC_PORT=0",
        "IMG2IMG_HTTP_PORT=8123",
        "IMG2IMG_METRICS_PORT=0",
        "IMG2IMG_STATE_DIR=.img2img/demo",
        "IMG2IMG_API_KEYS_FILE=",  # The demo uses dev-key.
    ]


def test_the_demo_shows_no_link_that_ends_with_the_service(stage: Stage) -> None:
    stage.command(
        "img2img",
        """\
        #!/bin/sh
        echo "demo/output.png  512x512, seed 1"
        echo "  http://127.0.0.1:8080/generations/1-0.png"
        echo "stage  ms"
        """,
    )
    code, out, _ = stage.run()
    assert code == 0
    assert "http" not in out
    assert "demo/output.png  512x512, seed 1\nstage  ms\n" in out


def test_the_demo_shows_why_the_server_did_not_start(stage: Stage) -> None:
    stage.command("img2img-server", "#!/bin/sh\necho 'port 50051 is in use' >&2\nexit 3\n")
    code, _, err = stage.run()
    assert code == 1
    assert err.splitlines() == [
        "demo: the server ended with status 3. The end of demo/server.log:",
        "    port 50051 is in use",
    ]
    assert not (stage.root / "client").exists()


def test_the_demo_says_when_the_server_dies_while_it_works(stage: Stage) -> None:
    stage.command("img2img-server", f"#!/bin/sh\necho '{READY}'\nsleep 0.2\nexit 9\n")
    stage.command("img2img", "#!/bin/sh\nexec sleep 60\n")
    code, _, err = stage.run()
    assert code == 1
    assert err.splitlines()[0] == (
        "demo: the server ended with status 9. The end of demo/server.log:"
    )


def test_the_demo_tells_the_status_of_a_client_that_failed(stage: Stage) -> None:
    stage.command("img2img", "#!/bin/sh\necho 'no such file' >&2\nexit 4\n")
    code, _, err = stage.run()
    assert code == 1
    assert err.splitlines() == [
        "no such file",
        "demo: img2img ended with status 4. The end of demo/server.log:",
        "    not ready yet",
        "    starting",
        f"    {READY}",
        "    stopping",
    ]
    assert (stage.root / "stopped").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_demo_that_is_interrupted_stops_the_server(stage: Stage, number: signal.Signals) -> None:
    stage.command("img2img", "#!/bin/sh\nexec sleep 60\n")
    with stage.start() as process:
        assert process.stdout is not None
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert lines[1].startswith("Ready after")
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "demo: stopped\n")
    assert (stage.root / "stopped").exists()


def test_the_photo_of_the_demo_is_shipped_with_its_licence() -> None:
    assert (ROOT / "examples/cat.jpg").exists()
    assert "cat.jpg" in (ROOT / "examples/LICENSES.md").read_text(encoding="utf-8")
