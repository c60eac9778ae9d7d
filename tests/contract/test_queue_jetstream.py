"""Cases that need a real NATS server: outages, lost messages and messages that cannot be
decoded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from nats.js import JetStreamContext
from nats.js.api import PubAck

from img2img_server.devstack.child import Child
from img2img_server.devstack.nats import nats_server, nats_url
from img2img_server.domain.events import (
    EncodedImage,
    Envelope,
    Queued,
    SampleFinished,
    Started,
    StepFinished,
    Succeeded,
)
from img2img_server.domain.job import FIRST_JOB_ID
from img2img_server.domain.models import WorkerInfo
from img2img_server.domain.params import Lane
from img2img_server.errors import QueueFullError, UnavailableError
from img2img_server.interfaces.queue import QueuedJob, WorkerCommand, slot_of
from img2img_server.interfaces.records import UnreadableError
from img2img_server.nats import codec, connection, follow, subjects
from img2img_server.nats.bus import Bus, connect_bus
from img2img_server.nats.connection import NatsConnection, connect
from img2img_server.nats.faults import WrongLastSequenceError
from img2img_server.nats.kv import Bucket, KvEntry
from img2img_server.ports import free_ports
from img2img_server.settings import Settings
from img2img_server.testing.fake_engine import FAKE_MODEL

MODEL = "atelier"
JOB = 10_000_001
LONG = 60.0
PASSWORD = "of-this-test"


class Nats:
    """A nats-server of one test. After a restart it has the same address and the same data."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._port = free_ports(1)[0]
        self.settings = Settings(nats_url=nats_url(self._port, PASSWORD), queue_limit=3)
        self._server: Child | None = None

    async def start(self) -> None:
        self._server = nats_server(self._folder, self._port, PASSWORD)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop()


@pytest.fixture
async def nats(tmp_path: Path) -> AsyncIterator[Nats]:
    server = Nats(tmp_path)
    await server.start()
    yield server
    await server.stop()


@asynccontextmanager
async def raw(settings: Settings) -> AsyncIterator[NatsConnection]:
    """Yields a second connection to NATS."""
    async with connect([settings.nats_url.get_secret_value()]) as link:
        yield link


def a_job(job_id: int = JOB) -> QueuedJob:
    return QueuedJob(job_id=job_id, tenant="acme", init_image=b"image")


def step(number: int) -> StepFinished:
    return StepFinished(sample=0, step=number, total=9, sigma=1.0)


async def test_without_a_server_nothing_connects(tmp_path: Path) -> None:
    settings = Nats(tmp_path).settings.model_copy(update={"startup_timeout_seconds": 0.3})
    with pytest.raises(UnavailableError, match="no connection"):
        async with connect_bus(settings):
            pass


async def test_while_the_server_is_away_calls_fail_quickly_and_work_again_later(
    monkeypatch: pytest.MonkeyPatch, nats: Nats
) -> None:
    monkeypatch.setattr(connection, "REQUEST_SECONDS", 1.0)
    async with connect_bus(nats.settings) as bus:
        writer = await bus.events.open(JOB, fresh=True)
        drawn = await bus.jobs.next_id("acme")
        await nats.stop()
        began = time.monotonic()
        calls = await asyncio.gather(
            bus.queue.put(a_job(), MODEL, Lane.REALTIME),
            bus.queue.pull(MODEL, [Lane.REALTIME], 1, 5 * LONG),
            bus.queue.depth(MODEL, Lane.REALTIME),
            bus.queue.remove(1),
            writer.append(Queued()),
            bus.jobs.next_id("acme"),
            bus.jobs.get("acme", JOB),
            bus.jobs.list_ids("acme"),
            bus.workers.workers(),
            bus.control.cancel(JOB),
            return_exceptions=True,
        )
        assert [type(call) for call in calls] == [UnavailableError] * len(calls)
        assert time.monotonic() - began < LONG
        await nats.start()
        await later(lambda: bus.queue.put(a_job(), MODEL, Lane.REALTIME))
        (delivery,) = await bus.queue.pull(MODEL, [Lane.REALTIME], 5, LONG)
        # The job is queued only once: the failed put was not sent later.
        assert delivery.job == a_job()
        assert (await writer.append(Queued())).sequence == 1
        assert await bus.jobs.next_id("acme") == drawn + 1


