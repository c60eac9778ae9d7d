"""Errors of the client: one tree of classes that are also builtin errors."""

from __future__ import annotations

import asyncio
import copy
import io
import os
import pickle
import subprocess
import sys
import threading
from collections import deque
from collections.abc import AsyncIterable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import pytest

import img2img_client as api
from img2img_client import AsyncClient, Client
from img2img_client.convert import read
from img2img_server.domain.violations import Reason
from tests.client_runs import BOTH, RETRY, Run
from tests.fake_job import State, job
from tests.fake_service import FakeService, Refusal, serving
from tests.golden_file import assert_golden

NO_PATH: Any = 7
# A call of the client, the builtin error that it raises, and the field of its violation.
MISTAKES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "missing file": (lambda c: c.generate("p", "none.jpg"), FileNotFoundError, "init_image"),
    "folder": (lambda c: c.create("p", Path("/")), OSError, "init_image"),
    "home of an unknown user": (
        lambda c: c.create("p", "~no-such-user/a.jpg"),
        FileNotFoundError,
        "init_image",
    ),
    "path with a NUL": (lambda c: c.create("p", "a\0b"), ValueError, "init_image"),
    "URL with another scheme": (
        lambda c: c.create("p", "s3://bucket/a.png"),
        ValueError,
        "init_image",
    ),
    "empty init image": (lambda c: c.create("p", ""), ValueError, "init_image"),
    "empty file": (lambda c: c.create("p", os.devnull), ValueError, "init_image"),
    "URL that is not Unicode": (
        lambda c: c.create("p", "https://example.com/\ud800.jpg"),
        ValueError,
        "init_image",
    ),
    "init image too large": (
        lambda c: c.create("p", bytes(34 * 2**20)),
        ValueError,
        "init_image",
    ),
    "init image of the wrong type": (lambda c: c.generate("p", NO_PATH), TypeError, "init_image"),
    "text file": (lambda c: c.generate("p", io.StringIO("photo")), TypeError, "init_image"),
    "unknown option": (
        lambda c: c.generate("p", b"photo", strenght=0.5),
        TypeError,
        "strenght",
    ),
    "option of another call": (
        lambda c: c.create("p", b"photo", detach=True),
        TypeError,
        "detach",
    ),
    "value of the wrong type": (
        lambda c: c.create("p", b"photo", width="wide"),
        ValueError,
        "width",
    ),
    "seed beyond 64 bits": (lambda c: c.create("p", b"photo", seed=2**63), ValueError, "seed"),
    "unknown word": (lambda c: c.create("p", b"photo", lane="fast"), ValueError, "lane"),
    "annotations of the wrong type": (
        lambda c: c.create("p", b"photo", annotations=["a"]),
        ValueError,
        "annotations",
    ),
    "prompt of the wrong type": (lambda c: c.stream(None, b"photo"), ValueError, "prompt"),
    "request_id of the wrong type": (
        lambda c: c.create("p", b"photo", request_id=7),
        ValueError,
        "request_id",
    ),
    "name of no job": (lambda c: c.get("cat"), ValueError, "name"),
    "sequence of the wrong type": (
        lambda c: c.watch(1, after_sequence="x"),
        ValueError,
        "after_sequence",
    ),
    "unknown state": (lambda c: c.list("done"), ValueError, "states"),
    "page size of the wrong type": (lambda c: c.list(page_size="many"), ValueError, "page_size"),
    "negative timeout": (
        lambda c: c.generate("p", b"photo", timeout_seconds=-1),
        ValueError,
        "timeout_seconds",
    ),
    "timeout that is not a number": (
        lambda c: c.watch(1, timeout_seconds=float("nan")),
        ValueError,
        "timeout_seconds",
    ),
    "deploy type of the wrong type": (
        lambda c: c.admin.reset_storage(7),
        ValueError,
        "deploy_type",
    ),
    "server with a scheme": (lambda c: type(c)("http://127.0.0.1:1"), ValueError, "server"),
    "server without a port": (lambda c: type(c)("host:"), ValueError, "server"),
    "server of the wrong type": (lambda c: type(c)(7), TypeError, "server"),
    "key that no header can carry": (
        lambda c: type(c)("127.0.0.1:1", api_key="schlüssel"),
        ValueError,
        "api_key",
    ),
    "key of the wrong type": (lambda c: type(c)("127.0.0.1:1", api_key=b"k"), TypeError, "api_key"),
    "certificates that are not PEM": (
        lambda c: type(c)("127.0.0.1:1", root_certificates=b"junk"),
        ValueError,
        "root_certificates",
    ),
    "retry of the wrong type": (lambda c: type(c)("127.0.0.1:1", retry=5), TypeError, "retry"),
    "call timeout of zero": (
        lambda c: type(c)("127.0.0.1:1", call_seconds=0),
        ValueError,
        "call_seconds",
    ),
}


