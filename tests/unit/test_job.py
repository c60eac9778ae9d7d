"""The states of a job."""

import dataclasses
import itertools

import pytest

from img2img_server.domain.events import (
    Cancelled,
    EncodedImage,
    Failed,
    Queued,
    SampleFinished,
    SampleStored,
    Started,
    Succeeded,
)
from img2img_server.domain.job import (
    IllegalTransitionError,
    Job,
    JobFailure,
    SampleResult,
    State,
    Timings,
    advance,
)
from img2img_server.domain.params import JobParams

IMAGE = EncodedImage(data=b"jpeg", media_type="image/jpeg", sha256="00", width=8, height=8)
STARTED = Started(worker="w1", model="m", attempt=1)
FINISHED = SampleFinished(sample=1, seed=8, image=IMAGE, nsfw=True)
STORED = SampleStored(sample=1, url="http://x/1", sha256="ab", size_bytes=3)
FAILED = Failed(reason="OUT_OF_MEMORY", message="too large")
EVENTS = (Queued(), STARTED, FINISHED, STORED, Succeeded(), FAILED, Cancelled())


def make_job(**changes: object) -> Job:
    params = JobParams(prompt="a cat", samples=2, seed=7)
    job = Job(
        id=10_000_001,
        tenant="t",
        params=params,
        file_prefix="p",
        future_urls=("http://x/0", "http://x/1"),
        create_time=100.0,
    )
    return dataclasses.replace(job, **changes)


def test_a_job_that_goes_well_collects_its_samples_and_times() -> None:
    job = make_job()
    for now, event in ((101.0, STARTED), (102.0, FINISHED), (103.0, STORED), (104.0, Succeeded())):
        job = advance(job, event, now)
    assert job.state is State.SUCCEEDED
    assert job.samples == (
        SampleResult(index=0, seed=7),
        SampleResult(index=1, seed=8, url="http://x/1", sha256="ab", size_bytes=3, nsfw=True),
    )
    assert (job.start_time, job.end_time) == (101.0, 104.0)
    assert (job.timings.queue, job.timings.total) == (1.0, 4.0)


def test_a_job_that_was_taken_over_keeps_its_stored_samples_only() -> None:
    job = advance(advance(make_job(), STARTED, 101.0), STORED, 102.0)
    again = advance(job, Started(worker="w2", model="m", attempt=2), 110.0)
    assert (again.worker, again.attempt, again.start_time) == ("w2", 2, 110.0)
    assert [sample.url for sample in again.samples] == ["", "http://x/1"]
    assert again.timings.queue == 10.0  # The lost attempt is a part of the wait.


def test_the_wait_in_the_queue_ends_when_a_worker_pulls_the_job() -> None:
    started = Started(worker="w", model="m", attempt=1, pulled_time=100.5)
    job = advance(make_job(timings=Timings(fetch=2.0)), started, 101.0)
    ended = advance(job, Cancelled(), 103.0)
    assert (ended.timings.queue, ended.timings.total) == (0.5, 5.0)


def test_a_job_handed_back_waits_again_and_the_attempt_does_not_count() -> None:
    job = advance(advance(make_job(queue_sequence=5), STARTED, 101.0), Queued(), 102.0)
    assert (job.state, job.handed_back, job.queue_sequence) == (State.QUEUED, 1, 0)


def test_a_failed_job_says_why() -> None:
    job = advance(advance(make_job(), STARTED, 101.0), FAILED, 102.0)
    assert job.failure == JobFailure(reason="OUT_OF_MEMORY", message="too large")


@pytest.mark.parametrize(
    ("state", "event"),
    list(itertools.product([State.SUCCEEDED, State.FAILED, State.CANCELLED], EVENTS)),
    ids=lambda it: it.value if isinstance(it, State) else type(it).__name__,
)
def test_an_ended_job_takes_no_event(state: State, event: object) -> None:
    job = make_job(state=state, samples=(SampleResult(index=0, seed=7),) * 2)
    with pytest.raises(IllegalTransitionError):
        advance(job, event, 200.0)


@pytest.mark.parametrize("event", [FINISHED, STORED, Succeeded(), Queued()])
def test_a_queued_job_takes_no_result(event: object) -> None:
    with pytest.raises(IllegalTransitionError):
        advance(make_job(), event, 200.0)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({}, "generations/p-0.png"),
        ({"temp": True}, "temp/p-0.png"),
        ({"base64": True}, "generations/p-0.base64"),
        ({"temp": True, "base64": True}, "temp/p-0.base64"),
    ],
)
def test_the_file_key_follows_temp_and_base64(changes: dict[str, bool], key: str) -> None:
    job = make_job(params=JobParams(prompt="a", **changes))
    assert job.file_key(0) == key