async def test_a_page_of_ids_costs_what_it_holds_and_not_what_there_is(
    monkeypatch: pytest.MonkeyPatch, nats: Nats
) -> None:
    read: list[int] = []
    sequences = NatsConnection.sequences

    async def counted(*arguments: Any) -> list[int]:
        found = await sequences(*arguments)
        read.append(len(found))
        return found

    monkeypatch.setattr(NatsConnection, "sequences", counted)
    async with connect_bus(nats.settings) as bus:
        tenants = ["busy"] * 8 + ["rare"]
        drawn = await asyncio.gather(*(bus.jobs.next_id(each) for each in tenants * 100))
        for tenant, at in (("busy", 8), ("rare", 9)):
            read.clear()
            mine = [job for job, owner in zip(drawn, tenants * 100, strict=True) if owner == tenant]
            assert await bus.jobs.list_ids(tenant, most=20) == sorted(mine)[: -20 - 1 : -1]
            assert (len(read) <= at, sum(read) <= 5 * 20) == (True, True), read


async def later(call: Callable[[], object]) -> None:
    """Repeats a call until NATS responds again."""
    async with asyncio.timeout(LONG):
        while True:
            try:
                return await call()  # type: ignore[misc]
            except UnavailableError:
                await asyncio.sleep(0.05)


async def test_a_watch_goes_on_through_a_restart_without_gap_or_duplicate(nats: Nats) -> None:
    async with (
        connect_bus(nats.settings) as worker,
        connect_bus(nats.settings) as api,
        api.events.watch(JOB) as events,
    ):
        writer = await worker.events.open(JOB, fresh=True)
        await writer.append(step(1))
        assert (await anext(events)).event == step(1)
        await nats.stop()
        await nats.start()
        for number in (2, 3):
            await writer.append(step(number))
        async with asyncio.timeout(LONG):
            assert [(await anext(events)).event for _ in range(2)] == [step(2), step(3)]


async def test_a_waiting_pull_gets_a_job_after_the_connection_came_back(nats: Nats) -> None:
    async with connect_bus(nats.settings) as bus, asyncio.TaskGroup() as tasks:
        pulling = tasks.create_task(bus.queue.pull(MODEL, [Lane.REALTIME], 1, 60.0))
        assert await bus.queue.pull(MODEL, [Lane.REALTIME], 1, 0.05) == []
        await nats.stop()
        await nats.start()
        async with asyncio.timeout(LONG):
            await later(lambda: bus.queue.put(a_job(), MODEL, Lane.REALTIME))
            (delivery,) = await pulling
        assert delivery.job == a_job()


async def test_a_watch_goes_on_although_its_notices_are_lost(nats: Nats) -> None:
    async with (
        raw(nats.settings) as link,
        connect_bus(nats.settings) as bus,
        bus.events.watch(JOB) as events,
    ):
        info = await link.js.stream_info(subjects.EVENTS)
        await link.js.update_stream(info.config.evolve(republish=None))
        writer = await bus.events.open(JOB, fresh=True)
        for number in (1, 2):
            await writer.append(step(number))
            async with asyncio.timeout(LONG):
                assert (await anext(events)).event == step(number)


async def test_a_watch_creates_no_consumer_and_leaves_no_subscription(nats: Nats) -> None:
    async with raw(nats.settings) as link, connect_bus(nats.settings) as bus:
        subscriptions = bus.events._link.nc._subs  # type: ignore[attr-defined]
        async with bus.events.watch(JOB) as events:
            await (await bus.events.open(JOB, fresh=True)).append(step(1))
            assert (await anext(events)).event == step(1)
            opened = set(subscriptions)
        before = len(opened)
        for _ in range(3):
            async with bus.events.watch(JOB), bus.events.watch(JOB):
                assert len(subscriptions) == before
        assert len(subscriptions) == before - 1
        assert await link.js.consumers_info(subjects.EVENTS) == []


async def test_an_event_is_read_once_for_all_watchers(
    monkeypatch: pytest.MonkeyPatch, nats: Nats
) -> None:
    read: list[int] = []
    decode = codec.decode_event

    def counted(data: bytes) -> Any:
        read.append(len(data))
        return decode(data)

    monkeypatch.setattr(codec, "decode_event", counted)
    async with connect_bus(nats.settings) as bus, AsyncExitStack() as stack:
        watches = [await stack.enter_async_context(bus.events.watch(JOB)) for _ in range(20)]
        writer = await bus.events.open(JOB, fresh=True)
        for number in range(1, 11):
            await writer.append(step(number))
        for events in watches:
            async with asyncio.timeout(LONG):
                seen = [(await anext(events)).event for _ in range(10)]
            assert seen == [step(number) for number in range(1, 11)]
        assert len(read) == 10


