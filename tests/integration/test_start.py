"""A role that cannot start: real processes. The last line on stderr names the setting and the
reason, every line of a JSON log is an object, and the end comes at once."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from benchmarks.local_stack import free_port
from img2img_server.engines.child import last_words
from img2img_server.settings import Settings
from tests.processes import Role

# In quiet the whole process takes about 0.7 s without torch. CPU time, so that a busy machine does
# not matter; the wall time beside it holds waits, which CPU time does not see.
CPU_SECONDS = 2.0
WALL_SECONDS = 15.0
TORCH_CPU_SECONDS = 12.0
# Prints what the interpreter has imported when the process ends.
LOADED = """
import os, sys
import img2img_server.lifecycle as lifecycle
end = os._exit
def exit_now(code):
    print("diffusers" in sys.modules, "torch" in sys.modules, flush=True)
    end(code)
os._exit = exit_now
from img2img_server.__main__ import main
main()
"""


@dataclass(frozen=True)
class End:
    """How a process ended. `lines`: those of stderr."""

    code: int
    lines: list[str]
    output: str
    seconds: float
    cpu_seconds: float

    @property
    def records(self) -> list[dict[str, Any]]:
        """Every line of a JSON log. Raises where one is no object."""
        found = [json.loads(line) for line in self.lines]
        assert all(isinstance(each, dict) for each in found)
        return found


async def ended(role: str, *, program: str = "", **changes: object) -> End:
    """Runs a role until it ends by itself."""
    clean = {key: value for key, value in os.environ.items() if "IMG2IMG" not in key}
    chosen = {"grpc_port": 0, "http_port": 0, "metrics_port": 0, "log_format": "json", **changes}
    names = {f"IMG2IMG_{name.upper()}": str(value) for name, value in chosen.items()}
    command = ["-c", program] if program else ["-m", "img2img_server"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *command,
        role,
        env={**clean, **names},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(120):
            output, errors = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return End(
        code=process.returncode or 0,
        lines=errors.decode().splitlines(),
        output=output.decode(),
        seconds=time.monotonic() - began,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def of(config: Settings) -> dict[str, object]:
    """The settings by which a process reaches the servers of the test run."""
    return {
        "nats_url": config.nats_url.get_secret_value(),
        "s3_endpoint_url": config.s3_endpoint_url,
        "s3_access_key": config.s3_access_key.get_secret_value(),
        "s3_secret_key": config.s3_secret_key.get_secret_value(),
        "s3_bucket": config.s3_bucket,
    }


@pytest.mark.parametrize(
    ("role", "changes", "reason"),
    [
        ("api", {"grpc_port": "eighty"}, "IMG2IMG_GRPC_PORT: must be a whole number"),
        ("api", {"grpc_port": "TAKEN"}, "IMG2IMG_GRPC_PORT: 127.0.0.1:TAKEN is in use"),
        ("worker", {"metrics_port": "TAKEN"}, "IMG2IMG_METRICS_PORT: 127.0.0.1:TAKEN is in use"),
        ("api", {"tls_cert_file": "NONE", "tls_key_file": "NONE"}, "IMG2IMG_TLS_KEY_FILE: NONE"),
        ("gateway", {"api_ca_file": "NONE"}, "IMG2IMG_API_CA_FILE: NONE cannot be read"),
        ("api", {"api_keys_file": "NONE"}, "IMG2IMG_API_KEYS_FILE: NONE: cannot be read"),
        ("worker", {"dtype": "float8"}, "IMG2IMG_DTYPE: must be auto, float32"),
        ("worker", {"model": "NONE"}, "IMG2IMG_MODEL: there is no model at NONE"),
        ("local", {"state_dir": "/proc/none"}, "IMG2IMG_STATE_DIR: "),
    ],
)
async def test_a_wrong_setting_ends_a_role_at_once_with_its_name_in_the_last_line(
    role: str, changes: dict[str, str], reason: str, tmp_path: Path
) -> None:
    with taken_port() as port:
        words = {"TAKEN": str(port), "NONE": str(tmp_path / "none")}
        for word, meant in words.items():
            changes = {name: value.replace(word, meant) for name, value in changes.items()}
            reason = reason.replace(word, meant)
        end = await ended(role, **changes)
    assert end.code == 2
    last = end.records[-1]["event"]
    assert last.startswith(f"img2img-server {role}: ")
    assert reason in last
    assert end.cpu_seconds < CPU_SECONDS
    assert end.seconds < WALL_SECONDS


@pytest.mark.parametrize("format_", ["console", "json"])
async def test_all_mistakes_are_lines_at_the_end_each_complete(
    format_: str, tmp_path: Path
) -> None:
    wrong = {"dtype": "float8", "lora_dir": tmp_path / "none", "log_level": "x"}
    end = await ended("worker", log_format=format_, **wrong)
    said = end.lines if format_ == "console" else [each["event"] for each in end.records]
    *each, last = said
    names = ["IMG2IMG_DTYPE", "IMG2IMG_LOG_LEVEL", "IMG2IMG_LORA_DIR"]
    assert [line.split(": ")[:2] for line in each] == [["img2img-server worker", n] for n in names]
    assert last.startswith("img2img-server worker: 3 mistakes: ")
    assert all(line.partition(": ")[2] in last for line in each)


async def test_a_device_that_is_not_there_is_told_before_a_model_library_is_imported(
    engine_settings: Callable[..., Settings],
) -> None:
    config = engine_settings()
    end = await ended("worker", program=LOADED, device="cuda:99", **of(config))
    assert end.code == 2
    assert end.records[-1]["event"].startswith(
        "img2img-server worker: IMG2IMG_DEVICE: cuda:99 is not there"
    )
    assert end.output.split() == ["False", "True"], "diffusers is not imported, torch is"
    assert end.cpu_seconds < TORCH_CPU_SECONDS
    both = await ended("worker", device="cuda:99", dtype="float8", **of(config))
    assert [each["event"].split(": ")[1] for each in both.records[-3:-1]] == [
        "IMG2IMG_DTYPE",
        "IMG2IMG_DEVICE",
    ]


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"s3_secret_key": "wrong"}, "IMG2IMG_S3_"),
        ({"s3_endpoint_url": "http://127.0.0.1:NONE"}, "IMG2IMG_S3_ENDPOINT_URL"),
        ({"nats_url": "nats://127.0.0.1:NONE"}, "IMG2IMG_NATS_URL"),
        ({"nats_url": "WRONG"}, "IMG2IMG_NATS_URL"),
    ],
)
async def test_a_store_or_bus_that_refuses_is_told_although_the_model_still_loads(
    engine_settings: Callable[..., Settings], changes: dict[str, str], setting: str
) -> None:
    config = of(engine_settings())
    host = str(config["nats_url"]).rpartition("@")[2]
    given = {
        name: value.replace("NONE", str(free_port())).replace(
            "WRONG", f"nats://nobody:nothing@{host}"
        )
        for name, value in changes.items()
    }
    end = await ended("worker", startup_timeout_seconds=1, **(config | given))
    assert end.code in (1, 2)
    last = end.records[-1]["event"]
    assert last.startswith("img2img-server worker: ")
    assert setting in last
    logged = [each for each in end.records if each["event"] == "role_failed"]
    assert [last] == [f"img2img-server worker: {each['reason']}" for each in logged] or not logged
    assert end.seconds < 1 + WALL_SECONDS


async def test_local_repeats_the_last_words_of_its_child(tmp_path: Path) -> None:
    end = await ended("local", device="cuda:99", state_dir=tmp_path / "state")
    *_, last = end.records
    assert end.code == 1
    assert last["event"].startswith(
        "img2img-server local: worker ended with exit code 2; it last said: IMG2IMG_DEVICE: "
    )
    assert "(see above)" not in "".join(end.lines)
    assert any(
        each["event"].startswith("img2img-server worker: IMG2IMG_DEVICE: ") for each in end.records
    )


def test_last_words_are_the_reasons_a_role_gives_else_its_last_line() -> None:
    said = [
        "2026-11-29 [info] api serves",
        '{"event": "img2img-server api: IMG2IMG_A: no", "exit_code": 2}',
    ]
    assert last_words("api", "\n".join(said)) == "IMG2IMG_A: no"
    assert last_words("api", "img2img-server api: IMG2IMG_A: no\n") == "IMG2IMG_A: no"
    assert last_words("api", "a\n terminate  called\n\n") == "terminate called"
    assert last_words("api", "") == ""


UNEXPECTED = """
import threading, time
import img2img_server.api.server as server
async def broken(settings, stop):
    threading.Thread(target=time.sleep, args=(600,)).start()
    raise KIND
