"""The blocking and the asyncio client."""

from __future__ import annotations

import asyncio
import atexit
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack
from weakref import WeakSet

import grpc
import grpc.aio

from img2img.v1 import service_pb2, service_pb2_grpc
from img2img_client import errors, requests
from img2img_client.admin import Admin, AsyncAdmin
from img2img_client.channel import Endpoint
from img2img_client.convert import read
from img2img_client.diagnosis import explain, explain_async
from img2img_client.resources import Caller, Capabilities, Estimate, Job, Result, State
from img2img_client.resume import Backoff, FirstRequest, Follow, Retry, checked
from img2img_client.spec import CreateOptions, ImageSource, Options, StreamOptions
from img2img_client.stream import (
    AsyncCalls,
    AsyncJobStream,
    BlockingCalls,
    JobStream,
    is_task_cancelled,
)
from img2img_client.unary import Asyncio, Blocking, Rpc, Unary
from img2img_client.uploads import Upload
from img2img_client.usage import Loop, Process, check_fork

if TYPE_CHECKING:
    from img2img.v1.service_pb2_grpc import Img2ImgServiceAsyncStub

    Interceptor = grpc.UnaryUnaryClientInterceptor | grpc.UnaryStreamClientInterceptor

T = TypeVar("T")
ChannelT = TypeVar("ChannelT")
InterceptorT = TypeVar("InterceptorT")

CLOSE_SECONDS = 2.0  # seconds; longest wait until a channel is closed
CANCEL_SECONDS = 5.0  # seconds; longest time to cancel the job when a stream is closed

_clients: WeakSet[Client] = WeakSet()


def _job(response: Any) -> Job:
    return read(Job, response.job)


def _upload(response: Any) -> Upload:
    return read(Upload, response.upload)


