"""Events between the domain and protobuf; beside convert.py, which has the rest."""

from __future__ import annotations

from img2img.v1 import event_pb2, job_pb2
from img2img_server.api.convert import duration, timestamp
from img2img_server.domain import events

_STAGES = {
    events.Stage.TEXT_ENCODED: event_pb2.StageFinished.STAGE_TEXT_ENCODED,
    events.Stage.IMAGE_ENCODED: event_pb2.StageFinished.STAGE_IMAGE_ENCODED,
}


def event(envelope: events.Envelope, job: job_pb2.Job | None = None) -> event_pb2.JobEvent:
    """One entry of a log; a terminal one carries the whole job."""
    message = event_pb2.JobEvent(
        sequence=envelope.sequence,
        event_time=timestamp(envelope.time),
        job=f"jobs/{envelope.job_id}",
    )
    match envelope.event:
        case events.Queued() as it:
            message.queued.position = it.position
            message.queued.requeue_reason = it.requeue_reason
            if it.eta_seconds is not None:
                message.queued.eta.CopyFrom(duration(it.eta_seconds))
        case events.Started() as it:
            message.started.worker = it.worker
            message.started.model = it.model
            message.started.attempt = it.attempt
        case events.StageFinished() as it:
            message.stage.stage = _STAGES[it.stage]
        case events.StepFinished() as it:
            message.step.sample, message.step.step = it.sample, it.step
            message.step.total, message.step.sigma = it.total, it.sigma
        case events.Preview() as it:
            message.preview.sample, message.preview.step = it.sample, it.step
            message.preview.image.CopyFrom(_image(it.image))
        case events.SampleFinished() as it:
            finished = message.sample_finished
            finished.sample, finished.seed, finished.nsfw = it.sample, it.seed, it.nsfw
            finished.image.CopyFrom(_image(it.image))
        case events.SampleStored() as it:
            stored = message.sample_stored
            stored.sample, stored.url = it.sample, it.url
            stored.sha256, stored.size_bytes = it.sha256, it.size_bytes
        case events.Succeeded():
            message.succeeded.job.CopyFrom(job or job_pb2.Job())
        case events.Failed():
            message.failed.job.CopyFrom(job or job_pb2.Job())
        case events.Cancelled():
            message.cancelled.job.CopyFrom(job or job_pb2.Job())
    return message


def snapshot(job: job_pb2.Job, *, sequence: int, time: float) -> event_pb2.JobEvent:
    """The first message of every stream."""
    return event_pb2.JobEvent(
        sequence=sequence,
        event_time=timestamp(time),
        job=job.name,
        snapshot=event_pb2.JobSnapshot(job=job),
    )


def heartbeat(*, sequence: int, time: float, job_name: str = "") -> event_pb2.JobEvent:
    """Returns the message of a stream on which nothing happened; `job_name` once it is known."""
    return event_pb2.JobEvent(
        sequence=sequence,
        event_time=timestamp(time),
        job=job_name,
        heartbeat=event_pb2.Heartbeat(),
    )


def _image(image: events.EncodedImage) -> job_pb2.Image:
    return job_pb2.Image(
        data=image.data,
        media_type=image.media_type,
        size_bytes=len(image.data),
        sha256=image.sha256,
        width=image.width,
        height=image.height,
    )
