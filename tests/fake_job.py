"""One job as protobuf: its record and its events."""

from __future__ import annotations

import hashlib
from typing import Any

from google.protobuf.duration_pb2 import Duration

from img2img.v1 import event_pb2, job_pb2

NAME = "jobs/10000001"
PNG = b"\x89PNG image of sample %d"
State = job_pb2.Job.State


def image(sample: int = 0, media_type: str = "image/png") -> job_pb2.Image:
    """Returns an image with its metadata."""
    data = PNG % sample
    return job_pb2.Image(
        data=data,
        media_type=media_type,
        size_bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        width=512,
        height=512,
    )


def job(state: State.ValueType, samples: int = 1, media_type: str = "image/png") -> job_pb2.Job:
    """Returns the record of a job in a state, as the service fills it in."""
    formats = {"image/png": 1, "image/jpeg": 2, "image/webp": 3}
    made = job_pb2.Job(
        name=NAME,
        id=10000001,
        state=state,
        spec=job_pb2.JobSpec(
            prompt="an oil painting [of] a cat",
            width=512,
            height=512,
            samples=samples,
            strength=0.5,
            seed=7,
            model="atelier",
            num_inference_steps=4,
            output_format=formats[media_type],  # type: ignore[arg-type]
        ),
        file_prefix="5e0c8a0e",
    )
    made.create_time.FromSeconds(1_770_000_000)
    if state in (State.STATE_SUCCEEDED, State.STATE_FAILED):
        made.start_time.FromSeconds(1_770_000_001)
        made.end_time.FromSeconds(1_770_000_004)
        made.worker, made.device, made.attempt = "worker-1", "cpu", 1
        made.timings.queue.FromMilliseconds(12)
        made.timings.denoise.FromMilliseconds(2500)
        made.timings.total.FromMilliseconds(3000)
        made.timings.steps = 2 * samples
    if state == State.STATE_FAILED:
        made.error.reason, made.error.message = "OUT_OF_MEMORY", "out of memory at 512x512"
    if state == State.STATE_SUCCEEDED:
        made.determinism = job_pb2.DETERMINISM_CLASS_EXACT
        made.samples.extend(
            job_pb2.Sample(
                index=index,
                seed=7 + index,
                url=f"http://127.0.0.1:8080/generations/5e0c8a0e-{index}.png",
                sha256="ab" * 32,
                size_bytes=1000,
            )
            for index in range(samples)
        )
    return made


def events(samples: int = 1, media_type: str = "image/png") -> list[event_pb2.JobEvent]:
    """Returns the events of a job that succeeds; number 5 is a preview that was replaced."""
    log = [
        event_pb2.JobEvent(queued=event_pb2.JobQueued(position=2, eta=Duration(seconds=5))),
        event_pb2.JobEvent(
            started=event_pb2.JobStarted(worker="worker-1", model="atelier", attempt=1)
        ),
        event_pb2.JobEvent(stage=event_pb2.StageFinished(stage=1)),  # type: ignore[arg-type]
        event_pb2.JobEvent(stage=event_pb2.StageFinished(stage=2)),  # type: ignore[arg-type]
    ]
    for step in (1, 2):
        log += [
            event_pb2.JobEvent(
                step=event_pb2.StepFinished(sample=index, step=step, total=2, sigma=2.0 - step)
            )
            for index in range(samples)
        ]
        preview = event_pb2.Preview(sample=0, step=step, image=image(0, "image/jpeg"))
        log.append(event_pb2.JobEvent(preview=preview))
    for index in range(samples):
        finished = event_pb2.SampleFinished(
            sample=index, seed=7 + index, image=image(index, media_type)
        )
        log.append(event_pb2.JobEvent(sample_finished=finished))
    done = job(State.STATE_SUCCEEDED, samples, media_type)
    for index, sample in enumerate(done.samples):
        stored = event_pb2.SampleStored(sample=index, url=sample.url, sha256=sample.sha256)
        log.append(event_pb2.JobEvent(sample_stored=stored))
    log.append(event_pb2.JobEvent(succeeded=event_pb2.JobSucceeded(job=done)))
    for number, event in enumerate(log, 1):
        event.sequence, event.job = number + (number > 4), NAME
    return log


def ending(**kind: Any) -> event_pb2.JobEvent:
    """Returns a terminal event with a low number, for example ending(failed=...)."""
    return event_pb2.JobEvent(sequence=2, job=NAME, **kind)
