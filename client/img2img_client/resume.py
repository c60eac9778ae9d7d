"""Decides on retries: when, how often, and with which request.

This module does no I/O and reads no clock, so the blocking and the asyncio client share all
decisions.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from img2img.v1 import event_pb2, service_pb2
from img2img_client import convert, errors
from img2img_client.events import Ended, Event, SampleFinished, Snapshot, Started
from img2img_client.resources import Image, Job, Result, State, result_of

FirstRequest = service_pb2.GenerateRequest | service_pb2.WatchJobRequest

# The service may still count a broken stream against these limits, so such a rejection is
# temporary.
_FULL = ("TOO_MANY_WATCHERS", "TOO_MANY_CALLS")
# Codes of streams that a proxy or the transport has ended, and not the service.
_BROKEN_STREAM = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How long and how often to retry. All times in seconds.

    A call without a response is retried for `connect_seconds`. A call that the service answers with
    UNAVAILABLE, because it has lost NATS, is retried for `unavailable_seconds`. A broken stream is
    resumed for `resume_seconds` after the loss of the connection. Delays are drawn between 0 and
    `first_delay_seconds` x 2^n, at most `longest_delay_seconds` (full jitter), but are never
    shorter than the service asks for.

    The service sends a heartbeat on every stream that is silent for 15 seconds. A stream without
    any message for `silence_seconds` counts as broken; infinity turns this off. On a slow line it
    must be longer than the largest image takes to arrive.
    """

    connect_seconds: float = 5.0
    unavailable_seconds: float = 40.0
    resume_seconds: float = 60.0
    first_delay_seconds: float = 0.2
    longest_delay_seconds: float = 3.0
    silence_seconds: float = 60.0


def checked(retry: Retry | None) -> Retry:
    """Returns the given Retry or the default one. Raises InvalidArgumentTypeError."""
    if retry is not None and not isinstance(retry, Retry):
        raise errors.invalid_type("retry", "a Retry", retry)
    return retry or Retry()


class Backoff:
    """The delays between the attempts of one call. Times are monotonic seconds of the caller."""

    def __init__(
        self, retry: Retry, deadline: float = math.inf, draw: random.Random | None = None
    ) -> None:
        self._retry = retry
        self._deadline = deadline
        self._draw = draw or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._budget_seconds = retry.connect_seconds
        self._attempts = 0
        self._failing_since: float | None = None

    def connected(self, *, new_event: bool) -> None:
        """Records that a message arrived.

        Only a new event resets the delay: a server that breaks every stream after its first message
        must not be called in a tight loop.
        """
        self._budget_seconds = self._retry.resume_seconds
        self._failing_since = None
        if new_event:
            self._attempts = 0

    def delay(self, error: errors.RpcError, now: float, *, of_stream: bool = False) -> float:
        """Returns the seconds to wait before the next attempt.

        Raises:
            RpcError: `error` itself, when a retry does not help or no time is left for one.
        """
        is_temporary = isinstance(error, errors.UnavailableError) or error.reason in _FULL
        is_broken = error.reason == errors.TRANSPORT and error.code in _BROKEN_STREAM
        if not (is_temporary or (of_stream and is_broken)):
            raise error
        self._failing_since = now if self._failing_since is None else self._failing_since
        longest = min(
            self._retry.first_delay_seconds * 2.0**self._attempts,
            self._retry.longest_delay_seconds,
        )
        self._attempts += 1
        delay = max(self._draw.uniform(0.0, longest), error.retry_seconds or 0.0)
        budget = self._budget_seconds
        if error.reason == errors.UNAVAILABLE:
            budget = max(budget, self._retry.unavailable_seconds)
        if now + delay > min(self._failing_since + budget, self._deadline):
            raise error
        return delay


class Follow:
    """Decides which call comes next, so that every event of one job is seen exactly once.

    The first event contains the job's name. Before it, Generate is repeated with its request_id,
    which returns the same job. After it, WatchJob resumes after the last sequence number.
    """

    def __init__(
        self,
        first: FirstRequest,
        retry: Retry,
        deadline: float = math.inf,
        draw: random.Random | None = None,
    ) -> None:
        self._first = first
        self.silence_seconds = retry.silence_seconds
        self.deadline = deadline
        self._backoff = Backoff(retry, deadline, draw)
        self._images: dict[int, Image] = {}
        self.finished = False
        self._is_abandoned = False
        self.job: Job | None = None  # the newest record of the job
        self._has_started = False  # since the last snapshot that was an event
        self.job_name, self.sequence = "", 0
        if isinstance(first, service_pb2.WatchJobRequest):
            self.job_name, self.sequence = first.name, first.after_sequence

    @property
    def is_ours(self) -> bool:
        """Whether leaving now must cancel the job: Generate created it and it is not detached."""
        owned = isinstance(self._first, service_pb2.GenerateRequest) and not self._first.detach
        return owned and not self.finished and not self._is_abandoned

    def abandon(self) -> str:
        """Returns the name of the job to cancel now, once; empty when there is none."""
        if not (self.is_ours and self.job_name):
            return ""
        self._is_abandoned = True
        return self.job_name

    def next_request(self) -> FirstRequest:
        """Returns the request of the next call."""
        if not self.job_name:
            return self._first
        return service_pb2.WatchJobRequest(name=self.job_name, after_sequence=self.sequence)

    def take(self, message: event_pb2.JobEvent) -> Event | None:
        """Returns the event for the caller.

        None: a repeated event, a heartbeat, or a kind that this client does not know.
        """
        event = convert.event_from(message)
        if isinstance(event, Snapshot):
            seen = self.job is not None and not self._waits_again(self.job, event.job)
            self._has_started = self._has_started and seen
        else:
            seen = message.sequence <= self.sequence
        self._backoff.connected(new_event=not seen)
        self.job_name = message.job or self.job_name
        self.sequence = max(self.sequence, message.sequence)
        if isinstance(event, (Snapshot, Ended)):
            self.job = event.job
        if event is None or seen:
            return None
        self.finished = isinstance(event, Ended)
        self._has_started = self._has_started or isinstance(event, Started)
        if isinstance(event, SampleFinished):
            # this event replaces one of an earlier attempt
            self._images[event.sample] = event.image
        return event

    def _waits_again(self, before: Job, now: Job) -> bool:
        """Returns whether a queued job waits for another reason than in the snapshot before, or
        again for a reason after it has run.
        """
        if now.state is not State.QUEUED:
            return False
        if self._has_started:
            return bool(now.state_reason)
        return (now.state_reason, now.warning) != (before.state_reason, before.warning)

    def result(self) -> Result:
        """Returns the images of the finished job.

        Raises:
            JobFailedError, JobCancelledError: the job ended without images.
            StreamClosedError: the job has not ended.
        """
        if not self.finished or self.job is None:
            raise errors.StreamClosedError
        return result_of(self.job, self._images)

    def delay_after_end(self, now: float) -> float:
        """Returns the seconds to wait before the next call after a stream that ended with OK.

        Raises:
            RpcError: streams ended before the job did until no time was left.
        """
        if self.job is not None and self.job.state.is_terminal:
            # The events of the job have expired; its record has the final state.
            self.finished = True
        return self.delay_after(errors.unavailable("the stream ended before the job did"), now)

    def delay_after(self, error: errors.RpcError, now: float) -> float:
        """Returns the seconds to wait before the next call after a stream that failed.

        Raises:
            RpcError: `error` itself, when a retry does not help or no time is left for one.
        """
        if self.finished:
            return 0.0
        return self._backoff.delay(error, now, of_stream=True)
