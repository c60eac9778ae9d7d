"""The asyncio client. Every method takes, returns and raises what its namesake in Client does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack
from weakref import WeakSet

import grpc

from img2img.v1 import service_pb2, service_pb2_grpc
from img2img_client import convert, errors, requests
from img2img_client.admin import AsyncAdmin
from img2img_client.calls import CANCEL_SECONDS, AsyncCalls, is_task_cancelled
from img2img_client.channel import Endpoint
from img2img_client.diagnosis import explain_async
from img2img_client.requests import ImageSource, Options
from img2img_client.resources import Caller, Capabilities, Job, State
from img2img_client.result import Result
from img2img_client.resume import Backoff, FirstRequest, Follow, Retry, checked, may_repeat
from img2img_client.stream import AsyncJobStream, deadline

if TYPE_CHECKING:
    from img2img.v1.service_pb2_grpc import Img2ImgServiceAsyncStub

T = TypeVar("T")


class AsyncClient:
    """Makes pictures through the img2img service, on asyncio. Belongs to one event loop.

        async with AsyncClient("127.0.0.1:50051", api_key="dev-key") as client:
            result = await client.generate("a watercolour", Path("photo.jpg"), strength=0.7)
            result.images[0].save("out.png")

    Arguments as in Client.
    """

    def __init__(
        self,
        server: str | None = None,
        *,
        api_key: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        retry: Retry | None = None,
        call_seconds: float = 60.0,
    ) -> None:
        self.endpoint = Endpoint.choose(server, api_key, tls, root_certificates)
        requests.check_seconds("call_seconds", call_seconds)
        self._retry = checked(retry)
        self._call_seconds = call_seconds
        self._is_closed = False
        self._streams: WeakSet[AsyncCalls] = WeakSet()

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        # Made at the first call: a channel binds to the loop that runs when it is made, and a
        # client may be built before there is one.
        target, options = self.endpoint.target, self.endpoint.options
        credentials = self.endpoint.credentials
        if credentials:
            return grpc.aio.secure_channel(target, credentials, options)
        return grpc.aio.insecure_channel(target, options)

    @cached_property
    def _stub(self) -> Img2ImgServiceAsyncStub:
        return service_pb2_grpc.Img2ImgServiceStub(self._channel)

    @cached_property
    def admin(self) -> AsyncAdmin:
        """Managing the service, as Client.admin."""
        return AsyncAdmin(self._channel, self._call)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Does the same as Client.close."""
        self._is_closed = True
        for calls in list(self._streams):
            await calls.leave()
        await self._channel.close()

    async def generate(
        self,
        prompt: str,
        init_image: ImageSource,
        *,
        detach: bool = False,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """As Client.generate."""
        async with self.stream(
            prompt,
            init_image,
            detach=detach,
            request_id=request_id,
            timeout_seconds=timeout_seconds,
            **options,
        ) as stream:
            return await stream.result()

    def stream(
        self,
        prompt: str,
        init_image: ImageSource,
        *,
        detach: bool = False,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        **options: Unpack[Options],
    ) -> AsyncJobStream:
        """As Client.stream; cancelling the task that reads it leaves it."""
        first = requests.generate_request(
            prompt, init_image, options, request_id=request_id, detach=detach
        )
        return self._stream(first, timeout_seconds)

    def watch(
        self, job: Job | str | int, *, after_sequence: int = 0, timeout_seconds: float | None = None
    ) -> AsyncJobStream:
        """As Client.watch."""
        first = requests.watch_request(job, after_sequence)
        return self._stream(first, timeout_seconds)

    async def create(
        self,
        prompt: str,
        init_image: ImageSource,
        *,
        request_id: str | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """As Client.create."""
        request = requests.create_request(prompt, init_image, options, request_id=request_id)
        return convert.job_from((await self._call(self._stub.CreateJob, request)).job)

    async def get(self, job: Job | str | int) -> Job:
        """As Client.get."""
        request = service_pb2.GetJobRequest(name=requests.job_name(job))
        return convert.job_from((await self._call(self._stub.GetJob, request)).job)

    async def list(self, *states: State | str, page_size: int = 100) -> AsyncIterator[Job]:
        """As Client.list."""
        request = requests.list_request(states, page_size)
        while True:
            page = await self._call(self._stub.ListJobs, request)
            for job in page.jobs:
                yield convert.job_from(job)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def cancel(self, job: Job | str | int) -> Job:
        """As Client.cancel."""
        request = service_pb2.CancelJobRequest(name=requests.job_name(job))
        return convert.job_from((await self._call(self._stub.CancelJob, request)).job)

    async def redeliver_webhook(self, job: Job | str | int) -> Job:
        """As Client.redeliver_webhook."""
        request = service_pb2.RedeliverWebhookRequest(name=requests.job_name(job))
        return convert.job_from((await self._call(self._stub.RedeliverWebhook, request)).job)

    async def capabilities(self) -> Capabilities:
        """As Client.capabilities."""
        request = service_pb2.GetCapabilitiesRequest()
        return convert.read(Capabilities, await self._call(self._stub.GetCapabilities, request))

    async def caller(self) -> Caller:
        """As Client.caller."""
        request = service_pb2.GetCallerRequest()
        return convert.read(Caller, await self._call(self._stub.GetCaller, request))

    def _stream(self, first: FirstRequest, timeout_seconds: float | None) -> AsyncJobStream:
        follow = Follow(first, self._retry, deadline(timeout_seconds))
        calls = AsyncCalls(follow, self.endpoint, self._open, self._cancel_abandoned)
        self._streams.add(calls)
        return AsyncJobStream(follow, calls.begin())

    async def _call(self, method: Callable[..., Awaitable[T]], request: object) -> T:
        backoff = Backoff(self._retry)
        while True:
            try:
                return await self._begin(method, request, self._call_seconds)
            except grpc.RpcError as broken:
                error = errors.from_call(broken, self.endpoint)
                try:
                    if not may_repeat(error):
                        raise error
                    pause = backoff.pause(error, time.monotonic())
                except errors.RpcError as last:
                    raise await explain_async(last, self.endpoint) from broken
                await asyncio.sleep(pause)
            except asyncio.CancelledError as cancelled:
                if self._is_closed and not is_task_cancelled():
                    raise errors.ClientClosedError from cancelled
                raise

    def _open(self, request: FirstRequest, timeout_seconds: float | None) -> Any:
        generate = isinstance(request, service_pb2.GenerateRequest)
        method: Any = self._stub.Generate if generate else self._stub.WatchJob
        return self._begin(method, request, timeout_seconds)

    def _begin(self, method: Callable[..., T], request: object, timeout_seconds: float | None) -> T:
        """Begins a call. Raises ClientClosedError."""
        if self._is_closed:
            raise errors.ClientClosedError
        return method(request, timeout=timeout_seconds, metadata=self.endpoint.metadata)

    async def _cancel_abandoned(self, job_name: str) -> None:
        request = service_pb2.CancelJobRequest(name=job_name)
        # The job has ended meanwhile, or the service is out of reach, or the channel is closed.
        with suppress(grpc.RpcError, grpc.aio.UsageError):
            await self._stub.CancelJob(
                request,
                timeout=CANCEL_SECONDS,
                metadata=self.endpoint.metadata,
                wait_for_ready=True,  # the connection may be the reason for leaving
            )
