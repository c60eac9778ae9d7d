"""The blocking client."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Self, TypeVar, Unpack
from weakref import WeakSet

import grpc

from img2img.v1 import service_pb2, service_pb2_grpc
from img2img_client import convert, errors, requests
from img2img_client.admin import Admin
from img2img_client.calls import CANCEL_SECONDS, BlockingCalls
from img2img_client.channel import Endpoint
from img2img_client.diagnosis import explain
from img2img_client.requests import ImageSource, Options
from img2img_client.resources import Caller, Capabilities, Job, State
from img2img_client.result import Result
from img2img_client.resume import Backoff, FirstRequest, Follow, Retry, checked, may_repeat
from img2img_client.silence import SilenceWatch
from img2img_client.stream import JobStream, deadline

T = TypeVar("T")

_clients: WeakSet[Client] = WeakSet()


class Client:
    """Makes pictures through the img2img service. Safe to share between threads.

        with Client("127.0.0.1:50051", api_key="dev-key") as client:
            result = client.generate("a watercolour", Path("photo.jpg"), strength=0.7)
            result.images[0].save("out.png")

    Every method raises the errors of `img2img_client.errors` and no others. What a lost connection
    or a stopping server interrupts is tried again as `retry` says, without making anything twice.

    Args:
        server: "host:port"; see Endpoint. Left out: IMG2IMG_SERVER, else 127.0.0.1:50051.
        api_key: key of the tenant. Left out: IMG2IMG_API_KEY. White space around it is dropped.
        tls: encrypt, and check the server against the system's certificate authorities.
        root_certificates: PEM of the authorities to trust instead; turns TLS on.
        retry: how long to try again.
        call_seconds: longest single call, streams excepted.

    Raises:
        InvalidArgumentError: an argument can never work.
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
        target, options = self.endpoint.target, self.endpoint.options
        credentials = self.endpoint.credentials
        self._channel = (
            grpc.secure_channel(target, credentials, options)
            if credentials
            else grpc.insecure_channel(target, options)
        )
        self._stub = service_pb2_grpc.Img2ImgServiceStub(self._channel)
        self._silence = SilenceWatch(self._retry.silence_seconds)
        self._streams: WeakSet[BlockingCalls] = WeakSet()
        self.admin = Admin(self._channel, self._call)
        _clients.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leaves all open streams, see JobStream.close, and closes the connection.

        Calls and streams that another thread waits for end with ClientClosedError.
        """
        self._is_closed = True
        for calls in list(self._streams):
            calls.leave()
        self._channel.close()

    def generate(
        self,
        prompt: str,
        init_image: ImageSource,
        *,
        detach: bool = False,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        **options: Unpack[Options],
    ) -> Result:
        """Makes pictures and waits until they are stored. Arguments as in `stream`.

        Raises:
            JobFailedError, JobCancelledError: the job ended without pictures.
        """
        with self.stream(
            prompt,
            init_image,
            detach=detach,
            request_id=request_id,
            timeout_seconds=timeout_seconds,
            **options,
        ) as stream:
            return stream.result()

    def stream(
        self,
        prompt: str,
        init_image: ImageSource,
        *,
        detach: bool = False,
        request_id: str | None = None,
        timeout_seconds: float | None = None,
        **options: Unpack[Options],
    ) -> JobStream:
        """Makes pictures and tells about it, event by event, until the job has ended.

        Leaving the stream early (close, break, the end of its `with`, an exception, Ctrl-C, the
        end of the program) cancels the job unless `detach`. A connection that breaks is bridged:
        the stream goes on behind the last event. When it cannot be made again within the service's
        grace period, 15 seconds by default, the service cancels a job that is not detached.

        Args:
            prompt: what the picture shall show.
            init_image: a file, its bytes, an http(s) URL, or a data URI.
            detach: let the job go on without us.
            request_id: a UUID of yours: the same one gives the same job within 24 hours.
            timeout_seconds: until the job's end; one that cannot finish in time is refused.
            options: see Options.
        """
        first = requests.generate_request(
            prompt, init_image, options, request_id=request_id, detach=detach
        )
        return self._stream(first, timeout_seconds)

    def watch(
        self, job: Job | str | int, *, after_sequence: int = 0, timeout_seconds: float | None = None
    ) -> JobStream:
        """Follows a job: a snapshot, then all events after `after_sequence`, until it has ended.

        Leaving early does not touch the job.
        """
        first = requests.watch_request(job, after_sequence)
        return self._stream(first, timeout_seconds)

    def create(
        self,
        prompt: str,
        init_image: ImageSource,
        *,
        request_id: str | None = None,
        **options: Unpack[Options],
    ) -> Job:
        """Queues a job and returns at once; follow it with `watch` or `get`."""
        request = requests.create_request(prompt, init_image, options, request_id=request_id)
        return convert.job_from(self._call(self._stub.CreateJob, request).job)

    def get(self, job: Job | str | int) -> Job:
        """The job as it is now."""
        request = service_pb2.GetJobRequest(name=requests.job_name(job))
        return convert.job_from(self._call(self._stub.GetJob, request).job)

    def list(self, *states: State | str, page_size: int = 100) -> Iterator[Job]:
        """Jobs that have not expired, newest first; with `states`, only those in one of them."""
        request = requests.list_request(states, page_size)
        while True:
            page = self._call(self._stub.ListJobs, request)
            yield from map(convert.job_from, page.jobs)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def cancel(self, job: Job | str | int) -> Job:
        """Cancels a job: at once when it waits, at its next step when it runs."""
        request = service_pb2.CancelJobRequest(name=requests.job_name(job))
        return convert.job_from(self._call(self._stub.CancelJob, request).job)

    def redeliver_webhook(self, job: Job | str | int) -> Job:
        """Sends the webhook of a job that has ended once more, whatever became of it before.

        Raises:
            RpcError: with reason JOB_NOT_ENDED or NO_WEBHOOK.
        """
        request = service_pb2.RedeliverWebhookRequest(name=requests.job_name(job))
        return convert.job_from(self._call(self._stub.RedeliverWebhook, request).job)

    def capabilities(self) -> Capabilities:
        """The models being served and the limits in force."""
        request = service_pb2.GetCapabilitiesRequest()
        return convert.read(Capabilities, self._call(self._stub.GetCapabilities, request))

    def caller(self) -> Caller:
        """Returns the tenant and the permissions of the API key."""
        request = service_pb2.GetCallerRequest()
        return convert.read(Caller, self._call(self._stub.GetCaller, request))

    def _stream(self, first: FirstRequest, timeout_seconds: float | None) -> JobStream:
        follow = Follow(first, self._retry, deadline(timeout_seconds))
        calls = BlockingCalls(
            follow, self.endpoint, self._open, self._cancel_abandoned, self._silence
        )
        self._streams.add(calls)
        return JobStream(follow, calls.begin())

    def _call(self, method: Callable[..., T], request: object) -> T:
        backoff = Backoff(self._retry)
        while True:
            try:
                return self._begin(method, request, self._call_seconds)
            except grpc.RpcError as broken:
                if self._is_closed:
                    raise errors.ClientClosedError from broken
                error = errors.from_call(broken, self.endpoint)
                try:
                    if not may_repeat(error):
                        raise error
                    pause = backoff.pause(error, time.monotonic())
                except errors.RpcError as last:
                    raise explain(last, self.endpoint) from broken
                time.sleep(pause)

    def _open(self, request: FirstRequest, timeout_seconds: float | None) -> Any:
        generate = isinstance(request, service_pb2.GenerateRequest)
        method: Any = self._stub.Generate if generate else self._stub.WatchJob
        return self._begin(method, request, timeout_seconds)

    def _begin(self, method: Callable[..., T], request: object, timeout_seconds: float | None) -> T:
        """Makes a call, or begins one that streams. Raises ClientClosedError."""
        if self._is_closed:
            raise errors.ClientClosedError
        try:
            return method(request, timeout=timeout_seconds, metadata=self.endpoint.metadata)
        except ValueError as error:  # another thread has closed the channel meanwhile
            if self._is_closed:
                raise errors.ClientClosedError from error
            raise

    def _cancel_abandoned(self, job_name: str) -> None:
        request = service_pb2.CancelJobRequest(name=job_name)
        # The job has ended meanwhile, or the service is out of reach, or the channel is closed.
        with suppress(grpc.RpcError, ValueError):
            self._stub.CancelJob(
                request,
                timeout=CANCEL_SECONDS,
                metadata=self.endpoint.metadata,
                wait_for_ready=True,  # the connection may be the reason for leaving
            )


@atexit.register
def _close_all() -> None:
    for client in list(_clients):
        client.close()