@pytest.fixture(params=BOTH.values(), ids=BOTH.keys())
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


@pytest.mark.parametrize("mistake", MISTAKES, ids=str)
def test_a_mistake_raises_an_error_of_the_client_that_is_also_a_builtin_error(
    run: Run, mistake: str
) -> None:
    use, builtin, field = MISTAKES[mistake]
    service = FakeService()
    with pytest.raises(api.InvalidRequestError) as caught:
        run(service, use)
    error = caught.value
    assert isinstance(error, builtin)
    assert [violation.field for violation in error.violations] == [field]
    assert error.violations[0].description == str(error)
    assert error.violations[0].reason in set(Reason)
    assert (error.reason, error.code) == ("INVALID_REQUEST", "INVALID_ARGUMENT")
    assert service.requests == []


def test_the_message_of_every_mistake_is_in_the_golden_file() -> None:
    lines = []
    for mistake, (use, _, _) in MISTAKES.items():
        with (
            Client("127.0.0.1:1", api_key="k") as client,
            pytest.raises(api.InvalidArgumentError) as caught,
        ):
            list(use(client))
        [violation] = caught.value.violations
        lines.append(f"{mistake}: {violation.reason}: {caught.value}\n")
    failed, cancelled = read(api.Job, job(State.STATE_FAILED)), job(State.STATE_CANCELLED)
    others = [
        api.JobFailedError(failed),
        api.JobCancelledError(read(api.Job, cancelled)),
        api.ClientClosedError(),
        api.StreamClosedError(),
    ]
    lines += [f"{type(error).__name__}: {error}\n" for error in others]
    assert_golden("client/messages.txt", "".join(lines))


def test_a_missing_file_has_its_name_errno_and_cause() -> None:
    with pytest.raises(api.InitImageNotFoundError) as caught, Client() as client:
        client.create("p", "none.jpg")
    assert (caught.value.filename, caught.value.errno) == ("none.jpg", 2)
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_every_error_can_be_pickled_and_copied() -> None:
    failed = read(api.Job, job(State.STATE_FAILED))
    missing = FileNotFoundError(2, "No such file or directory")
    examples = [
        api.InvalidArgumentError(api.Violation("a", "a is wrong"), api.Violation("b", "b too")),
        api.InvalidArgumentTypeError(api.Violation("a", "a is wrong")),
        api.InitImageNotFoundError(Path("none.jpg"), missing),
        api.UnavailableError("away", code="UNAVAILABLE", reason="TRANSPORT", retry_seconds=1.0),
        api.JobFailedError(failed),
        api.JobCancelledError(failed),
        api.ClientClosedError(),
        api.StreamClosedError(),
    ]
    for error in examples:
        for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(again) is type(error)
            assert (str(again), again.reason) == (str(error), error.reason)
            for name in ("violations", "code", "retry_seconds", "job", "filename"):
                assert getattr(again, name, None) == getattr(error, name, None)


def test_bytes_bytearray_and_memoryview_are_init_images(run: Run) -> None:
    service = FakeService()
    for photo in (b"photo", bytearray(b"photo"), memoryview(b"photo")):
        run(service, lambda client, photo=photo: client.create("p", photo))
    sent = [request.spec.init_image.data for request in service.requests]  # type: ignore[attr-defined]
    assert sent == [b"photo"] * 3


CALLS: dict[str, Callable[[Any], Any]] = {
    "get": lambda c: c.get(1),
    "list": lambda c: c.list(),
    "generate": lambda c: c.generate("p", b"photo"),
    "watch": lambda c: c.watch(1).result(),
    "capabilities": lambda c: c.capabilities(),
    "admin": lambda c: c.admin.clear_queue(),
}


@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_a_closed_client_raises_client_closed(call: str) -> None:
    def blocking() -> None:
        client = Client("127.0.0.1:1")
        client.close()
        found = CALLS[call](client)
        list(found) if isinstance(found, Iterable) else None

    async def asynchronous() -> None:
        client = AsyncClient("127.0.0.1:1")
        await client.close()
        found = CALLS[call](client)
        if isinstance(found, AsyncIterable):
            [_ async for _ in found]
        await found

    for use in (blocking, lambda: asyncio.run(asynchronous())):
        with pytest.raises(api.ClientClosedError) as caught:
            use()
        assert isinstance(caught.value, ValueError)
        assert caught.value.reason == "CLIENT_CLOSED"


