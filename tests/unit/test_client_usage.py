"""A client in another event loop, in a forked process, or with two readers of one stream; and a
table of faults, none of which raises an error that is not the client's.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterable, Callable, Iterable
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

import img2img_client as api
import img2img_client.client as client_module
from img2img_client import AsyncClient, Client, ClientUsageError, Retry
from tests.client_runs import BOTH, RETRY, Run
from tests.fake_service import FakeService, serving
from tests.readme import ROOT

ASYNC_CALLS: dict[str, Callable[[AsyncClient], Any]] = {
    "call": lambda c: c.caller(),
    "create": lambda c: c.create("p", b"photo"),
    "generate": lambda c: c.generate("p", b"photo"),
    "watch": lambda c: c.watch(1).result(),
    "admin": lambda c: c.admin.clear_queue(),
    "list": lambda c: anext(c.list()),
}


@pytest.mark.parametrize("call", ASYNC_CALLS)
@pytest.mark.parametrize("is_closed", [True, False], ids=["after the first", "next to the first"])
def test_a_call_in_another_event_loop_raises_client_usage(call: str, is_closed: bool) -> None:
    service = FakeService()

    async def use(client: AsyncClient) -> Any:
        return await ASYNC_CALLS[call](client)

    with serving(service) as port, asyncio.Runner() as first:
        client = AsyncClient(f"127.0.0.1:{port}", api_key="k", retry=RETRY)
        first.run(client.caller())
        sent = len(service.requests)
        if is_closed:
            first.run(client.close())
            client = AsyncClient(f"127.0.0.1:{port}", api_key="k", retry=RETRY)
            asyncio.run(client.caller())
            sent += 1
        with pytest.raises(ClientUsageError, match="another event loop") as caught:
            asyncio.run(use(client))
        assert caught.value.reason == "OTHER_EVENT_LOOP"
        assert len(service.requests) == sent
        if not is_closed:
            first.run(client.caller())
            first.run(client.close())


async def test_a_stream_in_another_event_loop_raises_client_usage() -> None:
    service = FakeService(pause_after=2)
    with serving(service) as port:
        async with AsyncClient(f"127.0.0.1:{port}", api_key="k", retry=RETRY) as client:
            stream = client.watch(1)
            await anext(stream)

            async def use(call: Callable[[], Any]) -> None:
                await call()

            for call in (stream.__anext__, stream.result, stream.aclose, client.close):
                with pytest.raises(ClientUsageError, match="another event loop"):
                    await asyncio.to_thread(asyncio.run, use(call))
            assert (await anext(stream)).sequence == 1


async def test_a_given_channel_in_another_event_loop_raises_client_usage() -> None:
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        client = AsyncClient(channel=channel, api_key="k", retry=RETRY)
        with pytest.raises(ClientUsageError, match="another event loop"):
            await asyncio.to_thread(asyncio.run, client.caller())


def test_a_client_whose_event_loop_is_closed_can_be_closed() -> None:
    with serving(FakeService()) as port:
        client = AsyncClient(f"127.0.0.1:{port}", api_key="k")
        asyncio.run(client.caller())
        asyncio.run(client.close())
        with pytest.raises(api.ClientClosedError):
            asyncio.run(client.caller())


def test_a_call_without_an_event_loop_raises_client_usage() -> None:
    client = AsyncClient("127.0.0.1:1", api_key="k")
    for make in ASYNC_CALLS.values():
        call = make(client)
        with pytest.raises(ClientUsageError, match="running asyncio event loop") as caught:
            call.__await__().send(None) if inspect.iscoroutine(call) else call.send(None)
        assert caught.value.reason == "NO_EVENT_LOOP"


def test_the_second_reader_of_a_stream_raises_client_usage() -> None:
    service = FakeService(pause_after=2)
    with serving(service) as port:
        client = Client(f"127.0.0.1:{port}", api_key="k", retry=RETRY)
        stream = client.watch(1)
        errors: list[Exception] = []

        def read() -> None:
            try:
                stream.result()
            except Exception as error:
                errors.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        service.paused.wait()
        for use in (stream.__next__, stream.result, stream.close):
            with pytest.raises(ClientUsageError, match="another thread or task") as caught:
                use()
            assert caught.value.reason == "STREAM_IN_USE"
        client.close()
        reader.join()
        assert [type(error) for error in errors] == [api.ClientClosedError]


async def test_the_second_task_of_a_stream_raises_client_usage() -> None:
    service = FakeService(pause_after=2)
    with serving(service) as port:
        async with AsyncClient(f"127.0.0.1:{port}", api_key="k", retry=RETRY) as client:
            stream = client.watch(1)
            reading = asyncio.ensure_future(stream.result())
            await asyncio.to_thread(service.paused.wait)
            for use in (stream.__anext__, stream.result, stream.aclose):
                with pytest.raises(ClientUsageError, match="another thread or task"):
                    await use()
        with pytest.raises(api.ClientClosedError):
            await reading


def test_closing_a_client_returns_if_grpc_never_closes_its_channel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cause is Ctrl-C while gRPC starts a call."""
    client, end = Client("127.0.0.1:1", api_key="k"), threading.Event()
    monkeypatch.setattr(client_module, "CLOSE_SECONDS", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(client, "_channel", SimpleNamespace(close=end.wait))
        client.close()
        client.close()
    end.set()
    client._channel.close()


# A forked process uses what its parent opened; each line of stdout is an outcome.
FORKED = """
import os, sys
from img2img_client import Client, Img2ImgError, Retry
client = Client(f"127.0.0.1:{sys.argv[1]}", api_key="k", retry=Retry(connect_seconds=5))
stream = client.stream("p", b"photo")
print("parent", type(next(stream)).__name__, flush=True)
child = os.fork()
uses = {
    "next": lambda: next(stream),
    "result": stream.result,
    "close the stream": stream.close,
    "call": lambda: client.caller().tenant,
    "new client": lambda: Client(f"127.0.0.1:{sys.argv[1]}", api_key="k").caller().tenant,
    "close": client.close,
    "call of the closed client": lambda: client.caller(),
}
if child == 0:
    for name, use in uses.items():
        try:
            print(name, use(), flush=True)
        except Img2ImgError as error:
            print(name, error.reason, flush=True)
    del stream, uses
    sys.exit()  # runs the functions of atexit, which must not cancel the job of the parent
os.waitpid(child, 0)
print("parent", type(next(stream)).__name__, client.caller().tenant, flush=True)
sys.stdin.readline()
stream.close()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize(
    ("support", "call"), [("1", "shop"), ("0", "FORK_NOT_SUPPORTED")], ids=["with", "without"]
)
def test_a_forked_process_neither_reads_nor_cancels_the_stream_of_its_parent(
    support: str, call: str
) -> None:
    service = FakeService(pause_after=2)
    environment = {**os.environ, "GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": support}
    with serving(service) as port:
        with subprocess.Popen(
            [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED, str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            cwd=ROOT,
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            found = [process.stdout.readline().strip() for _ in range(9)]
            was_cancelled = service.cancelled.is_set()
            process.stdin.close()
            assert process.wait(20) == 0
        assert found == [
            "parent Snapshot",
            "next OTHER_PROCESS",
            "result OTHER_PROCESS",
            "close the stream None",
            f"call {call}",
            f"new client {call}",
            "close None",
            "call of the closed client CLIENT_CLOSED",
            "parent Queued shop",
        ]
        assert not was_cancelled
        assert service.cancelled.is_set()  # by the parent


class Strange(grpc.UnaryUnaryClientInterceptor):
    """An interceptor that raises an error of gRPC without a status."""

    def intercept_unary_unary(
        self, continuation: Any, client_call_details: Any, request: Any
    ) -> Any:
        raise grpc.RpcError("the interceptor is broken")


SHORT = Retry(connect_seconds=0.1, first_delay_seconds=0.001)
# Arguments of a client that cannot work, a call, and words of the error.
FAULTS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "key with a line break": ({"api_key": "a\nb"}, lambda c: c.caller(), "U+000A"),
    "key with an umlaut": ({"api_key": "schlüssel"}, lambda c: c.caller(), "U+00FC"),
    "key of bytes": ({"api_key": b"key"}, lambda c: c.caller(), "api_key must be a str"),
    "server with a scheme": ({"server": "http://h:1"}, lambda c: c.caller(), "without http://"),
    "server of bytes": ({"server": b"h:1"}, lambda c: c.caller(), "server must be a str"),
    "host that is no name": ({"server": "exa mple:1"}, lambda c: c.caller(), "host:port"),
    "host that is unknown": ({"server": "h\u00fc.invalid:1"}, lambda c: c.caller(), "resolved"),
    "host with a long label": ({"server": "a" * 70 + ":1"}, lambda c: c.caller(), "resolved"),
    "unix socket that is missing": ({"server": "unix:/no/x"}, lambda c: c.caller(), "/no/x"),
    "scheme that is not installed": ({"server": "vsock:9:9"}, lambda c: c.caller(), "vsock"),
    "certificates of text": ({"root_certificates": "x"}, lambda c: c.caller(), "bytes of a PEM"),
    "certificates of garbage": ({"root_certificates": b"x"}, lambda c: c.caller(), "PEM"),
    "retry of the wrong type": ({"retry": 5}, lambda c: c.caller(), "retry must be a Retry"),
    "interceptor of the wrong type": ({"interceptors": [5]}, lambda c: c.caller(), "interceptors"),
    "interceptors of the wrong type": ({"interceptors": 5}, lambda c: c.caller(), "interceptors"),
    "storage settings of the wrong type": (
        {},
        lambda c: c.admin.update_storage(5),
        "settings must be StorageSettings",
    ),
    "usage of the wrong type": ({}, lambda c: c.admin.usage("week"), "days cannot be 'week'"),
    "estimate of the wrong type": ({}, lambda c: c.estimate(5), "prompt cannot be 5"),
    "nothing listens": ({"server": "127.0.0.1:1"}, lambda c: c.watch(1).result(), "refused"),
}


@pytest.mark.parametrize("kind", [Client, AsyncClient], ids=["blocking", "async"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_raises_an_error_of_the_client_that_names_it(
    fault: str, kind: type[Any]
) -> None:
    arguments, call, words = FAULTS[fault]

    async def use() -> None:
        found = call(kind(**{"server": "127.0.0.1:1", "api_key": "k", "retry": SHORT, **arguments}))
        found = await found if inspect.isawaitable(found) else found
        assert not isinstance(found, (AsyncIterable, Iterable))

    with pytest.raises(api.Img2ImgError) as caught:
        asyncio.run(use())
    assert words in str(caught.value)


def test_an_error_of_an_interceptor_without_a_status_is_an_error_of_the_client() -> None:
    client = Client("127.0.0.1:1", api_key="k", interceptors=[Strange()])
    with client, pytest.raises(api.RpcError) as caught:
        client.caller()
    assert "the interceptor is broken" in str(caught.value)


@pytest.mark.parametrize("run", BOTH.values(), ids=BOTH)
def test_a_response_beyond_the_limit_of_a_channel_is_no_full_queue(run: Run) -> None:
    options = [("grpc.max_receive_message_length", 10)]

    async def use(port: int) -> None:
        if run is BOTH["blocking"]:
            with grpc.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                Client(channel=channel, api_key="k").capabilities()
        else:
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                await AsyncClient(channel=channel, api_key="k").capabilities()

    with serving(FakeService()) as port, pytest.raises(api.RpcError) as caught:
        asyncio.run(use(port))
    assert type(caught.value) is api.RpcError
    assert "CHANNEL_OPTIONS" in str(caught.value)
