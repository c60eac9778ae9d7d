"""Roles that cannot start, as real processes. The last line on stderr names the setting and the
reason, every line of a JSON log is an object, and the process ends at once.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
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

import trustme

from benchmarks.local_stack import free_port
from img2img_server.devstack.child import last_line
from img2img_server.settings import Settings
from tests.processes import Role

# On an idle machine the process takes about 0.7 s without torch. CPU time does not depend on other
# processes; the wall time includes waits.
CPU_SECONDS = 2.0
WALL_SECONDS = 40.0  # less than the default of startup_timeout_seconds
TORCH_CPU_SECONDS = 12.0
# Prints the modules that the interpreter has imported when the process ends.
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
    """The end of a process. `lines`: the lines of its stderr."""

    code: int
    lines: list[str]
    output: str
    seconds: float

    @property
    def records(self) -> list[dict[str, Any]]:
        """Returns every line of a JSON log as an object. Raises an error for any other line."""
        found = [json.loads(line) for line in self.lines]
        assert all(isinstance(each, dict) for each in found)
        return found


async def ended(role: str, *, program: str = "", **changes: object) -> End:
    """Runs a role until its process ends."""
    clean = {key: value for key, value in os.environ.items() if "IMG2IMG" not in key}
    chosen = {"grpc_port": 0, "http_port": 0, "metrics_port": 0, "log_format": "json", **changes}
    names = {f"IMG2IMG_{name.upper()}": str(value) for name, value in chosen.items()}
    command = ["-c", program] if program else ["-m", "img2img_server"]
    began = time.monotonic()
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
    return End(
        code=process.returncode or 0,
        lines=errors.decode().splitlines(),
        output=output.decode(),
        seconds=time.monotonic() - began,
    )


def cpu_seconds(before: resource.struct_rusage, after: resource.struct_rusage) -> float:
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def of(config: Settings) -> dict[str, object]:
    """Returns settings with which a process reaches the servers of the test run."""
    return {
        "nats_url": config.nats_url.get_secret_value(),
        "s3_endpoint_url": config.s3_endpoint_url,
        "s3_access_key": config.s3_access_key.get_secret_value(),
        "s3_secret_key": config.s3_secret_key.get_secret_value(),
        "s3_bucket": config.s3_bucket,
    }


async def test_wrong_settings_end_a_role_at_once_with_all_of_them_in_the_last_line(
    tmp_path: Path,
) -> None:
    """The settings contain a mistake of each class, for all four roles."""
    none = str(tmp_path / "none")
    with taken_port() as port:
        taken = f"127.0.0.1:{port} is in use"
        wrong: dict[str, dict[str, tuple[object, str]]] = {
            "api": {
                "grpc_port": (port, taken),
                "max_watchers": ("many", "must be a valid integer, not 'many'"),
                "tls_cert_file": (none, f"{none} cannot be read: No such file or directory"),
                "tls_key_file": (none, f"{none} cannot be read: No such file or directory"),
                "api_keys_file": (none, f"{none}: cannot be read: No such file or directory"),
            },
            "gateway": {"api_ca_file": (none, f"{none} cannot be read: No such file or directory")},
            "worker": {
                "metrics_port": (port, taken),
                "dtype": (
                    "float8",
                    "must be 'auto', 'float32', 'float16' or 'bfloat16', not 'float8'",
                ),
                "model": (none, f"there is no model at {none}"),
            },
            "local": {
                "state_dir": ("/proc/none", "folder /proc is not writable: No such file"),
                "log_level": ("x", "must be 'debug', 'info', 'warning' or 'error', not 'x'"),
            },
        }
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ends = await asyncio.gather(
            *(
                ended(
                    role,
                    log_format="console" if role == "local" else "json",
                    **{name: value for name, (value, _) in mistakes.items()},
                )
                for role, mistakes in wrong.items()
            )
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    for (role, mistakes), end in zip(wrong.items(), ends, strict=True):
        *each, last = end.lines if role == "local" else [line["event"] for line in end.records]
        assert end.code == 2
        assert last.startswith(f"img2img-server {role}: ")
        for name, (_, reason) in mistakes.items():
            assert f"IMG2IMG_{name.upper()}: {reason}" in last
        if len(mistakes) > 1:
            assert last.startswith(f"img2img-server {role}: {len(mistakes)} mistakes: ")
            assert len(each) == len(mistakes)
            assert all(line.partition(": ")[2] in last for line in each)
        assert end.seconds < WALL_SECONDS
    assert cpu_seconds(before, after) < CPU_SECONDS * len(wrong)


async def test_a_device_that_is_not_there_is_reported_before_a_model_library_is_imported(
    engine_settings: Callable[..., Settings],
) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    end = await ended("worker", program=LOADED, device="cuda:99", **of(engine_settings()))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.code == 2
    assert end.records[-1]["event"].startswith(
        "img2img-server worker: IMG2IMG_DEVICE: cuda:99 is not there"
    )
    assert end.output.split() == ["False", "True"], "diffusers is not imported, torch is"
    assert cpu_seconds(before, after) < TORCH_CPU_SECONDS


async def test_a_store_or_bus_that_is_away_is_reported_although_the_model_still_loads(
    engine_settings: Callable[..., Settings],
) -> None:
    config = of(engine_settings())
    away = {
        "s3_endpoint_url": f"http://127.0.0.1:{free_port()}",
        "nats_url": f"nats://127.0.0.1:{free_port()}",
    }
    ends = await asyncio.gather(
        *(
            ended("worker", startup_timeout_seconds=1, **(config | {name: url}))
            for name, url in away.items()
        )
    )
    for name, end in zip(away, ends, strict=True):
        assert end.code == 1
        last = end.records[-1]["event"]
        assert last.startswith(f"img2img-server worker: IMG2IMG_{name.upper()}: ")
        logged = [each for each in end.records if each["event"] == "role_failed"]
        assert [last] == [f"img2img-server worker: {each['reason']}" for each in logged] or (
            not logged
        )
        assert end.seconds < 1 + WALL_SECONDS


async def test_local_repeats_the_last_line_of_its_child(tmp_path: Path) -> None:
    end = await ended("local", nats_replicas=5, state_dir=tmp_path / "state")
    *_, last = end.records
    assert end.code == 1
    assert re.match(
        r"img2img-server local: (api|worker) ended with exit code 2; its last line: "
        r"IMG2IMG_NATS_REPLICAS: ",
        last["event"],
    )
    assert "(see above)" not in "".join(end.lines)
    name = last["event"].split()[2]
    reason = f"img2img-server {name}: IMG2IMG_NATS_REPLICAS: "
    assert any(each["event"].startswith(reason) for each in end.records)


def test_the_last_line_is_the_reasons_a_role_gives_else_its_last_line() -> None:
    said = [
        "2026-11-29 [info] api serves",
        '{"event": "img2img-server api: IMG2IMG_A: no", "exit_code": 2}',
    ]
    assert last_line("api", "\n".join(said)) == "IMG2IMG_A: no"
    assert last_line("api", "img2img-server api: IMG2IMG_A: no\n") == "IMG2IMG_A: no"
    assert last_line("api", "a\n terminate  called\n\n") == "terminate called"
    assert last_line("api", "") == ""


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


async def test_an_unexpected_error_has_its_traceback_in_the_log_and_one_last_line() -> None:
    kinds = {
        "ExceptionGroup('x', [OSError(24, 'too many'), KeyError('a')])": (
            1,
            "2 mistakes: unexpected OSError",
        ),
        "BaseException('odd')": (1, "unexpected BaseException: odd"),
        "KeyboardInterrupt": (130, "interrupted before it served"),
    }
    ends = await asyncio.gather(
        *(ended("api", program=UNEXPECTED.replace("KIND", kind), dev_key="true") for kind in kinds)
    )
    for (code, last), end in zip(kinds.values(), ends, strict=True):
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


async def test_a_process_that_is_stopped_before_its_packages_are_imported_says_so() -> None:
    for name in ("SIGTERM", "SIGINT"):
        end = await ended("api", program=STOPPED.replace("SIGNAL", name))
        assert end.code == 128 + signal.Signals[name]
        (line,) = end.records
        assert (line["event"], line["level"]) == (f"img2img-server api: stopped by {name}", "info")


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
    """This includes callers that use plaintext on a TLS port, about which gRPC's core logs."""
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
    # Without the CA setting, the gateway uses plaintext on a TLS port.
    gateway = Role(
        "gateway",
        common | {"IMG2IMG_HTTP_PORT": "0", "IMG2IMG_API_ADDRESS": f"127.0.0.1:{grpc_port}"},
        tmp_path / "gateway.log",
    )
    try:
        await asyncio.gather(api.start(), gateway.launch())
        await gateway.until("/livez")
        async with asyncio.timeout(30):
            while b"it may have TLS" not in gateway.log.read_bytes():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        assert await asyncio.gather(api.stop(), gateway.stop()) == [0, 0]
    records = {
        role.name: [json.loads(line) for line in role.log.read_text().splitlines()]
        for role in (api, gateway)
    }
    assert all(len(each) >= 3 for each in records.values())
    reasons = [each["reason"] for each in records["gateway"] if each["event"] == "api_unavailable"]
    assert len(reasons) == len(set(reasons)), "once a change"
    assert "it may have TLS, which needs IMG2IMG_API_CA_FILE here" in reasons[-1]
