"""What a finished job gave."""

from __future__ import annotations

from dataclasses import dataclass

from img2img_client.errors import JobCancelledError, JobFailedError
from img2img_client.events import Event, SampleFinished
from img2img_client.resources import GeneratedImage, Image, Job, State

# In place of a picture whose event has expired: its link is all that is left.
GONE = Image(data=b"", media_type="", size_bytes=0, sha256="", width=0, height=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A job that succeeded and its pictures, one a sample, in order."""

    job: Job
    images: tuple[GeneratedImage, ...]


class Pictures:
    """Collects a job's pictures while its events pass by."""

    def __init__(self) -> None:
        self._images: dict[int, Image] = {}

    def add(self, event: Event) -> None:
        """Keeps the picture if the event has one; a sample made anew replaces the earlier one."""
        if isinstance(event, SampleFinished):
            self._images[event.sample] = event.image

    def result(self, job: Job) -> Result:
        """Joins the pictures with the job's record.

        Raises:
            JobFailedError, JobCancelledError: the job did not succeed.
        """
        if job.state is State.FAILED:
            raise JobFailedError(job)
        if job.state is State.CANCELLED:
            raise JobCancelledError(job)
        pictures = []
        for sample in job.samples:
            image = self._images.get(sample.index, GONE)
            pictures.append(
                GeneratedImage(
                    data=image.data,
                    media_type=image.media_type,
                    size_bytes=image.size_bytes,
                    sha256=image.sha256,
                    width=image.width,
                    height=image.height,
                    index=sample.index,
                    seed=sample.seed,
                    nsfw=sample.nsfw,
                    url=sample.url,
                )
            )
        return Result(job=job, images=tuple(pictures))