async def test_events_of_a_later_version_are_skipped(nats: Nats) -> None:
    async with connect_bus(nats.settings) as bus, raw(nats.settings) as link:
        writer = await bus.events.open(JOB, fresh=True)
        await writer.append(Queued())
        # {"sequence": 2, "time": 0.0, "job_id": 1, "type": "Paused", "event": {}}
        stranger = (
            b"\x85\xa8sequence\x02\xa4time\xcb" + bytes(8) + b"\xa6job_id\x01"
            b"\xa4type\xa6Paused\xa5event\x80"
        )
        await link.publish(subjects.log_subject(JOB), stranger)
        successor = await bus.events.open(JOB)
        assert successor.sequence == 2
        await successor.append(Succeeded())
        async with bus.events.watch(JOB) as events:
            assert [(await anext(events)).sequence for _ in range(2)] == [1, 3]


async def test_a_dead_letter_keeps_the_job_without_its_image_and_says_why(nats: Nats) -> None:
    async with connect_bus(nats.settings) as bus, raw(nats.settings) as link:
        await bus.queue.put(a_job(), MODEL, Lane.REALTIME)
        (delivery,) = await bus.queue.pull(MODEL, [Lane.REALTIME], 1, LONG)
        await delivery.term("given up\nafter 5 attempts")
        dead = await link.last(subjects.DEAD, "img2img.dead.>")
        assert dead is not None
        assert dead.subject == "img2img.dead.atelier.realtime.0.62.acme"
        assert codec.decode(dead.data or b"", QueuedJob) == replace(a_job(), init_image=b"")
        assert dead.headers is not None
        assert dead.headers["Img2img-Reason"] == "given up after 5 attempts"


async def test_a_record_that_cannot_be_read_says_so(nats: Nats) -> None:
    async with connect_bus(nats.settings) as bus, raw(nats.settings) as link:
        subject = subjects.key_subject(subjects.RECORDS_BUCKET, f"{subjects.token('acme')}.{JOB}")
        await link.publish(subject, b"\xc1 no MessagePack")
        with pytest.raises(UnreadableError, match=f"jobs/{JOB}: not a Job"):
            await bus.jobs.get("acme", JOB)


async def test_a_job_that_cannot_be_read_goes_to_the_dead_letters_and_the_others_run(
    nats: Nats,
) -> None:
    async with connect_bus(nats.settings) as bus, raw(nats.settings) as link:
        await link.publish("img2img.jobs.atelier.realtime.acme", b"\xc1 no MessagePack, a picture")
        await bus.queue.put(a_job(), MODEL, Lane.REALTIME)
        deliveries = []
        while not deliveries:
            deliveries = await bus.queue.pull(MODEL, [Lane.REALTIME], 1, LONG)
        assert deliveries[0].job == a_job()
        dead = await link.last(subjects.DEAD, "img2img.dead.>")
        assert dead is not None
        assert not dead.data
        assert dead.headers is not None
        assert "not a QueuedJob" in dead.headers["Img2img-Reason"]


async def test_a_lost_consumer_is_created_again(nats: Nats) -> None:
    async with connect_bus(nats.settings) as bus, raw(nats.settings) as link:
        await bus.queue.put(a_job(), MODEL, Lane.REALTIME)
        (delivery,) = await bus.queue.pull(MODEL, [Lane.REALTIME], 1, LONG)
        await delivery.ack()
        source = (Lane.REALTIME, 0, slot_of("acme"))
        await link.js.delete_consumer(subjects.JOBS, subjects.source_consumer(MODEL, *source))
        await bus.queue.put(a_job(JOB + 1), MODEL, Lane.REALTIME)
        with pytest.raises(UnavailableError):
            await bus.queue.pull(MODEL, [Lane.REALTIME], 1, 0.05)
        assert len(await bus.queue.pull(MODEL, [Lane.REALTIME], 1, LONG)) == 1


