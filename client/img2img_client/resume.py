"""How calls are tried again: when, how often, and with which request. No I/O and no clock here, so
that the blocking and the asyncio client share every decision.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

from img2img.v1 import event_pb2, service_pb2
from img2img_client import convert, errors
from img2img_client.events import TERMINAL, Event, Snapshot
from img2img_client.resources import Job
from img2img_client.result import Pictures, Result

FirstRequest = service_pb2.GenerateRequest | service_pb2.WatchJobRequest

# Codes with which a transport ends a stream that the service did not end itself.
_FULL = ("TOO_MANY_WATCHERS", "TOO_MANY_CALLS")  # a lost stream of ours may still count
BROKEN_STREAM = ("UNAVAILABLE", "INTERNAL", "UNKNOWN", "CANCELLED")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How long and how often to try again. All times in seconds.

    A call that was never answered is tried for `connect_seconds`; a job whose stream broke is
    looked for for `resume_seconds`, counted anew whenever an event arrives. Pauses are drawn
    between 0 and `first_delay_seconds` x 2^n, at most `longest_delay_seconds` (full jitter); a
    pause that the service names itself is the least.

    The service sends a heartbeat on every stream that is silent for 15 seconds. A stream on which
    nothing arrives for `silence_seconds` is taken for broken; infinity: never. Over a slow line it
    must be longer than the largest image takes to arrive.
    """

    connect_seconds: float = 5.0
    resume_seconds: float = 60.0
    first_delay_seconds: float = 0.2
    longest_delay_seconds: float = 3.0
    silence_seconds: float = 60.0


def checked(retry: Retry | None) -> Retry:
    """The given Retry or the default one. Raises InvalidArgumentTypeError."""
    if retry is not None and not isinstance(retry, Retry):
        text = f"retry must be a Retry, not {type(retry).__name__}"
        raise errors.InvalidArgumentTypeError(errors.Violation("retry", text))
    return retry or Retry()


class Backoff:
    """The pauses of one call. Times are monotonic seconds, given by the caller."""

    def __init__(
        self, retry: Retry, deadline: float = math.inf, draw: random.Random | None = None
    ) -> None:
        self._retry = retry
        self._deadline = deadline
        self._draw = draw or random.Random()  # noqa: S311 - spreads load, guards nothing
        self._budget_seconds = retry.connect_seconds
        self._tries = 0
        self._lost_at: float | None = None

    def heard(self, *, news: bool) -> None:
        """The service answered. Only news shorten the pauses again: a server that breaks every
        stream after its first message must not be called in a tight loop."""
        self._budget_seconds = self._retry.resume_seconds
        self._lost_at = None
        if news:
            self._tries = 0

    def pause(self, error: errors.RpcError, now: float) -> float:
        """Seconds to wait before the next try.

        Raises:
            RpcError: `error` itself: the budget is spent, or the deadline would pass.
        """
        self._lost_at = now if self._lost_at is None else self._lost_at
        longest = min(
            self._retry.first_delay_seconds * 2.0**self._tries, self._retry.longest_delay_seconds
        )
        self._tries += 1
        delay = max(self._draw.uniform(0.0, longest), error.retry_seconds or 0.0)
        if now + delay > min(self._lost_at + self._budget_seconds, self._deadline):
            raise error
        return delay


def may_repeat(error: errors.RpcError) -> bool:
    """Whether a call that ended with `error` may be made again as it was."""
    return isinstance(error, errors.UnavailableError) or error.reason in _FULL


class Follow:
    """Which call to make next so that every event of one job is seen exactly once.

    Until the first event the job's name is not known: Generate is repeated with its request_id,
    which gives the same job. After it, WatchJob goes on behind the last sequence seen.
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
        self._pictures = Pictures()
        self.finished = False
        self._is_abandoned = False
        self.job: Job | None = None  # the newest record that came by
        if isinstance(first, service_pb2.WatchJobRequest):
            self.job_name, self.sequence = first.name, first.after_sequence
        else:
            self.job_name, self.sequence = "", 0

    @property
    def is_ours(self) -> bool:
        """Whether leaving now must cancel the job: it is that of a Generate call, not detached."""
        owned = isinstance(self._first, service_pb2.GenerateRequest) and not self._first.detach
        return owned and not self.finished and not self._is_abandoned

    def abandon(self) -> str:
        """Returns the name of the job that must be cancelled now; empty: none, or not again."""
        if not (self.is_ours and self.job_name):
            return ""
        self._is_abandoned = True
        return self.job_name

    def next_request(self) -> FirstRequest:
        """The request of the next call."""
        if not self.job_name:
            return self._first
        return service_pb2.WatchJobRequest(name=self.job_name, after_sequence=self.sequence)

    def take(self, message: event_pb2.JobEvent) -> Event | None:
        """Returns the event for the caller.

        None: it was seen before, is a heartbeat, or of a kind that this client does not know.
        """
        event = convert.event_from(message)
        is_snapshot = message.WhichOneof("event") == "snapshot"
        seen = self.job is not None if is_snapshot else message.sequence <= self.sequence
        self._backoff.heard(news=not seen)
        self.job_name = message.job or self.job_name
        self.sequence = max(self.sequence, message.sequence)
        if isinstance(event, (Snapshot, *TERMINAL)):
            self.job = event.job
        if event is None or seen:
            return None
        self.finished = isinstance(event, TERMINAL)
        self._pictures.add(event)
        return event

    def result(self) -> Result:
        """The pictures of the finished job.

        Raises:
            JobFailedError, JobCancelledError: it ended otherwise.
            StreamClosedError: it has not ended.
        """
        if not self.finished or self.job is None:
            raise errors.StreamClosedError
        return self._pictures.result(self.job)

    def ended(self, now: float) -> float:
        """The stream ended with OK. Seconds to wait before the next call; 0.0 when finished.

        Raises:
            RpcError: it ended again and again without the job's end.
        """
        if self.job is not None and self.job.state.is_terminal:
            self.finished = True  # its events have expired, the record tells how it ended
        if self.finished:
            return 0.0
        text = "the event stream ended before the job did"
        lost = errors.UnavailableError(text, code="UNAVAILABLE", reason=errors.TRANSPORT)
        return self._backoff.pause(lost, now)

    def broke(self, error: errors.RpcError, now: float) -> float:
        """The stream ended with an error. Seconds to wait before the next call.

        Raises:
            RpcError: `error` itself: trying again cannot help, or was tried long enough.
        """
        if self.finished:
            return 0.0
        by_transport = error.reason == errors.TRANSPORT and error.code in BROKEN_STREAM
        if may_repeat(error) or by_transport:
            return self._backoff.pause(error, now)
        raise error
