"""The counts of `make chaos`, from the events that callers saw."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest

from benchmarks.chaos import load
from benchmarks.chaos.load import Followed
from img2img_client import convert
from img2img_client.events import Event, Queued, Started, StepFinished
from img2img_client.resources import Job, Result, result_of
from tests.fake_job import State as JobState
from tests.fake_job import events, job

START: dict[str, Any] = {"sequence": 0, "event_time": None, "job_name": "jobs/10000001"}


def started(*done_steps: int) -> Started:
    return Started(**START, worker="one", model="fake", attempt=1, done_steps=done_steps)


def stepped() -> StepFinished:
    return StepFinished(**START, sample=0, step=1, total=2, sigma=1.0)


def requeued() -> Queued:
    return Queued(**START, position=0, eta_seconds=None, requeue_reason="worker stopped")


def followed(attempt: int, *seen: Event) -> Followed:
    record = dataclasses.replace(convert.read(Job, job(JobState.STATE_SUCCEEDED)), attempt=attempt)
    found = Followed(7, 0.0, [(0.0, event) for event in seen], ended=60.0)
    found.result = Result(job=record, images=())
    return found


@pytest.mark.parametrize(
    ("seen", "attempt", "wasted"),
    [
        ([started(), stepped()], 1, 0),
        ([started(), stepped(), started(), stepped()], 2, 0),
        ([started(), stepped()], 3, 1),
        ([started(), stepped(), requeued(), started(), stepped()], 2, 0),
        ([started(), stepped(), started(), stepped()], 1, 0),
    ],
)
def test_an_attempt_that_no_worker_began_is_wasted_where_workers_are_lost(
    seen: list[Event], attempt: int, wasted: int
) -> None:
    assert load.wasted(followed(attempt, *seen), loses_workers=True) == wasted


def test_every_further_attempt_is_wasted_where_no_worker_is_lost() -> None:
    twice = followed(2, started(), stepped(), started(), stepped())
    assert load.wasted(twice, loses_workers=False) == 1


def test_jobs_that_continue_from_a_state_are_moved() -> None:
    sent = load.Load(cast("Any", None), cast("Any", None))
    sent.jobs.append(followed(1, started(), stepped(), requeued(), started(1, 1), stepped()))
    sent.begin()
    sent.jobs.append(followed(1, started(), stepped(), requeued(), started(), stepped()))
    assert sent.moved_jobs() == 0
    sent.jobs.append(sent.jobs[0])
    assert sent.moved_jobs() == 1


def test_gaps_second_ends_and_other_images_are_wrong() -> None:
    log = [convert.event_from(event) for event in events(samples=1)]
    seen = [event for event in log if event is not None]
    ended = seen[-1].job  # type: ignore[attr-defined]
    images = {event.sample: event.image for event in seen if hasattr(event, "nsfw")}  # type: ignore[attr-defined]
    good = Followed(7, 0.0, [(0.0, event) for event in seen], ended=60.0)
    good.result = result_of(ended, images)
    digests = tuple(image.sha256 for image in good.result.images)
    text = " ".join(load.faults(good, digests))
    assert "numbers" in text  # The log of the example has a gap, and no event 0.
    assert "terminal" not in text
    assert "differ" in " ".join(load.faults(good, ("00",)))
    good.events.append(good.events[-1])
    assert "terminal" in " ".join(load.faults(good, digests))
