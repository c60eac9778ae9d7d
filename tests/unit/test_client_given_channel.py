"""A client on a channel of the caller: the same calls, errors, retries and cancellations."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import grpc
import pytest

import img2img_client as api
from img2img.v1 import service_pb2
from img2img_client import CHANNEL_OPTIONS, AsyncClient, Client
from tests.client_runs import RETRY
from tests.fake_job import NAME
from tests.fake_service import STOPPING, Break, FakeService, Refusal, serving

Use = Callable[[Any], Any]


async def read(stream: Any) -> list[api.Event]:
    return [event async for event in stream]


def on_blocking_channel(service: FakeService, use: Use, **arguments: Any) -> Any:
    with serving(service) as port, grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        with Client(channel=channel, api_key="k", retry=RETRY, **arguments) as client:
            found = use(client)
            found = list(found) if isinstance(found, api.JobStream) else found
        # The client is closed, but the channel is not.
        call = channel.unary_unary("/img2img.v1.Img2ImgService/GetCapabilities")
        assert call(b"", timeout=30)
        return found


def on_async_channel(service: FakeService, use: Use, **arguments: Any) -> Any:
    async def main(port: int) -> Any:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            async with AsyncClient(
                channel=channel, api_key="k", retry=RETRY, **arguments
            ) as client:
                found = use(client)
                is_stream = isinstance(found, api.AsyncJobStream)
                found = await (read(found) if is_stream else found)
            call = channel.unary_unary("/img2img.v1.Img2ImgService/GetCapabilities")
            assert await call(b"", timeout=30)
            return found

    with serving(service) as port:
        return asyncio.run(main(port))


@pytest.fixture(params=[on_blocking_channel, on_async_channel], ids=["blocking", "async"])
def run(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_calls_use_the_channel_and_leave_it_open(run: Any) -> None:
    service = FakeService()
    assert run(service, lambda client: client.generate("p", b"photo")).job.name == NAME
    assert service.keys[0] == "Bearer k"


def test_a_broken_stream_is_resumed(run: Any) -> None:
    service = FakeService(breaks=deque([Break(3)]))
    events = run(service, lambda client: client.stream("p", b"photo"))
    assert [event.sequence for event in events] == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    assert service.requests[1] == service_pb2.WatchJobRequest(name=NAME, after_sequence=2)


def test_a_call_is_retried_and_a_rejection_raises_the_typed_error(run: Any) -> None:
    missing = Refusal(grpc.StatusCode.NOT_FOUND, "no", "JOB_NOT_FOUND")
    service = FakeService(refusals=deque([STOPPING, missing]))
    with pytest.raises(api.NotFoundError) as caught:
        run(service, lambda client: client.get(1))
    assert caught.value.reason == "JOB_NOT_FOUND"
    assert len(service.requests) == 2  # The status STOPPING was retried.


def test_leaving_a_stream_cancels_its_job(run: Any) -> None:
    service = FakeService(pause_after=3)
    with pytest.raises(api.DeadlineExceededError):
        run(service, lambda client: client.generate("p", b"photo", timeout_seconds=0.3))
    assert service.cancelled.is_set()


def test_closing_the_client_leaves_its_streams(run: Any) -> None:
    service = FakeService(pause_after=3)

    def close(client: Any) -> Any:
        if isinstance(client, Client):
            events = iter(client.stream("p", b"photo"))
            next(events)
            return client.close()

        async def closing() -> None:
            events = aiter(client.stream("p", b"photo"))
            await anext(events)
            await client.close()

        return closing()

    run(service, close)
    assert service.cancelled.is_set()


def test_a_channel_that_its_owner_closed_is_a_closed_client() -> None:
    channel = grpc.insecure_channel("127.0.0.1:1")
    with Client(channel=channel) as client:
        channel.close()
        admin = client.admin.clear_queue
        for use in (lambda: client.get(1), lambda: client.watch(1).result(), admin):
            with pytest.raises(api.ClientClosedError):
                use()


@pytest.mark.parametrize("is_intercepted", [False, True])
async def test_an_async_channel_that_its_owner_closed_is_a_closed_client(
    is_intercepted: bool,
) -> None:
    interceptors = [AsyncCount([]), AsyncStreamCount([])] if is_intercepted else []
    channel = grpc.aio.insecure_channel("127.0.0.1:1", interceptors=interceptors)
    async with AsyncClient(channel=channel) as client:
        await channel.close()
        admin = client.admin.clear_queue
        for use in (lambda: client.get(1), lambda: client.watch(1).result(), admin):
            with pytest.raises(api.ClientClosedError):
                await use()


def test_a_service_that_cannot_be_reached_is_reported_without_an_address() -> None:
    retry = api.Retry(connect_seconds=0.05, first_delay_seconds=0.01)
    with serving(FakeService()) as port:
        pass  # From here on, nothing listens on the port.
    with (
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
        Client(channel=channel, retry=retry) as client,
        pytest.raises(api.UnavailableError) as caught,
    ):
        client.get(1)
    assert (caught.value.reason, caught.value.metadata) == ("TRANSPORT", {"cause": "UNKNOWN"})


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({"server": "127.0.0.1:1"}, ["server"]),
        ({"tls": True, "root_certificates": b"pem"}, ["tls", "root_certificates"]),
        ({"interceptors": [object()]}, ["interceptors"]),
    ],
)
def test_arguments_of_the_channel_cannot_be_combined_with_a_channel(
    arguments: dict[str, Any], fields: list[str]
) -> None:
    async def asynchronous() -> None:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            AsyncClient(channel=channel, **arguments)

    def blocking() -> None:
        with grpc.insecure_channel("127.0.0.1:1") as channel:
            Client(channel=channel, **arguments)

    for use in (blocking, lambda: asyncio.run(asynchronous())):
        with pytest.raises(api.InvalidArgumentError) as caught:
            use()
        assert [violation.field for violation in caught.value.violations] == fields


def test_each_client_takes_its_own_kind_of_channel() -> None:
    async def main() -> None:
        async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
            with pytest.raises(api.InvalidArgumentTypeError, match=r"grpc\.Channel"):
                Client(channel=channel)  # type: ignore[arg-type]

    asyncio.run(main())
    with (
        grpc.insecure_channel("127.0.0.1:1") as channel,
        pytest.raises(api.InvalidArgumentTypeError, match=r"grpc\.aio\.Channel"),
    ):
        AsyncClient(channel=channel)  # type: ignore[arg-type]


def test_the_channel_options_are_public() -> None:
    assert dict(CHANNEL_OPTIONS)["grpc.max_receive_message_length"] == 34 * 2**20


class Count(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Counts the calls of a blocking client."""

    def __init__(self) -> None:
        self.methods: list[str] = []

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method.rpartition("/")[2])
        return continuation(details, request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method.rpartition("/")[2])
        return continuation(details, request)