class _Client(Generic[ChannelT, InterceptorT]):
    """The arguments of both clients, and their calls with a single response."""

    _channel_class: type
    _interceptor_classes: tuple[type, ...]
    _stub: Any

    def __init__(
        self,
        server: str | None = None,
        *,
        api_key: str | None = None,
        tls: bool = False,
        root_certificates: bytes | None = None,
        tls_name: str | None = None,
        client_certificate: tuple[bytes, bytes] | None = None,
        retry: Retry | None = None,
        call_seconds: float = 60.0,
        channel: ChannelT | None = None,
        interceptors: Sequence[InterceptorT] = (),
    ) -> None:
        if channel is None:
            self.endpoint = Endpoint.choose(
                server, api_key, tls, root_certificates, tls_name, client_certificate
            )
        else:
            if not isinstance(channel, self._channel_class):
                is_async = issubclass(self._channel_class, grpc.aio.Channel)
                expected = "a grpc.aio.Channel" if is_async else "a grpc.Channel"
                raise errors.invalid_type("channel", expected, channel)
            self.endpoint = Endpoint.of_channel(
                api_key,
                server=server,
                tls=tls,
                root_certificates=root_certificates,
                tls_name=tls_name,
                client_certificate=client_certificate,
                interceptors=interceptors,
            )
        requests.check_seconds("call_seconds", call_seconds)
        self._retry = checked(retry)
        self._call_seconds = call_seconds
        self._interceptors = self._checked_interceptors(interceptors)
        self._given_channel = channel
        self._is_closed = False
        self._start()

    def _checked_interceptors(self, interceptors: object) -> tuple[InterceptorT, ...]:
        """Returns the interceptors. Raises InvalidArgumentTypeError."""
        package = "grpc.aio" if grpc.aio.ClientInterceptor in self._interceptor_classes else "grpc"
        expected = f"a sequence of client interceptors of {package}"
        if not isinstance(interceptors, Sequence):
            raise errors.invalid_type("interceptors", expected, interceptors)
        for each in interceptors:
            if not isinstance(each, self._interceptor_classes):
                raise errors.invalid_type("interceptors", expected, each)
        return tuple(interceptors)

    def _start(self) -> None:
        """Sets the attributes that the client needs of its own; the end of __init__."""

    @Unary
    def create(
        self, prompt: str, init_image: ImageSource, **options: Unpack[CreateOptions]
    ) -> Rpc[Job]:
        """Queues a job and returns at once; follow it with `watch` or `get`."""
        request = requests.new_job(service_pb2.CreateJobRequest, prompt, init_image, options)
        return Rpc(self._stub.CreateJob, request, _job)

    @Unary
    def estimate(
        self, prompt: str, init_image: ImageSource | None = None, **options: Unpack[Options]
    ) -> Rpc[Estimate]:
        """Estimates a job without creating it: device time, wait and price. Without an init image
        a square one is assumed."""
        request = requests.estimate(prompt, init_image, options)
        return Rpc(self._stub.EstimateJob, request, partial(read, Estimate))

    @Unary
    def get(self, job: Job | str | int) -> Rpc[Job]:
        """Returns the current record of a job."""
        request = service_pb2.GetJobRequest(name=requests.job_name(job))
        return Rpc(self._stub.GetJob, request, _job)

    @Unary
    def cancel(self, job: Job | str | int) -> Rpc[Job]:
        """Cancels a job: a queued one at once, a running one at its next step."""
        request = service_pb2.CancelJobRequest(name=requests.job_name(job))
        return Rpc(self._stub.CancelJob, request, _job)

    @Unary
    def redeliver_webhook(self, job: Job | str | int) -> Rpc[Job]:
        """Sends the webhook of an ended job again, whether it was delivered or not.

        Raises:
            RpcError: with reason JOB_NOT_ENDED or NO_WEBHOOK.
        """
        request = service_pb2.RedeliverWebhookRequest(name=requests.job_name(job))
        return Rpc(self._stub.RedeliverWebhook, request, _job)

    @Unary
    def capabilities(self) -> Rpc[Capabilities]:
        """Returns the models that the service serves, and the service's limits."""
        request = service_pb2.GetCapabilitiesRequest()
        return Rpc(self._stub.GetCapabilities, request, partial(read, Capabilities))

    @Unary
    def caller(self) -> Rpc[Caller]:
        """Returns the tenant and the permissions of the API key."""
        request = service_pb2.GetCallerRequest()
        return Rpc(self._stub.GetCaller, request, partial(read, Caller))

    @Unary
    def upload(self, image: ImageSource) -> Rpc[Upload]:
        """Stores an init image, so that several jobs can have it without sending it again. The
        same content is stored once.

        Args:
            image: A path, bytes, a file object or a Pillow image; no URL.

        Raises:
            RpcError: With reason UPLOADS_FULL or UPLOADS_DISABLED.
        """
        return Rpc(self._stub.CreateUpload, requests.create_upload(image), _upload)

    @Unary
    def delete_upload(self, upload: Upload) -> Rpc[None]:
        """Deletes an upload. Jobs that were created with it keep their init image."""
        request = service_pb2.DeleteUploadRequest(name=upload.name)
        return Rpc(self._stub.DeleteUpload, request, lambda _: None)

    def _follow(self, first: FirstRequest, timeout_seconds: float | None) -> Follow:
        return Follow(first, self._retry, requests.deadline(timeout_seconds))

    def _open(self, request: FirstRequest, timeout_seconds: float | None) -> Any:
        """Starts a call that streams the events of a job."""
        is_generate = isinstance(request, service_pb2.GenerateRequest)
        method = self._stub.Generate if is_generate else self._stub.WatchJob
        return self._begin(method, request, timeout_seconds)

    def _begin(self, method: Callable[..., T], request: object, timeout_seconds: float | None) -> T:
        """Starts a call. Raises ClientClosedError, ClientUsageError."""
        if self._is_closed:
            raise errors.ClientClosedError
        check_fork()
        try:
            return method(request, timeout=timeout_seconds, metadata=self.endpoint.metadata)
        except (ValueError, grpc.aio.UsageError) as error:
            if isinstance(error, ValueError) and "Cannot invoke RPC" not in str(error):
                raise  # Without this check, gRPC would raise its own error for a closed channel.
            raise errors.ClientClosedError from error


