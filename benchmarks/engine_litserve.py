"""LitServe as one of the systems in the benchmark. Its packages are in .img2img/."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.engine_load import Outcome, Request, Served
from benchmarks.engine_process import Place
from benchmarks.engine_stock import feed
from benchmarks.local_stack import free_port
from img2img_server.engine.options import limit_spinning

ROOT = Path(__file__).parent.parent
PACKAGES = ROOT / ".img2img" / "litserve"
_START_SECONDS = 240.0


def install() -> bool:
    """Installs LitServe if it is missing. Prints the reason if that fails."""
    pinned = ROOT / "benchmarks" / "litserve.txt"
    done = PACKAGES / ".installed"
    if importlib.util.find_spec("litserve"):
        return True
    if done.is_file() and done.read_text(encoding="utf-8") == pinned.read_text(encoding="utf-8"):
        return True
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    command += ["--upgrade", "--target", str(PACKAGES), "-r", str(pinned)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        print("(c) skipped: LitServe cannot be installed:", answer.stderr.strip()[-300:])
        return False
    done.write_text(pinned.read_text(encoding="utf-8"), encoding="utf-8")
    return True


class LitServeServer:
    """The process of LitServe, and the HTTP clients of a load.

    Its processes poll for work many times a second, which takes a fifth of a core when idle. They
    are paused while other systems are measured.

    Args:
        log: file for the output of the process.
    """

    def __init__(self, place: Place, log: Path) -> None:
        self._port = free_port()
        arguments = [place.source, self._port, place.rows, place.threads, place.device, place.dtype]
        names = [str(argument) for argument in arguments]
        # LitServe's own packages come first; torch and diffusers are shared.
        paths = [str(PACKAGES), str(ROOT), *(path for path in sys.path if path)]
        limit_spinning()  # the same number of threads as in the other systems
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.engine_litserve_app", *names],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        self._signal(signal.SIGSTOP)
        self._busy = self._networks = 0.0

    def serve(self, load: Sequence[Request]) -> Served:
        """Runs a load in real time."""
        self._signal(signal.SIGCONT)
        try:
            return self._serve(load)
        finally:
            self._signal(signal.SIGSTOP)

    def _serve(self, load: Sequence[Request]) -> Served:
        start = time.perf_counter()
        answers: list[Future[tuple[Outcome, dict[str, Any]]]] = []
        with ThreadPoolExecutor(max_workers=len(load)) as pool:
            feeder = threading.Thread(
                target=feed,
                args=(load, start, lambda one: answers.append(pool.submit(self._ask, one, start))),
            )
            feeder.start()
            feeder.join()
            found = [answer.result() for answer in answers]
        busy = max(figures["busy"] for _, figures in found)
        networks = max(figures["networks"] for _, figures in found)
        served = Served(
            [outcome for outcome, _ in found], busy - self._busy, networks - self._networks
        )
        self._busy, self._networks = busy, networks
        return served

    def stop(self) -> None:
        """Ends the process and its children."""
        self._signal(signal.SIGCONT)
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ask(self, request: Request, start: float) -> tuple[Outcome, dict[str, Any]]:
        # The clock of this process differs from the server's.
        asked = replace(request, arrival=0.0)
        body = asdict(asked)
        del body["traits"]  # the server runs UNets only
        figures = self._post(body)
        now = time.perf_counter() - start
        assert figures.pop("image")
        return Outcome(request, now, now), figures

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}/predict",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def _wait(self) -> None:
        until = time.monotonic() + _START_SECONDS
        while time.monotonic() < until:
            if self._process.poll() is not None:
                break
            with suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self._port}/health").close()
                return
            time.sleep(0.2)
        tail = self._log.read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(f"LitServe did not start:\n{tail}")