async def test_a_changed_limit_holds_from_the_next_connection_on(nats: Nats) -> None:
    async with connect_bus(nats.settings.model_copy(update={"queue_limit": 3})) as bus:
        for number in range(3):
            await bus.permits.take("acme", JOB + number)
            await bus.queue.put(a_job(JOB + number), MODEL, Lane.REALTIME)
    async with connect_bus(nats.settings.model_copy(update={"queue_limit": 1})) as bus:
        with pytest.raises(QueueFullError):
            await bus.permits.take("acme", JOB + 3)
        assert await bus.queue.unfinished("acme") == 3  # No queued job is lost.
    async with connect_bus(nats.settings.model_copy(update={"queue_limit": 9})) as bus:
        await bus.permits.take("acme", JOB + 3)


class LostAnswers:
    """Loses the first `count` replies to published messages. `tries`: number of published messages.
    `stored`: whether the messages themselves are stored.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int, *, stored: bool = True) -> None:
        self.tries = 0
        publish = JetStreamContext.publish

        async def lossy(*args: Any, **kwargs: Any) -> PubAck:
            self.tries += 1
            lost = self.tries <= count
            if lost and not stored:
                raise TimeoutError
            answer = await publish(*args, **kwargs)
            if lost:
                raise TimeoutError
            return answer

        monkeypatch.setattr(JetStreamContext, "publish", lossy)


async def test_an_append_whose_answer_was_lost_is_stored_once(
    monkeypatch: pytest.MonkeyPatch, nats: Nats
) -> None:
    async with connect_bus(nats.settings) as bus:
        writer = await bus.events.open(JOB, fresh=True)
        lost = LostAnswers(monkeypatch, 1)
        await writer.append(Queued())
        await writer.append(Started(worker="w", model=MODEL, attempt=1))
        assert lost.tries == 3
        async with bus.events.watch(JOB) as events:
            assert [(await anext(events)).sequence for _ in range(2)] == [1, 2]


async def test_a_swap_whose_answer_was_lost_is_known_by_the_next_try(
    monkeypatch: pytest.MonkeyPatch, nats: Nats
) -> None:
    async with connect_bus(nats.settings), raw(nats.settings) as link:
        bucket, lost = Bucket(link, subjects.RECORDS_BUCKET), LostAnswers(monkeypatch, 1)
        revision = await bucket.swap("a.1", b"one", 0)
        assert await bucket.get("a.1") == KvEntry(b"one", revision)
        assert lost.tries == 2


async def test_a_swap_that_was_answered_is_not_taken_for_a_strangers_equal_one(nats: Nats) -> None:
    async with connect_bus(nats.settings), raw(nats.settings) as link:
        bucket = Bucket(link, subjects.RECORDS_BUCKET)
        await bucket.swap("a.1", b"one", 0)
        with pytest.raises(WrongLastSequenceError):
            await bucket.swap("a.1", b"one", 0)


async def test_a_swap_that_is_never_answered_ends_in_time(
    monkeypatch: pytest.MonkeyPatch, nats: Nats
) -> None:
    async with connect_bus(nats.settings), raw(nats.settings) as link:
        lost = LostAnswers(monkeypatch, 99, stored=False)
        monkeypatch.setattr(connection, "ELECTION_SECONDS", 0.5)
        with pytest.raises(UnavailableError):
            await Bucket(link, subjects.RECORDS_BUCKET).swap("a.1", b"one", 0)
        assert 1 < lost.tries < 9


async def test_a_writer_whose_log_has_expired_goes_on(nats: Nats) -> None:
    async with connect_bus(nats.settings) as bus, raw(nats.settings) as link:
        writer = await bus.events.open(JOB, fresh=True)
        await writer.append(Queued())
        await link.js.purge_stream(subjects.EVENTS)
        assert (await writer.append(Succeeded())).sequence == 2


async def ack_all(bus: Bus) -> list[int]:
    taken = []
    for delivery in await bus.queue.pull(MODEL, [Lane.REALTIME], 9, LONG):
        await delivery.ack()
        taken.append(delivery.job.job_id)
    return taken


async def test_queued_jobs_and_records_survive_a_restart(nats: Nats) -> None:
    async with connect_bus(nats.settings) as bus:
        await bus.queue.put(a_job(), MODEL, Lane.REALTIME)
        assert await bus.jobs.claim_request("acme", "r", "print", JOB) == ("print", JOB)
    await nats.stop()
    await nats.start()
    async with connect_bus(nats.settings) as bus:
        assert await ack_all(bus) == [JOB]
        assert await bus.jobs.claim_request("acme", "r", "other", 2) == ("print", JOB)


async def test_a_slow_watcher_reads_again_what_is_no_longer_kept(
    monkeypatch: pytest.MonkeyPatch, nats: Nats
) -> None:
    monkeypatch.setattr(follow, "KEPT_BYTES", 500)
    async with (
        connect_bus(nats.settings) as bus,
        bus.events.watch(JOB) as slow,
        bus.events.watch(JOB) as fast,
    ):
        followers = bus.events._followers  # type: ignore[attr-defined]
        writer = await bus.events.open(JOB, fresh=True)
        for number in range(1, 31):
            await writer.append(step(number))
            async with asyncio.timeout(LONG):
                assert (await anext(fast)).event == step(number)
                assert followers._kept_bytes <= 500
        async with asyncio.timeout(LONG):
            seen = [(await anext(slow)).event for _ in range(4)]
            await writer.append(step(31))
            seen += [(await anext(slow)).event for _ in range(27)]
        assert seen == [step(number) for number in range(1, 32)]


async def test_events_that_are_being_sent_take_only_a_share_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, nats: Nats
) -> None:
    size = 100_000
    monkeypatch.setattr(follow, "SENDING_BYTES", 8 * size)
    monkeypatch.setattr(follow, "KEPT_BYTES", 3 * size)
    image = EncodedImage(
        data=b"x" * size, media_type="image/png", sha256="a" * 64, width=8, height=8
    )
    async with connect_bus(nats.settings) as bus, AsyncExitStack() as stack:
        writer = await bus.events.open(JOB, fresh=True)
        for _ in range(4):
            await writer.append(SampleFinished(sample=0, seed=1, image=image))

        async def watch(tenant: str) -> AsyncIterator[Envelope]:
            return await stack.enter_async_context(bus.events.watch(JOB, tenant=tenant))

        stuck = [asyncio.ensure_future(anext(await watch("alpha"))) for _ in range(12)]
        sending = bus.events._followers.sending  # type: ignore[attr-defined]
        async with asyncio.timeout(LONG):
            for completed in islice(asyncio.as_completed(stuck), 3):
                await completed
            innocent = await watch("beta")
            assert [(await anext(innocent)).sequence for _ in range(4)] == [1, 2, 3, 4]
        assert sending.held < 8 * size
        assert sum(task.done() for task in stuck) <= 4
        for task in stuck:
            task.cancel()
        await asyncio.gather(*stuck, return_exceptions=True)
    assert sending.held == 0


async def test_pulls_cancelled_at_any_moment_leave_their_jobs_to_others(nats: Nats) -> None:
    # ack_wait is 15 s in this test, so a job that was lost together with its pull would not be
    # redelivered in time.
    async with connect_bus(nats.settings) as api, connect_bus(nats.settings) as worker:
        for turn in range(90):
            job = a_job(JOB + turn)
            pulling = asyncio.create_task(worker.queue.pull(MODEL, list(Lane), 4, LONG))
            putting = asyncio.create_task(api.queue.put(job, MODEL, Lane.REALTIME))
            for _ in range(turn % 45):
                await asyncio.sleep(0)
            pulling.cancel()
            await putting
            pulling.cancel()  # The caller is cancelled once more, during the cleanup.
            (got,) = await asyncio.gather(pulling, return_exceptions=True)
            async with asyncio.timeout(LONG):
                while not isinstance(got, list) or not got:
                    got = await worker.queue.pull(MODEL, list(Lane), 4, 1.0)
            assert [delivery.job for delivery in got] == [job]
            await got[0].ack()


async def test_a_connection_closes_although_the_server_is_away(nats: Nats) -> None:
    async with asyncio.timeout(LONG):
        async with connect_bus(nats.settings) as bus, bus.events.watch(JOB):
            await nats.stop()


async def test_more_keys_are_listed_than_the_server_returns_at_once(nats: Nats) -> None:
    most_at_once, tenants = 100_000, ("acme", "busy")
    async with connect_bus(nats.settings), raw(nats.settings) as link:
        bucket = Bucket(link, subjects.RECORDS_BUCKET)
        ids = range(JOB, JOB + most_at_once + 1)
        for tenant, its in zip(tenants, (range(JOB, JOB + 2), ids), strict=True):
            for job_id in its:
                await link.nc.publish(
                    subjects.key_subject(subjects.RECORDS_BUCKET, f"{tenant}.{job_id}")
                )
        # The response comes once all messages before it are stored.
        await bucket.put("busy.last", b"")
        assert set(await bucket.keys("busy.*")) == {*(f"busy.{n}" for n in ids), "busy.last"}
        assert set(await bucket.keys("acme.*")) == {f"acme.{JOB}", f"acme.{JOB + 1}"}
        assert await bucket.keys("nobody.*") == []


async def test_the_ids_of_an_older_version_stay_drawn(nats: Nats) -> None:
    async with raw(nats.settings) as link:
        await link.js.add_stream(name="IDS", subjects=["img2img.ids"], max_msgs=1)
        for _ in range(3):
            await link.js.publish("img2img.ids", b"")
        async with connect_bus(nats.settings) as bus:
            drawn = [await bus.jobs.next_id("acme") for _ in range(2)]
            # An api of the older version still draws ids.
            await link.js.publish("img2img.ids", b"")
            drawn.append(await bus.jobs.next_id("acme"))
            assert drawn == [FIRST_JOB_ID + 3, FIRST_JOB_ID + 4, FIRST_JOB_ID + 6]
            assert await bus.jobs.list_ids("acme") == drawn[::-1]


async def test_everything_has_its_bounds(nats: Nats) -> None:
    settings = nats.settings.model_copy(
        update={"retention_hours": 2, "events_retention_seconds": 90.0, "events_max_bytes": 2**21}
    )
    async with connect_bus(settings), raw(settings) as link:
        infos = await link.js.streams_info()
    hour = 3600.0
    assert {info.config.name: (info.config.max_age, info.config.max_bytes) for info in infos} == {
        "JOBS": (2.5 * hour, -1),
        "EVENTS": (3 * hour + 90.0, 2**21),
        "EVENT_USE": (3 * hour + 90.0, -1),
        "DEAD": (7 * 24 * hour, 2**28),
        "WEBHOOKS": (24 * hour, -1),
        "IDS": (5 * hour, -1),
        "PERMITS": (3 * hour, -1),
        "STATES": (hour, -1),
        "KV_img2img-jobs": (3 * hour, -1),
        "KV_img2img-rates": (120.0, -1),
        "KV_img2img-requests": (2 * hour, -1),
        "KV_img2img-usage": (63 * 24 * hour, -1),
        "KV_img2img-uploads": (48 * hour, -1),
        "KV_img2img-workers": (20.0, -1),
        "KV_img2img-models": (7 * 24 * hour, -1),
        "KV_img2img-storage": (0.0, -1),
        "KV_img2img-storage-retired": (3 * hour, -1),
    }


async def test_an_announcement_that_cannot_be_read_hides_no_other(nats: Nats) -> None:
    worker = WorkerInfo(name="w", model=FAKE_MODEL, device="cpu")
    async with connect_bus(nats.settings) as bus, raw(nats.settings) as link:
        await bus.workers.announce(worker)
        for bucket in (subjects.MODELS_BUCKET, subjects.WORKERS_BUCKET):
            await link.publish(
                subjects.key_subject(bucket, subjects.token("odd")), b"of a far version"
            )
        assert await bus.workers.models() == [FAKE_MODEL]
        assert await bus.workers.workers() == [worker]
        assert await bus.workers.model("odd") is None


async def test_a_command_of_a_later_version_is_ignored_and_the_next_one_is_handled(
    nats: Nats,
) -> None:
    received: asyncio.Queue[WorkerCommand] = asyncio.Queue()
    url = nats.settings.nats_url.get_secret_value()
    async with connect_bus(nats.settings) as bus, connect([url]) as link:
        async with bus.control.on_command(received.put):
            await link.send(subjects.COMMAND_SUBJECT, codec.encode("fly"))
            await link.send(subjects.COMMAND_SUBJECT, b"\xc1 not a message")
            await bus.control.broadcast(WorkerCommand.CLEAR_CACHE)
            assert await asyncio.wait_for(received.get(), LONG) is WorkerCommand.CLEAR_CACHE
        assert received.empty()
