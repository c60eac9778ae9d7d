"""Records of libraries hold no key and no request, and callers cannot fill the log with them."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks.attack.http2 import Connection
from img2img_server import library_logs
from img2img_server.telemetry import log_handler
from img2img_server.testing.bus import memory_bus
from tests.stack import running_api

KEY = "i2i_Zm9vYmFy-quite_secret"
OWN_KEY = "a key that the operator made up"
LIBRARIES = ("grpc._cython.cygrpc", "uvicorn.error", "aiohttp.server", "nats.aio.client", "asyncio")


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Writes the records of all loggers to this text, as a role does in JSON."""
    stream = io.StringIO()
    handler = log_handler(stream, as_json=True)
    logging.root.addHandler(handler)
    yield stream
    logging.root.removeHandler(handler)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


@pytest.mark.parametrize("method", ["GetJob", "None"])
async def test_grpc_logs_no_header_that_is_not_utf8(method: str, written: io.StringIO) -> None:
    async with running_api(memory_bus()) as api:
        connection = await Connection.open(int(api.address.rpartition(":")[2]))
        wrong = {
            "authorization": f"Bearer {KEY}".encode() + b"\xff",
            "x-api-key": OWN_KEY.encode() + b"\xfe",
            "key": b"'" + OWN_KEY.encode() + b"\"\xff'",
            "x-other": b"\xff" * 12_000,
        }
        path = f"/img2img.v1.Img2ImgService/{method}"
        stream = await connection.call(path, metadata=wrong)
        await connection.until_ended(stream)
        await connection.close()

    text = written.getvalue()
    assert "Invalid encoding" in text
    assert KEY not in text
    assert OWN_KEY not in text
    assert KEY[4:] not in text
    assert max(map(len, text.splitlines())) < 2 * library_logs.MOST_CHARACTERS


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("bad header %r", (f"Bearer {KEY}\xff".encode(),)),
        ("bad header %s", (f"Authorization: Bearer {OWN_KEY.replace(' ', '_')}",)),
        ("options %s", ({"x-api-key": OWN_KEY.replace(" ", "_")},)),
        ("URL /v1/jobs?key=%s&a=b", (OWN_KEY.replace(" ", "_"),)),
        (f"key {KEY}", ()),
    ],
)
def test_records_of_libraries_hold_no_key(
    library: str, text: str, arguments: tuple[object, ...], written: io.StringIO
) -> None:
    logging.getLogger(library).error(text, *arguments)
    (line,) = lines(written)
    for secret in (KEY, OWN_KEY, OWN_KEY.replace(" ", "_")):
        assert secret not in json.dumps(line)


def test_tracebacks_of_libraries_hold_no_key(written: io.StringIO) -> None:
    def fail() -> None:
        raise ValueError(f"Invalid HTTP header: {f'x-api-key: {OWN_KEY}'.encode()!r}")

    try:
        fail()
    except ValueError:
        logging.getLogger("aiohttp.server").exception("Error handling request")
    (line,) = lines(written)
    assert "ValueError" in line["exception"]
    assert OWN_KEY not in line["exception"]


def test_long_records_of_libraries_are_cut(written: io.StringIO) -> None:
    logging.getLogger("grpc").error("x" * 100_000)
    (line,) = lines(written)
    assert line["event"].endswith("[96000 more characters]")


def test_repeated_records_of_one_place_are_dropped_and_counted(
    written: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)

    def write() -> None:
        logging.getLogger("grpc").error("Invalid encoding")

    for _ in range(1000):
        write()
    logging.getLogger("grpc").error("another place")
    assert len(lines(written)) == 11

    now += 11.0
    write()
    assert lines(written)[-1]["event"] == "Invalid encoding [990 more records were dropped]"


def test_records_of_the_service_are_written_unchanged(written: io.StringIO) -> None:
    for number in range(100):
        logging.getLogger("img2img_server.api").error("key: %s", number)
    assert len(lines(written)) == 100


def test_transformers_does_not_recommend_torchvision_to_operators() -> None:
    program = """
from img2img_server.settings import Settings
from img2img_server.telemetry import configure_logging
configure_logging(Settings(log_format="json"), "worker")
import transformers
transformers.CLIPImageProcessor
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