class AsyncCount(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, methods: list[str]) -> None:
        self.methods = methods

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method.decode().rpartition("/")[2])
        return await continuation(details, request)


class AsyncStreamCount(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, methods: list[str]) -> None:
        self.methods = methods

    async def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        self.methods.append(details.method.decode().rpartition("/")[2])
        return await continuation(details, request)


INTERCEPTED = ["Generate", "WatchJob", "GetJob", "GetJob", "Generate", "CancelJob"]


def script() -> FakeService:
    """Breaks the first stream, rejects the first GetJob, then pauses the third stream."""
    return FakeService(breaks=deque([Break(3)]), refusals=deque([STOPPING]))


def test_interceptors_of_a_blocking_client_see_every_call_retries_and_cancels_included() -> None:
    service, count = script(), Count()
    with (
        serving(service) as port,
        Client(f"127.0.0.1:{port}", api_key="k", retry=RETRY, interceptors=[count]) as client,
    ):
        assert client.generate("p", b"photo").job.name == NAME
        assert client.get(1).name == NAME
        service.pause_after = 3
        with client.stream("p", b"photo") as stream:
            next(iter(stream))
    assert count.methods == INTERCEPTED


async def test_interceptors_of_an_async_client_see_every_call_retries_and_cancels_included() -> (
    None
):
    service, methods = script(), []  # type: ignore[var-annotated]
    counts = [AsyncCount(methods), AsyncStreamCount(methods)]
    with serving(service) as port:
        async with AsyncClient(
            f"127.0.0.1:{port}", api_key="k", retry=RETRY, interceptors=counts
        ) as client:
            assert (await client.generate("p", b"photo")).job.name == NAME
            assert (await client.get(1)).name == NAME
            service.pause_after = 3
            async with client.stream("p", b"photo") as stream:
                await anext(aiter(stream))
    assert methods == INTERCEPTED


def test_an_error_passes_an_interceptor_with_its_details() -> None:
    missing = Refusal(grpc.StatusCode.NOT_FOUND, "no", "JOB_NOT_FOUND")

    async def asynchronous(port: int) -> None:
        counts = [AsyncCount([]), AsyncStreamCount([])]
        async with AsyncClient(f"127.0.0.1:{port}", interceptors=counts) as client:
            with pytest.raises(api.NotFoundError):
                await client.get(1)
            with pytest.raises(api.NotFoundError):
                await client.watch(1).result()

    service = FakeService(refusals=deque([missing] * 2), breaks=deque([Break(0, missing)] * 2))
    with serving(service) as port:
        with Client(f"127.0.0.1:{port}", interceptors=[Count()]) as client:
            with pytest.raises(api.NotFoundError):
                client.get(1)
            with pytest.raises(api.NotFoundError):
                client.watch(1).result()
        asyncio.run(asynchronous(port))
