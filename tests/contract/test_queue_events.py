"""The event log and the control channel, in memory and on JetStream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from fixtures_engines import OpenBus

from img2img_server.domain.events import (
    Cancelled,
    EncodedImage,
    Envelope,
    Event,
    Failed,
    Preview,
    Queued,
    SampleFinished,
    Stage,
    StageFinished,
    Started,
    StepFinished,
    Succeeded,
)
from img2img_server.interfaces.queue import (
    OwnershipLostError,
    StreamNotice,
    StreamState,
    WorkerCommand,
)
from img2img_server.nats.bus import Bus

JOB = 10_000_001
LONG = 60.0
IMAGE = EncodedImage(data=b"\xff\xd8", media_type="image/jpeg", sha256="ab" * 32, width=8, height=8)
STARTED = Started(worker="worker-1", model="atelier", attempt=1)


def step(number: int) -> StepFinished:
    return StepFinished(sample=0, step=number, total=9, sigma=1.5)


def preview(number: int, sample: int = 0) -> Preview:
    return Preview(sample=sample, step=number, image=IMAGE)


async def take(events: AsyncIterator[Envelope], count: int) -> list[tuple[int, Event]]:
    async with asyncio.timeout(LONG):
        taken = [await anext(events) for _ in range(count)]
    return [(envelope.sequence, envelope.event) for envelope in taken]


async def replay(bus: Bus, after: int = 0) -> list[tuple[int, Event]]:
    """Returns all events of the log, up to the terminal event."""
    taken = []
    async with asyncio.timeout(LONG), bus.events.watch(JOB, after) as events:
        async for envelope in events:
            taken.append((envelope.sequence, envelope.event))
            if envelope.is_terminal:
                return taken
    raise AssertionError("a watch never ends by itself")


async def test_events_are_numbered_from_one_and_come_back_whole(bus: Bus) -> None:
    writer = await bus.events.open(JOB, fresh=True)
    written = [
        await writer.append(Queued(position=2, eta_seconds=1.5)),
        await writer.append(STARTED),
        await writer.append(StageFinished(stage=Stage.TEXT_ENCODED)),
        await writer.append(step(1)),
        await writer.append(SampleFinished(sample=0, seed=7, image=IMAGE, nsfw=True)),
        await writer.append(Failed(reason="OUT_OF_MEMORY", message="too large", retryable=True)),
    ]
    assert [envelope.sequence for envelope in written] == [1, 2, 3, 4, 5, 6]
    async with bus.events.watch(JOB) as events:
        assert [await anext(events) for _ in written] == written


async def test_the_last_number_is_read_without_taking_the_log_over(bus: Bus) -> None:
    assert await bus.events.last_sequence(JOB) == 0
    writer = await bus.events.open(JOB, fresh=True)
    for number, event in enumerate((STARTED, step(1), preview(1), Succeeded()), start=1):
        await writer.append(event)
        assert await bus.events.last_sequence(JOB) == number
    assert await bus.events.last_sequence(JOB + 1) == 0


async def test_a_watch_sees_what_is_written_after_it_was_entered(open_bus: OpenBus) -> None:
    async with open_bus() as worker, open_bus() as api:
        writer = await worker.events.open(JOB, fresh=True)
        await writer.append(Queued())
        async with api.events.watch(JOB) as events:
            assert await take(events, 1) == [(1, Queued())]
            await writer.append(STARTED)
            await writer.append(step(1))
            assert await take(events, 2) == [(2, STARTED), (3, step(1))]


async def test_a_watch_may_begin_before_the_first_event(open_bus: OpenBus) -> None:
    async with open_bus() as worker, open_bus() as api, api.events.watch(JOB) as events:
        writer = await worker.events.open(JOB)
        assert (writer.sequence, writer.ended) == (0, False)
        await writer.append(Queued())
        assert await take(events, 1) == [(1, Queued())]


async def test_a_watch_goes_on_after_it_was_interrupted(bus: Bus) -> None:
    writer = await bus.events.open(JOB, fresh=True)
    async with bus.events.watch(JOB) as events:
        waiting = asyncio.ensure_future(anext(events))
        await asyncio.wait([waiting], timeout=0.05)
        waiting.cancel()
        await asyncio.wait([waiting])
        await writer.append(Queued())
        assert await take(events, 1) == [(1, Queued())]


async def test_a_watch_resumes_behind_the_last_event_seen(bus: Bus) -> None:
    writer = await bus.events.open(JOB, fresh=True)
    for number in range(1, 5):
        await writer.append(step(number))
    await writer.append(Succeeded())
    assert await replay(bus, after=3) == [(4, step(4)), (5, Succeeded())]


async def test_every_watcher_gets_every_event(open_bus: OpenBus) -> None:
    async with open_bus() as worker, open_bus() as api:
        writer = await worker.events.open(JOB, fresh=True)
        watching = [asyncio.create_task(replay(api)) for _ in range(5)]
        for number in range(1, 30):
            await writer.append(step(number))
        await writer.append(Cancelled())
        expected = [(n, step(n)) for n in range(1, 30)] + [(30, Cancelled())]
        assert await asyncio.gather(*watching) == [expected] * 5


async def test_logs_of_other_jobs_are_not_seen(bus: Bus) -> None:
    other = await bus.events.open(JOB * 10, fresh=True)
    await other.append(Queued())
    writer = await bus.events.open(JOB)
    assert writer.sequence == 0
    await writer.append(Succeeded())
    assert await replay(bus) == [(1, Succeeded())]


async def test_a_preview_replaces_the_one_before_of_its_sample(bus: Bus) -> None:
    writer = await bus.events.open(JOB, fresh=True)
    for event in (preview(1), preview(1, sample=1), step(1), preview(2), step(2), preview(3)):
        await writer.append(event)
    await writer.append(Succeeded())
    assert await replay(bus) == [
        (2, preview(1, sample=1)),
        (3, step(1)),
        (5, step(2)),
        (6, preview(3)),
        (7, Succeeded()),
    ]


async def test_previews_reach_a_live_watcher_in_order(open_bus: OpenBus) -> None:
    async with open_bus() as worker, open_bus() as api, api.events.watch(JOB) as events:
        writer = await worker.events.open(JOB, fresh=True)
        for number in (1, 2):
            await writer.append(step(number))
            await writer.append(preview(number))
            assert await take(events, 2) == [
                (2 * number - 1, step(number)),
                (2 * number, preview(number)),
            ]


@pytest.mark.parametrize("last", [step(1), preview(1), Succeeded()])
async def test_a_second_writer_goes_on_where_the_first_ended(bus: Bus, last: Event) -> None:
    first = await bus.events.open(JOB, fresh=True)
    await first.append(STARTED)
    await first.append(last)
    second = await bus.events.open(JOB)
    assert (second.sequence, second.ended) == (2, isinstance(last, Succeeded))
    assert (await second.append(Queued(requeue_reason="worker lost"))).sequence == 3


@pytest.mark.parametrize("event", [step(2), preview(2), Succeeded()])
async def test_a_writer_that_was_overtaken_cannot_write(open_bus: OpenBus, event: Event) -> None:
    async with open_bus() as one, open_bus() as two:
        slow = await one.events.open(JOB, fresh=True)
        await slow.append(step(1))
        successor = await two.events.open(JOB)
        await successor.append(STARTED)
        with pytest.raises(OwnershipLostError):
            await slow.append(event)
        await successor.append(Succeeded())
        assert await replay(one) == [(1, step(1)), (2, STARTED), (3, Succeeded())]


async def test_a_log_called_fresh_that_is_not_cannot_be_overwritten(bus: Bus) -> None:
    await (await bus.events.open(JOB, fresh=True)).append(Queued())
    mistaken = await bus.events.open(JOB, fresh=True)
    with pytest.raises(OwnershipLostError):
        await mistaken.append(STARTED)


async def test_appends_at_the_same_time_take_turns(bus: Bus) -> None:
    writer = await bus.events.open(JOB, fresh=True)
    envelopes = await asyncio.gather(*(writer.append(step(n)) for n in range(1, 9)))
    assert [(e.sequence, e.event) for e in envelopes] == [(n, step(n)) for n in range(1, 9)]
    assert (writer.sequence, writer.ended) == (8, False)
    await writer.append(Cancelled())
    assert (writer.sequence, writer.ended) == (9, True)


async def test_a_cancel_reaches_every_listener(open_bus: OpenBus) -> None:
    async with open_bus() as api, open_bus() as one, open_bus() as two:
        received: asyncio.Queue[tuple[str, int]] = asyncio.Queue()

        async def first(job_id: int) -> None:
            received.put_nowait(("first", job_id))

        async def second(job_id: int) -> None:
            received.put_nowait(("second", job_id))

        async with one.control.on_cancel(first):
            async with two.control.on_cancel(second):
                await api.control.cancel(JOB)
                async with asyncio.timeout(LONG):
                    got = {await received.get(), await received.get()}
                assert got == {("first", JOB), ("second", JOB)}
            await api.control.cancel(JOB + 1)
            async with asyncio.timeout(LONG):
                assert await received.get() == ("first", JOB + 1)
        assert received.empty()


async def test_an_order_reaches_every_listener(open_bus: OpenBus) -> None:
    async with open_bus() as api, open_bus() as one, open_bus() as two:
        received: asyncio.Queue[tuple[str, WorkerCommand]] = asyncio.Queue()

        async def first(order: WorkerCommand) -> None:
            received.put_nowait(("first", order))

        async def second(order: WorkerCommand) -> None:
            received.put_nowait(("second", order))

        async with one.control.on_command(first):
            async with two.control.on_command(second):
                await api.control.broadcast(WorkerCommand.RESTART)
                async with asyncio.timeout(LONG):
                    got = {await received.get(), await received.get()}
                assert got == {("first", WorkerCommand.RESTART), ("second", WorkerCommand.RESTART)}
            await api.control.broadcast(WorkerCommand.CLEAR_CACHE)
            async with asyncio.timeout(LONG):
                assert await received.get() == ("first", WorkerCommand.CLEAR_CACHE)
        assert received.empty()


async def test_a_notice_reaches_every_api_the_sender_included(open_bus: OpenBus) -> None:
    notice = StreamNotice(
        state=StreamState.BROKEN, tenant="a tenant", job_id=JOB, grace_seconds=1.5
    )
    async with open_bus() as one, open_bus() as two:
        received: asyncio.Queue[tuple[str, StreamNotice]] = asyncio.Queue()

        async def first(notice: StreamNotice) -> None:
            received.put_nowait(("first", notice))

        async def second(notice: StreamNotice) -> None:
            received.put_nowait(("second", notice))

        async with one.control.on_notice(first), two.control.on_notice(second):
            await one.control.notify(notice)
            async with asyncio.timeout(LONG):
                got = [await received.get(), await received.get()]
        assert sorted(got, key=str) == [("first", notice), ("second", notice)]