def test_closing_a_client_ends_a_stream_that_waits() -> None:
    service = FakeService(pause_after=3)
    with serving(service) as port:
        client = Client(f"127.0.0.1:{port}", api_key="k", retry=RETRY)

        def close() -> None:
            service.paused.wait()
            client.close()

        closing = threading.Thread(target=close)
        closing.start()
        with pytest.raises(api.ClientClosedError):
            client.watch(1).result()
        closing.join()


async def test_closing_an_async_client_ends_a_stream_that_waits() -> None:
    service = FakeService(pause_after=3)
    with serving(service) as port:
        client = AsyncClient(f"127.0.0.1:{port}", api_key="k", retry=RETRY)

        async def read() -> None:
            await client.watch(1).result()

        reading = asyncio.create_task(read())
        await asyncio.to_thread(service.paused.wait)
        await client.close()
        with pytest.raises(api.ClientClosedError):
            await reading


@pytest.mark.parametrize("end", ["\n", "\r\n", " ", "\t\n"])
def test_white_space_around_a_key_is_removed(end: str) -> None:
    service = FakeService()
    with serving(service) as port, Client(f"127.0.0.1:{port}", api_key=f"k{end}") as client:
        client.capabilities()
    assert service.keys == ["Bearer k"]


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("schlüssel", "character 5 is U+00FC"),
        ("\ufeffkey", "character 1 is U+FEFF"),
        ("one\ntwo", "character 4 is U+000A"),
        ("key (shown only once): i2i_x", "character 4 is U+0020"),
        ("k\0", "character 2 is U+0000"),
    ],
)
def test_a_key_that_no_header_can_carry_is_rejected_without_printing_it(
    key: str, place: str
) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(api.InvalidArgumentError, match="api_key cannot be used") as caught:
            kind("127.0.0.1:1", api_key=key)
        assert place in str(caught.value)
        assert key not in str(caught.value)


def test_a_missing_key_and_a_wrong_key_have_different_reasons() -> None:
    refusal = Refusal(grpc.StatusCode.UNAUTHENTICATED, "Invalid API key", "INVALID_API_KEY")
    service = FakeService(refusals=deque([refusal] * 3))
    with serving(service) as port:
        for key, text, reason in (
            (None, "no API key was given: pass api_key or set IMG2IMG_API_KEY", "NO_API_KEY"),
            ("\n", "no API key was given: pass api_key or set IMG2IMG_API_KEY", "NO_API_KEY"),
            ("k", "Invalid API key", "INVALID_API_KEY"),
        ):
            with (
                Client(f"127.0.0.1:{port}", api_key=key) as client,
                pytest.raises(api.UnauthenticatedError) as caught,
            ):
                client.capabilities()
            assert (str(caught.value), caught.value.reason) == (text, reason)


def test_omitted_server_and_key_come_from_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IMG2IMG_SERVER", "img2img.example.com:443\n")
    monkeypatch.setenv("IMG2IMG_API_KEY", "from-env\n")
    for kind in (Client, AsyncClient):
        endpoint = kind().endpoint
        assert (endpoint.target, endpoint.api_key) == ("img2img.example.com:443", "from-env")
        endpoint = kind("10.0.0.7", api_key="given").endpoint
        assert (endpoint.target, endpoint.api_key) == ("10.0.0.7:50051", "given")
        assert kind(api_key="").endpoint.metadata == ()
    monkeypatch.setenv("IMG2IMG_SERVER", "")
    monkeypatch.delenv("IMG2IMG_API_KEY")
    assert Client().endpoint.target == "127.0.0.1:50051"
    assert Client().endpoint.api_key is None


@pytest.mark.parametrize(
    "server",
    [
        *("", ":50051", "host:", "host:port", "host:0", "host:65536", "two words:1", "[::1"),
        *("a:1,b:2", "10.0.0.7:1,10.0.0.8:2", "ipv4:", "ipv4:host:1", "ipv4:10.0.0.7:1,"),
        *("ipv4:[::1]:1", "ipv6:10.0.0.7:1", "dns:///", "dns:///a:1,b:2", "dns:///a:0"),
    ],
)
def test_an_invalid_server_is_rejected(server: str) -> None:
    with pytest.raises(api.InvalidArgumentError) as caught:
        Client(server)
    assert caught.value.violations[0].field == "server"


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "5", True])
def test_invalid_call_seconds_are_rejected(seconds: Any) -> None:
    with pytest.raises(api.InvalidArgumentError) as caught:
        Client("127.0.0.1:1", call_seconds=seconds)
    assert caught.value.violations[0].field == "call_seconds"


def test_importing_the_client_changes_no_environment() -> None:
    script = "import os; before = dict(os.environ); import img2img_client; "
    script += "print(before == dict(os.environ))"
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "GRPC_VERBOSITY"},
    )
    assert done.stdout == "True\n"
