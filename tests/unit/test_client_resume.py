"""The decisions about retries, without connections."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2img.v1 import event_pb2, job_pb2, service_pb2
from img2img_client.errors import UnavailableError
from img2img_client.resume import Backoff, Follow, Retry
from tests.fake_job import NAME, events

LOG = events(samples=2)
LOST = UnavailableError("lost", code="UNAVAILABLE")
RETRY = Retry(
    connect_seconds=1.0, resume_seconds=10.0, first_delay_seconds=0.5, longest_delay_seconds=4.0
)
LONG_RETRY = Retry(connect_seconds=1e6)


class Longest(random.Random):
    """A random generator that returns the upper limit, so that delays are known."""

    def uniform(self, a: float, b: float) -> float:
        return b


def snapshot(sequence: int) -> service_pb2.event_pb2.JobEvent:  # type: ignore[name-defined]
    message = type(LOG[0])(sequence=sequence, job=NAME)
    message.snapshot.job.name = NAME
    return message


@given(data=st.data())
def test_every_event_is_seen_once_however_streams_break_and_overlap(data: st.DataObject) -> None:
    follow = Follow(
        service_pb2.GenerateRequest(request_id="7f1c"), LONG_RETRY, draw=random.Random(0)
    )
    seen, now, generated = [], 0.0, 0
    for _ in range(20):
        request = follow.next_request()
        if isinstance(request, service_pb2.GenerateRequest):
            generated += 1
            assert request.request_id == "7f1c"
            after = 0
        else:
            # A server may repeat events that the client has received.
            after = data.draw(st.integers(0, request.after_sequence), label="replayed after")
        messages = [snapshot(after), *(event for event in LOG if event.sequence > after)]
        upto = data.draw(st.integers(0, len(messages)), label="messages before the break")
        seen += [event for message in messages[:upto] if (event := follow.take(message))]
        if follow.finished:
            break
        now += follow.delay_after(LOST, now) + 0.01
    else:
        return  # The stream broke in every round, so there is no result to check.
    assert [event.sequence for event in seen] == [0, *(event.sequence for event in LOG)]
    assert follow.job is not None
    assert [image.seed for image in follow.result().images] == [7, 8]


def test_delays_grow_to_a_bound_and_are_reset_by_a_new_event() -> None:
    backoff = Backoff(RETRY, draw=Longest())
    backoff.connected(new_event=True)
    assert [backoff.delay(LOST, 0.0) for _ in range(5)] == [0.5, 1.0, 2.0, 4.0, 4.0]
    backoff.connected(new_event=False)
    # A message without a new event does not reset the delay.
    assert backoff.delay(LOST, 0.0) == 4.0
    backoff.connected(new_event=True)
    assert backoff.delay(LOST, 0.0) == 0.5


def seconds_of_retries(error: UnavailableError) -> float:
    """Returns for how long a call that fails at once each time is retried by default."""
    backoff, now = Backoff(Retry(), draw=Longest()), 0.0
    with suppress(UnavailableError):
        while True:
            now += backoff.delay(error, now)
    return now


def test_a_call_is_retried_through_an_outage_of_the_services_nats() -> None:
    away = UnavailableError("away", code="UNAVAILABLE", reason="UNAVAILABLE", retry_seconds=1.0)
    assert seconds_of_retries(away) > 30.0
    for reason in ("TRANSPORT", "NO_MODEL"):
        other = UnavailableError("other", code="UNAVAILABLE", reason=reason, retry_seconds=1.0)
        assert seconds_of_retries(other) <= 5.0


def test_a_first_call_is_retried_for_less_time_than_a_stream() -> None:
    first = Backoff(RETRY, draw=Longest())
    assert first.delay(LOST, 100.0) == 0.5
    with pytest.raises(UnavailableError, match="lost"):
        first.delay(LOST, 100.6)
    begun = Backoff(RETRY, draw=Longest())
    begun.connected(new_event=True)
    assert begun.delay(LOST, 100.0) == 0.5
    assert begun.delay(LOST, 105.0) == 1.0
    with pytest.raises(UnavailableError, match="lost"):
        begun.delay(LOST, 109.0)


def test_a_delay_is_never_shorter_than_the_service_asks_for() -> None:
    backoff = Backoff(RETRY, draw=Longest())
    backoff.connected(new_event=True)
    assert backoff.delay(UnavailableError("full", retry_seconds=3.0), 0.0) == 3.0


def test_no_delay_exceeds_the_deadline() -> None:
    backoff = Backoff(RETRY, deadline=0.4, draw=Longest())
    with pytest.raises(UnavailableError):
        backoff.delay(LOST, 0.0)


@given(st.integers(0, 30))
def test_delays_are_drawn_between_0_and_the_bound(seed: int) -> None:
    backoff = Backoff(RETRY, draw=random.Random(seed))
    backoff.connected(new_event=True)
    pauses = [backoff.delay(LOST, 0.0) for _ in range(4)]
    bounds = [0.5, 1.0, 2.0, 4.0]
    assert all(0.0 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))


def test_a_stream_that_ends_with_an_ended_job_is_finished_without_its_events() -> None:
    follow = Follow(service_pb2.WatchJobRequest(name=NAME), RETRY)
    message = snapshot(0)
    message.snapshot.job.CopyFrom(LOG[-1].succeeded.job)
    follow.take(message)
    assert follow.delay_after_end(0.0) == 0.0
    assert follow.finished
    assert follow.result().job.id == 10000001


def test_a_new_kind_of_event_is_skipped_and_counted() -> None:
    follow = Follow(service_pb2.WatchJobRequest(name=NAME), RETRY)
    assert follow.take(type(LOG[0])(sequence=3, job=NAME)) is None
    assert follow.next_request() == service_pb2.WatchJobRequest(name=NAME, after_sequence=3)


def test_leaving_cancels_only_the_job_of_a_generate_call_that_is_not_detached() -> None:
    for first, expected in [
        (service_pb2.GenerateRequest(), True),
        (service_pb2.GenerateRequest(detach=True), False),
        (service_pb2.WatchJobRequest(name=NAME), False),
    ]:
        follow = Follow(first, RETRY)
        follow.take(snapshot(0))
        assert follow.is_ours is expected
        follow.take(LOG[-1])
        assert not follow.is_ours


def test_a_heartbeat_is_not_an_event_and_changes_nothing() -> None:
    follow = Follow(service_pb2.GenerateRequest(request_id="7f1c"), RETRY)
    heartbeat = type(LOG[0])()
    heartbeat.heartbeat.SetInParent()
    assert follow.take(heartbeat) is None  # The call broke before the job had a name.
    assert follow.next_request() == service_pb2.GenerateRequest(request_id="7f1c")
    for message in (snapshot(0), *LOG[:2]):
        follow.take(message)
    heartbeat.sequence, heartbeat.job = 2, NAME
    assert follow.take(heartbeat) is None
    assert follow.next_request() == service_pb2.WatchJobRequest(name=NAME, after_sequence=2)
    assert follow.take(LOG[2]) is not None


def test_a_repeated_snapshot_is_an_event_only_if_the_queued_job_waits_for_another_reason() -> None:
    follow = Follow(service_pb2.WatchJobRequest(name=NAME), RETRY)
    assert follow.take(snapshot(0)) is not None
    waiting = snapshot(0)
    waiting.snapshot.job.state = job_pb2.Job.STATE_QUEUED
    waiting.snapshot.job.warning = "No worker serves the model b now."
    assert follow.take(waiting) is not None
    assert follow.take(waiting) is None
    assert follow.job is not None
    assert follow.job.warning == "No worker serves the model b now."
    waiting.snapshot.job.state = job_pb2.Job.STATE_RUNNING
    waiting.snapshot.job.warning = ""
    assert follow.take(waiting) is None


def test_a_job_that_waits_again_for_the_same_reason_after_a_start_is_an_event() -> None:
    follow = Follow(service_pb2.WatchJobRequest(name=NAME), RETRY)
    waiting = snapshot(0)
    waiting.snapshot.job.state = job_pb2.Job.STATE_QUEUED
    waiting.snapshot.job.state_reason = "WORKER_LOST"
    started = event_pb2.JobEvent(sequence=2, job=NAME, started=event_pb2.JobStarted(attempt=1))
    messages = [waiting, waiting, started, waiting, waiting]
    found = [follow.take(message) is not None for message in messages]
    assert found == [True, False, True, True, False]