class Client(_Client[grpc.Channel, "Interceptor"], Blocking):
    """Generates images with the img2img service. Threads may share it.

        with Client("127.0.0.1:50051", api_key="dev-key") as client:
            result = client.generate("a watercolour", Path("photo.jpg"), strength=0.7)
            result.images[0].save("out.png")

    Every method raises the errors of `img2img_client.errors` and no others. Calls that fail because
    of a lost connection or a stopping server are retried as `retry` says, without creating a job
    twice.

    Args:
        server: "host:port"; see Endpoint. Default: IMG2IMG_SERVER, else 127.0.0.1:50051.
        api_key: the tenant's key. Default: IMG2IMG_API_KEY. Surrounding white space is removed.
        tls: encrypt, and check the server against the system's certificate authorities.
        root_certificates: PEM of the authorities to trust instead; turns TLS on.
        tls_name: the name in the certificate, if it is not the host of `server`. Required with
            several addresses.
        client_certificate: PEM of a certificate chain and of its key, for a server that requires
            them (mutual TLS).
        retry: how long to retry.
        call_seconds: timeout of a single call, streams excepted.
        channel: a channel of yours, instead of server, the arguments of TLS and interceptors. The
            client does not close it. Open it with `CHANNEL_OPTIONS`: gRPC's
            default limit of 4 MB a message is too small for images.
        interceptors: gRPC client interceptors for the channel that the client opens.

    Raises:
        InvalidArgumentError: an argument can never work.
    """

    _channel_class = grpc.Channel
    _interceptor_classes = (
        grpc.UnaryUnaryClientInterceptor,
        grpc.UnaryStreamClientInterceptor,
        grpc.StreamUnaryClientInterceptor,
        grpc.StreamStreamClientInterceptor,
    )

    def _start(self) -> None:
        check_fork()
        self._process = Process()
        self._channel = self._given_channel or self._open_channel()
        self._stub = service_pb2_grpc.Img2ImgServiceStub(self._channel)
        self._is_channel_closed = False
        self._streams: WeakSet[BlockingCalls] = WeakSet()
        self.admin = Admin(lambda: self._channel, self._call)
        self.admin.make_stubs()
        _clients.add(self)

    def _open_channel(self) -> grpc.Channel:
        target, options = self.endpoint.target, self.endpoint.options
        credentials = self.endpoint.credentials
        channel = (
            grpc.secure_channel(target, credentials, options)
            if credentials
            else grpc.insecure_channel(target, options)
        )
        return grpc.intercept_channel(channel, *self._interceptors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes all open streams, see JobStream.close, and the channel if this client opened it.

        Streams, and calls on that channel, that another thread waits for raise ClientClosedError.
        In a forked process this affects neither the jobs nor the channel of the parent process.
        """
        self._is_closed = True
        if not self._process.is_this:
            return
        for calls in list(self._streams):
            calls.leave()
        if self._given_channel is None and not self._is_channel_closed:
            self._is_channel_closed = True
            self._close_channel()

    def _close_channel(self) -> None:
        """Closes the channel, or gives up after CLOSE_SECONDS.

        If Ctrl-C interrupts gRPC while it starts a call, closing the channel never returns.
        """
        closing = threading.Thread(target=self._channel.close, name="img2img-close", daemon=True)
        try:
            closing.start()
        except RuntimeError:  # The interpreter ends and starts no thread any more.
            self._channel.close()
        else:
            closing.join(CLOSE_SECONDS)

    def generate(
        self, prompt: str, init_image: ImageSource, **options: Unpack[StreamOptions]
    ) -> Result:
        """Generates images and waits until they are stored. Arguments as in `stream`.

        Raises:
            JobFailedError, JobCancelledError: the job ended without images.
        """
        with self.stream(prompt, init_image, **options) as stream:
            return stream.result()

    def stream(
        self, prompt: str, init_image: ImageSource, **options: Unpack[StreamOptions]
    ) -> JobStream:
        """Generates images and returns the events of the job until it has ended.

        Leaving the stream early (close, break, the end of its `with`, an exception, Ctrl-C, the end
        of the program) cancels the job unless `detach`. A broken stream resumes after the last
        event. If that takes longer than the service's grace period, 15 seconds by default, the
        service cancels the job unless it is detached.

        Args:
            prompt: description of the image.
            init_image: a path, bytes, a file object opened in binary mode, a Pillow image, an
                http(s) URL, or a data URI.
            options: see StreamOptions and Options.
        """
        timeout_seconds = options.pop("timeout_seconds", None)
        request = requests.new_job(service_pb2.GenerateRequest, prompt, init_image, options)
        return self._stream(request, timeout_seconds)

    def watch(
        self, job: Job | str | int, *, after_sequence: int = 0, timeout_seconds: float | None = None
    ) -> JobStream:
        """Returns a snapshot of a job, then its events after `after_sequence` until it has ended.

        Leaving early does not affect the job.
        """
        return self._stream(requests.watch_job(job, after_sequence), timeout_seconds)

    def list(
        self, *states: State | str, page_size: int = 100, request_id: str = ""
    ) -> Iterator[Job]:
        """Yields the jobs that have not expired, newest first; with `states`, only those.

        `request_id`: yields only the job that was created with it.
        """
        request = requests.list_jobs(states, page_size, request_id)
        while True:
            page = self._call(self._stub.ListJobs, request)
            yield from (read(Job, job) for job in page.jobs)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _stream(self, first: FirstRequest, timeout_seconds: float | None) -> JobStream:
        follow = self._follow(first, timeout_seconds)
        calls = BlockingCalls(follow, self.endpoint, self._open, self._cancel_abandoned)
        self._streams.add(calls)
        return JobStream(follow, calls.start(), calls.process.check)

    def _call(self, method: Callable[..., T], request: object) -> T:
        backoff = Backoff(self._retry)
        while True:
            try:
                return self._begin(method, request, self._call_seconds)
            except grpc.RpcError as failure:
                if self._is_closed:
                    raise errors.ClientClosedError from failure
                error = errors.from_call(failure, self.endpoint)
                try:
                    delay = backoff.delay(error, time.monotonic())
                except errors.RpcError as last:
                    raise explain(last, self.endpoint) from failure
                time.sleep(delay)

    def _cancel_abandoned(self, job_name: str) -> None:
        if self._is_channel_closed:  # gRPC crashes on a closed channel with interceptors
            return
        # Ignored: the job has ended, the service cannot be reached, or the channel is closed.
        with suppress(grpc.RpcError, ValueError):
            self._stub.CancelJob(
                service_pb2.CancelJobRequest(name=job_name),
                timeout=CANCEL_SECONDS,
                metadata=self.endpoint.metadata,
                wait_for_ready=True,  # The stream may be closed because the connection is lost.
            )


@atexit.register
def _close_all() -> None:
    for client in list(_clients):
        client.close()


class AsyncClient(_Client[grpc.aio.Channel, grpc.aio.ClientInterceptor], Asyncio):
    """Generates images with the img2img service, on asyncio. It belongs to one event loop.

        async with AsyncClient("127.0.0.1:50051", api_key="dev-key") as client:
            result = await client.generate("a watercolour", Path("photo.jpg"), strength=0.7)
            result.images[0].save("out.png")

    Arguments as in Client, but `channel` and `interceptors` are those of grpc.aio. Every method
    takes, returns and raises what the method of the same name in Client does.
    """

    _channel_class = grpc.aio.Channel
    _interceptor_classes = (grpc.aio.ClientInterceptor,)

    def _start(self) -> None:
        self._streams: WeakSet[AsyncCalls] = WeakSet()
        self._loop = Loop(self._given_channel)
        self.admin = AsyncAdmin(lambda: self._channel, self._call)
        if self._given_channel is not None:  # Its owner may close it before the first call.
            _ = self._stub
            self.admin.make_stubs()

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        if self._given_channel is not None:
            return self._given_channel
        # Opened at the first call: a channel binds to the running event loop, and a client may be
        # created before the loop runs.
        if self._is_closed:
            raise errors.ClientClosedError
        self._loop.check()
        check_fork()
        target, options = self.endpoint.target, self.endpoint.options
        if credentials := self.endpoint.credentials:
            return grpc.aio.secure_channel(
                target, credentials, options, interceptors=self._interceptors
            )
        return grpc.aio.insecure_channel(target, options, interceptors=self._interceptors)

    @cached_property
    def _stub(self) -> Img2ImgServiceAsyncStub:
        return service_pb2_grpc.Img2ImgServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all streams, and the channel if this client opened it, as Client.close."""
        if self._loop.is_closed:  # Its streams and its channel ended with the event loop.
            self._is_closed = True
            return
        self._loop.check()
        self._is_closed = True
        for calls in list(self._streams):
            await calls.leave()
        if self._given_channel is None and "_channel" in vars(self):
            await self._channel.close()

    async def generate(
        self, prompt: str, init_image: ImageSource, **options: Unpack[StreamOptions]
    ) -> Result:
        """Generates images and waits until they are stored, as Client.generate."""
        async with self.stream(prompt, init_image, **options) as stream:
            return await stream.result()

    def stream(
        self, prompt: str, init_image: ImageSource, **options: Unpack[StreamOptions]
    ) -> AsyncJobStream:
        """Generates images and returns the events of the job, as Client.stream.

        Cancelling the task that reads the stream leaves it.
        """
        timeout_seconds = options.pop("timeout_seconds", None)
        request = requests.new_job(service_pb2.GenerateRequest, prompt, init_image, options)
        return self._stream(request, timeout_seconds)

    def watch(
        self, job: Job | str | int, *, after_sequence: int = 0, timeout_seconds: float | None = None
    ) -> AsyncJobStream:
        """Returns a snapshot of a job, then its events, as Client.watch."""
        return self._stream(requests.watch_job(job, after_sequence), timeout_seconds)

    async def list(
        self, *states: State | str, page_size: int = 100, request_id: str = ""
    ) -> AsyncIterator[Job]:
        """Yields the jobs that have not expired, newest first, as Client.list."""
        request = requests.list_jobs(states, page_size, request_id)
        while True:
            page = await self._call(self._stub.ListJobs, request)
            for job in page.jobs:
                yield read(Job, job)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def _stream(self, first: FirstRequest, timeout_seconds: float | None) -> AsyncJobStream:
        follow = self._follow(first, timeout_seconds)
        calls = AsyncCalls(follow, self.endpoint, self._open, self._cancel_abandoned)
        self._streams.add(calls)
        return AsyncJobStream(follow, calls.start(), self._loop.check)

    async def _call(self, method: Callable[..., Awaitable[T]], request: object) -> T:
        if not self._is_closed:  # Otherwise _begin raises ClientClosedError.
            self._loop.check()
        backoff = Backoff(self._retry)
        while True:
            try:
                return await self._begin(method, request, self._call_seconds)
            except grpc.RpcError as failure:
                error = errors.from_call(failure, self.endpoint)
                try:
                    delay = backoff.delay(error, time.monotonic())
                except errors.RpcError as last:
                    raise await explain_async(last, self.endpoint) from failure
                await asyncio.sleep(delay)
            except (asyncio.CancelledError, grpc.aio.UsageError) as closed:
                if not is_task_cancelled():  # Closing the channel has cancelled the call.
                    raise errors.ClientClosedError from closed
                raise

    async def _cancel_abandoned(self, job_name: str) -> None:
        # Ignored: the job has ended, the service cannot be reached, or the channel is closed.
        with suppress(grpc.RpcError, grpc.aio.UsageError):
            await self._stub.CancelJob(
                service_pb2.CancelJobRequest(name=job_name),
                timeout=CANCEL_SECONDS,
                metadata=self.endpoint.metadata,
                wait_for_ready=True,  # The stream may be closed because the connection is lost.
            )
