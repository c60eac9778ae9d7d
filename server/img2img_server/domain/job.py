"""A job and its states: one transition table and one `advance`. Terminal states are final."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum

from img2img_server.domain.events import (
    TERMINAL,
    Cancelled,
    Event,
    Failed,
    Queued,
    SampleFinished,
    SampleStored,
    Started,
    StorageWaiting,
    Succeeded,
)
from img2img_server.domain.params import JobParams

_NO_STAGES = ("steps", "batch_share")  # fields of Timings that are not durations
FIRST_JOB_ID = 10_000_001
LAST_JOB_ID = 2**31 - 1
# More events than one attempt at a job can have. The numbers of a log that was removed continue
# after so many.
MOST_EVENTS_OF_AN_ATTEMPT = 100_000


class State(StrEnum):
    """The state of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_terminal(self) -> bool:
        return self in TERMINAL_STATES


class StateReason(StrEnum):
    """Why a job that has not ended does not proceed; see Job.state_reason in job.proto."""

    WAITING_FOR_STORAGE = "WAITING_FOR_STORAGE"
    WORKER_LOST = "WORKER_LOST"
    MODEL_UNSERVED = "MODEL_UNSERVED"


class Determinism(StrEnum):
    """How equal the images of a repeated request are; see DeterminismClass in job.proto."""

    UNKNOWN = "unknown"
    EXACT = "exact"
    BOUNDED = "bounded"
    CLOSE = "close"


class IllegalTransitionError(Exception):
    """The state of the job does not allow the event: another writer has the job."""

    def __init__(self, job: Job, event: Event) -> None:
        super().__init__(f"job {job.id} is {job.state}: {type(event).__name__} is not allowed")
        self.job = job
        self.event = event