server.serve_api = broken
import sys, img2img_server.__main__ as main
main.main()
"""


@pytest.mark.parametrize(
    ("kind", "code", "last"),
    [
        ("ZeroDivisionError('by zero')", 1, "unexpected ZeroDivisionError: by zero"),
        (
            "ExceptionGroup('x', [OSError(24, 'too many'), KeyError('a')])",
            1,
            "2 mistakes: unexpected ",
        ),
        ("BaseException('odd')", 1, "unexpected BaseException: odd"),
        ("KeyboardInterrupt", 130, "interrupted before it served"),
    ],
)
async def test_an_unexpected_error_has_its_traceback_in_the_log_and_one_last_line(
    kind: str, code: int, last: str
) -> None:
    end = await ended("api", program=UNEXPECTED.replace("KIND", kind), dev_key="true")
    assert end.code == code
    assert end.records[-1]["event"].startswith(f"img2img-server api: {last}")
    traced = [each for each in end.records if "Traceback" in each.get("exception", "")]
    assert bool(traced) == (code == 1)
    assert end.seconds < WALL_SECONDS, "no thread is waited for"


STOPPED = """
import os, signal
import img2img_server.__main__ as main
main._require = lambda *_: os.kill(os.getpid(), signal.SIGNAL)
main.main()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
async def test_a_process_that_is_stopped_before_its_packages_are_imported_says_so(
    name: str,
) -> None:
    end = await ended("api", program=STOPPED.replace("SIGNAL", name))
    assert end.code == 128 + signal.Signals[name]
    assert [each["event"] for each in end.records] == [f"img2img-server api: stopped by {name}"]


