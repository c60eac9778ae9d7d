"""Streams of both clients with a scripted service: broken, resumed and closed streams."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from typing import Any

import grpc
import pytest

import img2img_client as api
from img2img.v1 import job_pb2, service_pb2
from img2img_client import AsyncClient, Client, ClientClosedError
from tests.client_runs import BOTH, RETRY, Run, run_blocking
from tests.fake_job import NAME
from tests.fake_service import SILENCE, Break, FakeService, Refusal, last, serving


@pytest.fixture(params=BOTH.values(), ids=BOTH.keys())
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


def kinds(found: list[api.Event]) -> list[tuple[str, int]]:
    return [(type(event).__name__, event.sequence) for event in found]


WHOLE = [
    ("Snapshot", 0),
    ("Queued", 1),
    ("Started", 2),
    ("StageFinished", 3),
    ("StageFinished", 4),
    ("StepFinished", 6),
    ("Preview", 7),
    ("StepFinished", 8),
    ("Preview", 9),
    ("SampleFinished", 10),
    ("SampleStored", 11),
    ("Succeeded", 12),
]


def test_a_stream_gives_every_event_once_and_sends_what_was_asked_for(run: Run) -> None:
    service = FakeService()
    found = run(
        service,
        lambda client: client.stream(
            "an oil painting",
            b"photo",
            strength=0.5,
            seed=7,
            safety_checker=False,
            output_format="jpg",
            lane="batch",
            model=None,
            annotations={"shelf": "3"},
            request_id="7f1c",
        ),
    )
    assert kinds(found) == WHOLE
    assert service.requests == [
        service_pb2.GenerateRequest(
            spec=job_pb2.JobSpec(
                prompt="an oil painting",
                init_image=job_pb2.InitImage(data=b"photo"),
                strength=0.5,
                seed=7,
                safety_checker=False,
                output_format=job_pb2.IMAGE_FORMAT_JPEG,
                lane=job_pb2.LANE_BATCH,
                annotations={"shelf": "3"},
            ),
            request_id="7f1c",
        )
    ]
    assert service.keys == ["Bearer k"]


@pytest.mark.parametrize("after", range(len(WHOLE) + 1))
def test_a_stream_that_breaks_anywhere_is_resumed_without_gap_or_duplicate(
    run: Run, after: int
) -> None:
    service = FakeService(breaks=deque([Break(after, Refusal(grpc.StatusCode.UNAVAILABLE))]))
    found = run(service, lambda client: client.stream("p", b"photo"))
    assert kinds(found) == WHOLE
    assert len(service.request_ids) == 1
    if 0 < after < len(WHOLE):
        seen = WHOLE[after - 1][1]
        again = service_pb2.WatchJobRequest(name=NAME, after_sequence=seen)
        assert service.requests[1:] == [again]


@pytest.mark.parametrize(
    "refusal",
    [
        None,  # The stream ends without an error.
        Refusal(grpc.StatusCode.CANCELLED),
        Refusal(grpc.StatusCode.UNKNOWN, "Stream removed"),
        Refusal(grpc.StatusCode.INTERNAL, "Received RST_STREAM with error code 2"),
        Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many", "TOO_MANY_WATCHERS"),
        Refusal(grpc.StatusCode.UNAVAILABLE, "stopping", "UNAVAILABLE"),
    ],
    ids=str,
)
def test_a_watched_stream_is_resumed_after_every_kind_of_failure(
    run: Run, refusal: Refusal | None
) -> None:
    service = FakeService(breaks=deque([Break(3, refusal), Break(0, refusal), Break(2, refusal)]))
    found = run(service, lambda client: client.watch(10000001, after_sequence=1))
    assert kinds(found) == [("Snapshot", 1), *WHOLE[2:]]
    asked = [request.after_sequence for request in service.requests]  # type: ignore[attr-defined]
    assert asked == [1, 3, 3, 4]


def test_a_server_that_dies_and_comes_back_is_found_again(run: Run) -> None:
    """The first server ends with all its sockets, so the connection is really lost."""
    first, second = FakeService(pause_after=3), FakeService()
    stop, port = threading.Event(), 0
    started = threading.Event()

    def first_life() -> None:
        nonlocal port
        with serving(first) as port:
            started.set()
            first.paused.wait()
        with serving(second, port):
            started.set()
            stop.wait()

    life = threading.Thread(target=first_life)
    life.start()
    started.wait()
    try:
        if run is run_blocking:
            with Client(f"127.0.0.1:{port}", retry=RETRY) as client:
                found = list(client.stream("p", b"photo"))
        else:
            found = asyncio.run(_read_async(port))
    finally:
        stop.set()
        life.join()
    assert kinds(found) == WHOLE
    assert second.requests == [service_pb2.WatchJobRequest(name=NAME, after_sequence=3)]


async def _read_async(port: int) -> list[api.Event]:
    async with AsyncClient(f"127.0.0.1:{port}", retry=RETRY) as client:
        return [event async for event in client.stream("p", b"photo")]


def test_a_rejection_after_the_first_event_is_not_retried(run: Run) -> None:
    gone = Refusal(grpc.StatusCode.NOT_FOUND, f"{NAME} has expired", "JOB_NOT_FOUND")
    service = FakeService(
        breaks=deque([Break(2, Refusal(grpc.StatusCode.UNAVAILABLE)), Break(0, gone)])
    )
    with pytest.raises(api.NotFoundError, match="has expired") as caught:
        run(service, lambda client: client.watch(NAME))
    assert (caught.value.reason, caught.value.metadata) == ("JOB_NOT_FOUND", {"made": "up"})


def leave_early(client: Any, **options: Any) -> Any:
    """Reads two events of a stream and closes it."""
    if isinstance(client, Client):
        with client.stream("p", b"photo", **options) as stream:
            iterator = iter(stream)
            next(iterator), next(iterator)
        return None

    async def leave() -> None:
        async with client.stream("p", b"photo", **options) as stream:
            iterator = aiter(stream)
            await anext(iterator), await anext(iterator)

    return leave()


def test_leaving_a_stream_early_cancels_its_job(run: Run) -> None:
    service = FakeService(pause_after=3)
    run(service, leave_early)
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


def test_leaving_a_detached_stream_does_not_cancel_its_job(run: Run) -> None:
    service = FakeService(pause_after=3)
    run(service, lambda client: leave_early(client, detach=True))
    assert [type(request) for request in service.requests] == [service_pb2.GenerateRequest]
    assert last(service.requests, service_pb2.GenerateRequest).detach


def test_a_timeout_ends_the_stream_and_cancels_its_job(run: Run) -> None:
    service = FakeService(pause_after=3)
    with pytest.raises(api.DeadlineExceededError):
        run(service, lambda client: client.generate("p", b"photo", timeout_seconds=0.3))
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


async def test_cancelling_the_task_that_reads_cancels_the_job() -> None:
    service, seen = FakeService(pause_after=3), asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async with client.stream("p", b"photo") as stream:
            async for event in stream:
                if event.sequence == 3:
                    seen.set()

    with serving(service) as port:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            reading = asyncio.create_task(read(client))
            await seen.wait()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


def test_a_closed_stream_has_no_result(run: Run) -> None:
    service = FakeService(pause_after=3)

    def use(client: Any) -> Any:
        stream = client.watch(NAME)
        if isinstance(client, Client):
            stream.close()
            return stream.result()

        async def close_then_ask() -> Any:
            await stream.aclose()
            return await stream.result()

        return close_then_ask()

    with pytest.raises(api.StreamClosedError):
        run(service, use)


def silent_after(after: int) -> FakeService:
    """Returns a service whose first stream stops sending after some messages."""
    return FakeService(breaks=deque([Break(after, SILENCE)]))


@pytest.mark.parametrize("after", [0, 3])
def test_a_stream_without_messages_is_resumed(run: Run, after: int) -> None:
    service = silent_after(after)
    retry = dataclasses.replace(RETRY, silence_seconds=0.3)
    found = run(service, lambda client: client.stream("p", b"photo"), retry=retry)
    assert kinds(found) == WHOLE
    assert len(service.request_ids) == 1
    assert len(service.requests) == 2


def test_heartbeats_keep_a_stream_open_and_are_not_returned(run: Run) -> None:
    service = FakeService(breaks=deque([Break(3, None, heartbeats=6)]))
    retry = dataclasses.replace(RETRY, silence_seconds=0.3)
    found = run(service, lambda client: client.stream("p", b"photo"), retry=retry)
    assert kinds(found) == WHOLE
    assert len(service.requests) == 2, "the heartbeats took longer than the silence may last"


def test_the_time_that_the_caller_takes_between_events_does_not_count_as_silence(run: Run) -> None:
    service = FakeService()
    retry = dataclasses.replace(RETRY, silence_seconds=0.2)

    def slowly(client: Any) -> Any:
        if isinstance(client, Client):
            for event in client.stream("p", b"photo"):
                if event.sequence == 2:
                    threading.Event().wait(0.5)
            return None

        async def read() -> None:
            async for event in client.stream("p", b"photo"):
                if event.sequence == 2:
                    await asyncio.sleep(0.5)

        return read()

    run(service, slowly, retry=retry)
    assert [type(request) for request in service.requests] == [service_pb2.GenerateRequest]


def test_leaving_before_the_first_event_cancels_the_job_too(run: Run) -> None:
    service = FakeService(slow_start=threading.Event())

    def leave(client: Any) -> Any:
        threading.Timer(0.2, service.slow_start.set).start()
        if isinstance(client, Client):
            before = signal.signal(signal.SIGALRM, interrupt)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            try:
                with pytest.raises(KeyboardInterrupt):
                    client.generate("p", b"photo")
            finally:
                signal.signal(signal.SIGALRM, before)
            return None

        async def cancelled() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await client.generate("p", b"photo")

        return cancelled()

    run(service, leave)
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_closing_the_client_leaves_its_streams(run: Run) -> None:
    service = FakeService(pause_after=3)

    def close(client: Any) -> Any:
        if isinstance(client, Client):
            events = iter(client.stream("p", b"photo"))  # No variable refers to the stream itself.
            next(events)
            client.close()
            return None

        async def closing() -> None:
            events = aiter(client.stream("p", b"photo"))
            await anext(events)
            await client.close()

        return closing()

    run(service, close)
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


def test_closing_the_client_cancels_a_job_that_another_thread_or_task_waits_for(run: Run) -> None:
    service, ends = FakeService(pause_after=3), []

    def close(client: Any) -> Any:
        stream = client.stream("p", b"photo")
        if isinstance(client, Client):

            def wait() -> None:
                with pytest.raises(ClientClosedError) as caught:
                    stream.result()
                ends.append(caught.value)

            thread = threading.Thread(target=wait)
            thread.start()
            while stream.sequence < 3:
                time.sleep(0.01)
            client.close()
            thread.join()
            return None

        async def closing() -> None:
            waiting = asyncio.create_task(stream.result())
            while stream.sequence < 3:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            await client.close()
            with pytest.raises(ClientClosedError) as caught:
                await waiting
            ends.append(caught.value)

        return closing()

    run(service, close)
    assert len(ends) == 1
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


def test_breaking_out_of_a_loop_cancels_the_job_without_with(run: Run) -> None:
    service = FakeService(pause_after=3)

    def leave(client: Any) -> Any:
        if isinstance(client, Client):
            for _ in client.stream("p", b"photo"):
                break
            assert service.cancelled.wait(5)
            return None

        async def leaving() -> None:
            async for _ in client.stream("p", b"photo"):
                break
            assert await asyncio.to_thread(service.cancelled.wait, 5)

        return leaving()

    gc.disable()  # The stream must end without a run of the garbage collector.
    try:
        run(service, leave)
    finally:
        gc.enable()
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


def test_an_exception_within_a_loop_cancels_the_job_when_the_client_is_left(run: Run) -> None:
    service = FakeService(pause_after=3)

    def fail(client: Any) -> Any:
        if isinstance(client, Client):
            for _ in client.stream("p", b"photo"):
                raise LookupError

        async def failing() -> None:
            async for _ in client.stream("p", b"photo"):
                raise LookupError

        return failing()

    with pytest.raises(LookupError):
        run(service, fail)
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


async def test_closing_the_client_waits_for_a_task_that_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """asyncio.gather ends when the first of its cancelled tasks has ended."""
    service, seen, leaves = FakeService(pause_after=3), asyncio.Event(), asyncio.Event()
    cancel = AsyncClient._cancel_abandoned

    async def cancel_slowly(client: AsyncClient, name: str) -> None:
        leaves.set()
        await asyncio.sleep(0.05)
        await cancel(client, name)

    async def read(client: AsyncClient) -> None:
        async for event in client.stream("p", b"photo"):
            if event.sequence == 3:
                seen.set()

    monkeypatch.setattr(AsyncClient, "_cancel_abandoned", cancel_slowly)
    with serving(service) as port:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            reading = asyncio.create_task(read(client))
            await seen.wait()
            reading.cancel()
            await leaves.wait()
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


async def test_a_task_that_is_cancelled_twice_still_cancels_its_job() -> None:
    service, seen = FakeService(pause_after=3), asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async for event in client.stream("p", b"photo"):
            if event.sequence == 3:
                seen.set()

    with serving(service) as port:
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            reading = asyncio.create_task(read(client))
            await seen.wait()
            for _ in range(3):
                reading.cancel()
                await asyncio.sleep(0)
            with pytest.raises(asyncio.CancelledError):
                await reading
            await asyncio.to_thread(service.cancelled.wait, 5)
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


def test_a_program_that_ends_in_the_middle_of_a_stream_cancels_its_job() -> None:
    service = FakeService(pause_after=3)
    with serving(service) as port:
        program = (
            "from img2img_client import Client\n"
            f"stream = Client('127.0.0.1:{port}').stream('p', b'photo')\n"
            "print(next(iter(stream)).job_name)\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60)
    assert (done.stdout.decode().strip(), done.stderr) == (NAME, b"")
    assert service.requests[-1] == service_pb2.CancelJobRequest(name=NAME)


def test_an_error_of_the_caller_is_not_hidden_by_a_cancel_that_fails(run: Run) -> None:
    service = FakeService(
        pause_after=3, refusals=deque([Refusal(grpc.StatusCode.INTERNAL, "broken", "INTERNAL")])
    )

    def fail(client: Any) -> Any:
        if isinstance(client, Client):
            with client.stream("p", b"photo") as stream:
                next(iter(stream))
                raise LookupError("of the caller")

        async def failing() -> None:
            async with client.stream("p", b"photo") as stream:
                await anext(aiter(stream))
                raise LookupError("of the caller")

        return failing()

    with pytest.raises(LookupError, match="of the caller"):
        run(service, fail)
    assert not service.refusals