@dataclass(frozen=True, slots=True, kw_only=True)
class JobFailure:
    """Why a job failed; clients branch on `reason`."""

    reason: str
    message: str
    retryable: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleResult:
    """One image of a job. `url`, `sha256` and `size_bytes` describe the file once it is stored.
    `error`: why there is none, in a job that succeeded with a part of its samples.
    """

    index: int
    seed: int
    url: str = ""
    sha256: str = ""
    size_bytes: int = 0
    nsfw: bool = False
    error: JobFailure | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds by stage; see Timings in job.proto. The first ones add up to `total`."""

    queue: float = 0.0
    held: float = 0.0
    fetch: float = 0.0
    prepare: float = 0.0
    encode: float = 0.0
    denoise: float = 0.0
    paused: float = 0.0
    decode: float = 0.0
    safety: float = 0.0
    image_encode: float = 0.0
    upload: float = 0.0
    engine: float = 0.0
    total: float = 0.0
    steps: int = 0
    batch_share: float = 0.0

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each stage, by its name."""
        names = (field.name for field in fields(self))
        return {name: getattr(self, name) for name in names if name not in _NO_STAGES}

    def __add__(self, other: Timings) -> Timings:
        return Timings(
            **{
                field.name: getattr(self, field.name) + getattr(other, field.name)
                for field in fields(self)
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspended:
    """Where the state of a suspended job is, from which another worker continues it.

    Attributes:
        key, size, sha256: Those of the state in its store (interfaces/states.py).
        state_key: Workers whose engines have this key can continue the job.
        time: Unix seconds when the job was suspended.
        done_steps: The steps that are done, for each sample; 0 for samples that are stored.
    """

    key: str
    size: int
    sha256: str
    state_key: str
    time: float
    done_steps: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The record of one request. Times are Unix seconds; 0.0 means not yet.

    Attributes:
        handed_back: Attempts that a stopping worker returned; they do not count as attempts of the
            job.
        queue_sequence: Place in the work queue, to withdraw the job and to estimate its position;
            0: not queued yet.
        permit: The permit that counts the job against the tenant's limit. Two records of one job id
            have different permits: a record may be abandoned before its job is accepted. 0: none.
        storage_version: Version of the tenant's storage settings that future_urls come from; empty:
            the service's own bucket.
        deadline_time: The time after which the caller does not wait any more; 0.0: never.
        denoising_steps: Steps that ran for each sample.
        state_reason: A StateReason, or "" if the job proceeds. A string, since later versions may
            add reasons.
        device_seconds: Time of the device that the job used.
        start_noise: Share of noise that the first step began with, 0 to 1.
        last_event: Number of the last event of the job when the record was written.
        suspended: The state from which the present attempt can continue; None: there is none.
        resumes: How often workers continued the job from a state. With `attempt`, it identifies
            the worker that has the job.
        uncounted_deliveries: Deliveries of a suspended job to workers that left it to another kind
            of worker. They do not count as failed deliveries of its message.
        own_urls: Links in the service's own bucket, used if the tenant's storage rejects the files.
    """

    id: int
    tenant: str
    params: JobParams
    file_prefix: str
    future_urls: tuple[str, ...]
    create_time: float
    original_prompt: str = ""
    state: State = State.QUEUED
    samples: tuple[SampleResult, ...] = ()
    failure: JobFailure | None = None
    timings: Timings = field(default_factory=Timings)
    start_time: float = 0.0
    end_time: float = 0.0
    worker: str = ""
    device: str = ""
    determinism: Determinism = Determinism.UNKNOWN
    attempt: int = 0
    handed_back: int = 0
    warning: str = ""
    webhook_status: str = ""
    webhook_error: str = ""
    webhook_attempts: int = 0
    cancel_requested: bool = False
    queue_sequence: int = 0
    storage_version: str = ""
    deadline_time: float = 0.0
    last_event: int = 0
    own_urls: tuple[str, ...] = ()
    denoising_steps: int = 0
    start_noise: float = 0.0
    device_seconds: float = 0.0
    state_reason: str = ""
    permit: int = 0
    suspended: Suspended | None = None
    resumes: int = 0
    uncounted_deliveries: int = 0

    @property
    def is_accepted(self) -> bool:
        """Returns whether the job was queued. A record is created before that, and nothing shows it
        until then.
        """
        touched = self.queue_sequence or self.attempt or self.handed_back
        return bool(touched) or self.state is not State.QUEUED

    @property
    def name(self) -> str:
        """Returns the resource name, "jobs/{id}"."""
        return f"jobs/{self.id}"

    def is_expired(self, retention_seconds: float, now: float) -> bool:
        """Returns whether the job ended `retention_seconds` before `now`, Unix seconds."""
        return 0.0 < self.end_time <= now - retention_seconds

    def used_number(self, last_logged: int) -> int:
        """Returns the highest number that an event of the job can have.

        Args:
            last_logged: The number of the last event in the log; 0 if the log is empty or was
                removed.
        """
        if last_logged or not self.attempt:
            return max(last_logged, self.last_event)
        # An attempt appends events without writing the record.
        return self.last_event + MOST_EVENTS_OF_AN_ATTEMPT

    def file_key(self, index: int) -> str:
        """Returns the key of one sample's file, for example "generations/{uuid}-0.png"."""
        folder = "temp" if self.params.temp else "generations"
        suffix = "base64" if self.params.base64 else "png"
        return f"{folder}/{self.file_prefix}-{index}.{suffix}"


TRANSITIONS: dict[tuple[State, type], State] = {
    (State.QUEUED, Started): State.RUNNING,
    (State.QUEUED, Failed): State.FAILED,
    (State.QUEUED, Cancelled): State.CANCELLED,
    (State.RUNNING, Started): State.RUNNING,  # The worker of the job was lost.
    (State.RUNNING, Queued): State.QUEUED,  # The worker of the job stops.
    (State.RUNNING, SampleFinished): State.RUNNING,
    (State.RUNNING, SampleStored): State.RUNNING,
    (State.RUNNING, StorageWaiting): State.RUNNING,
    (State.RUNNING, Succeeded): State.SUCCEEDED,
    (State.RUNNING, Failed): State.FAILED,
    (State.RUNNING, Cancelled): State.CANCELLED,
}
TERMINAL_STATES = frozenset(TRANSITIONS[State.RUNNING, kind] for kind in TERMINAL)


def advance(job: Job, event: Event, now: float) -> Job:
    """Returns the job after the event.

    Args:
        now: Unix seconds.

    Raises:
        IllegalTransitionError: the job's state does not allow the event.
    """
    state = TRANSITIONS.get((job.state, type(event)))
    if state is None:
        raise IllegalTransitionError(job, event)
    job = replace(job, state=state)
    if state.is_terminal or isinstance(event, Started | Queued):
        job = replace(job, state_reason="")
    if state.is_terminal:
        job = replace(job, end_time=now, timings=_ended(job, now))
    match event:
        case Started():
            return _started(job, event, now)
        case Queued():
            # A job that continues from its state stays in its attempt.
            handed_back = job.handed_back + (job.suspended is None)
            return replace(job, handed_back=handed_back, queue_sequence=0)
        case SampleFinished():
            return _with_sample(job, event.sample, seed=event.seed, nsfw=event.nsfw)
        case SampleStored():
            return _with_sample(
                job, event.sample, url=event.url, sha256=event.sha256, size_bytes=event.size_bytes
            )
        case StorageWaiting():
            return replace(job, state_reason=StateReason.WAITING_FOR_STORAGE)
        case Failed():
            failure = JobFailure(
                reason=event.reason, message=event.message, retryable=event.retryable
            )
            samples = tuple(replace(sample, error=None) for sample in job.samples)
            return replace(job, failure=failure, samples=samples)
        case _:
            return job


def _started(job: Job, event: Started, now: float) -> Job:
    pulled_time = event.pulled_time or now
    job = replace(job, worker=event.worker, samples=_samples_to_start_with(job))
    if job.suspended and event.attempt == job.attempt:
        waited = max(0.0, pulled_time - job.suspended.time)
        timings = replace(job.timings, queue=job.timings.queue + waited)
        return replace(job, timings=timings, suspended=None, resumes=job.resumes + 1)
    timings = job.timings
    if job.suspended:  # The state is lost, and so is the work of the attempt.
        timings = Timings(fetch=timings.fetch)
        job = replace(job, suspended=None, handed_back=job.handed_back + 1)
    timings = replace(timings, queue=max(0.0, pulled_time - job.create_time))
    return replace(job, start_time=now, attempt=event.attempt, timings=timings)


def with_sample_errors(job: Job, failure: JobFailure, index: int | None = None) -> Job:
    """Returns the job with the reason why a sample has no file; without `index`, every sample that
    has neither a file nor a reason.
    """
    samples = tuple(
        replace(sample, error=failure)
        if not (sample.url or sample.error) and index in (None, sample.index)
        else sample
        for sample in job.samples
    )
    return replace(job, samples=samples)


def terminal_event(job: Job) -> Event:
    """Returns the terminal event of a job that has ended."""
    if job.state is State.SUCCEEDED:
        return Succeeded()
    if job.state is State.CANCELLED:
        return Cancelled()
    assert job.failure is not None, "the job has not ended"
    failure = job.failure
    return Failed(reason=failure.reason, message=failure.message, retryable=failure.retryable)


def _ended(job: Job, now: float) -> Timings:
    # The init image was downloaded before the job was created.
    return replace(job.timings, total=max(0.0, now - job.create_time) + job.timings.fetch)


def _samples_to_start_with(job: Job) -> tuple[SampleResult, ...]:
    """Returns the samples of a new attempt: those that are stored, and fresh ones."""
    stored = {sample.index: sample for sample in job.samples if sample.url}
    seeds = map(job.params.sample_seed, range(job.params.samples))
    return tuple(stored.get(i) or SampleResult(index=i, seed=seed) for i, seed in enumerate(seeds))


def _with_sample(job: Job, index: int, **changes: object) -> Job:
    samples = list(job.samples)
    samples[index] = replace(samples[index], **changes)  # type: ignore[arg-type]
    return replace(job, samples=tuple(samples))