NOISE = """
import asyncio, logging, sys, threading, warnings
import img2img_server.api.server as server
async def noisy(settings, stop):
    warnings.warn("old")
    for name in ("library", "library.child", "uvicorn.error", "asyncio"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.StreamHandler())
        logger.propagate = False
        logger.warning("%s says", name)
    threading.Thread(target=lambda: 1 / 0, name="broken").start()
    asyncio.get_running_loop().call_exception_handler({"message": "never retrieved"})
    import tqdm
    list(tqdm.tqdm(range(3)))
    class Ill:
        def __del__(self): raise OSError("in del")
    Ill()
    await asyncio.sleep(0.2)
server.serve_api = noisy
import img2img_server.__main__ as main
main.main()
"""


async def test_what_libraries_and_the_interpreter_say_are_json_lines_once() -> None:
    end = await ended("api", program=NOISE, dev_key="true")
    assert end.code == 0
    events = [each["event"] for each in end.records]
    for name in ("library", "library.child", "uvicorn.error", "asyncio"):
        assert events.count(f"{name} says") == 1
    assert sum("UserWarning: old" in event for event in events) == 1
    assert {"thread_failed", "never retrieved", "error_ignored"} <= set(events)


async def test_every_line_of_a_running_api_and_gateway_is_json(
    engine_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    """Also when callers speak plaintext to TLS, which the core of gRPC writes about."""
    authority = trustme.CA()
    issued = authority.issue_cert("localhost", "127.0.0.1")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(str(files["ca"]))
    issued.cert_chain_pems[0].write_to_path(str(files["cert"]))
    issued.private_key_pem.write_to_path(str(files["key"]))
    config, grpc_port = engine_settings(), free_port()
    common = {f"IMG2IMG_{name.upper()}": str(value) for name, value in of(config).items()}
    common |= {"IMG2IMG_DEV_KEY": "true", "IMG2IMG_LOG_FORMAT": "json"}
    api = Role(
        "api",
        common
        | {
            "IMG2IMG_GRPC_PORT": str(grpc_port),
            "IMG2IMG_TLS_CERT_FILE": str(files["cert"]),
            "IMG2IMG_TLS_KEY_FILE": str(files["key"]),
        },
        tmp_path / "api.log",
    )
    # Without the authority: it speaks plaintext to a TLS port.
    gateway = Role(
        "gateway",
        common | {"IMG2IMG_HTTP_PORT": "0", "IMG2IMG_API_ADDRESS": f"127.0.0.1:{grpc_port}"},
        tmp_path / "gateway.log",
    )
    try:
        await api.start()
        await gateway.launch()
        await gateway.until("/livez")
        async with asyncio.timeout(30):
            while b"api_unavailable" not in (tmp_path / "gateway.log").read_bytes():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        assert await api.stop() == 0
        assert await gateway.stop() == 0
    for name in ("api", "gateway"):
        lines = (tmp_path / f"{name}.log").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        assert len(records) >= 3
    told = [each for each in records if each["event"] == "api_unavailable"]
    assert len(told) == 1, "once a change"
    assert "it may have TLS, which needs IMG2IMG_API_CA_FILE here" in told[0]["reason"]
