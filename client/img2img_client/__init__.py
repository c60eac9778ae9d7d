"""Client of the img2img service: blocking (`Client`) and asyncio (`AsyncClient`).

from pathlib import Path
from img2img_client import Client

with Client("127.0.0.1:50051", api_key="dev-key") as client:
    result = client.generate(
        prompt="a watercolour of a cat", init_image=Path("photo.jpg"), strength=0.7
    )
    result.images[0].save("out.png")
"""

from img2img_client.admin import StorageSettings, StorageUpdate, SystemDetails
from img2img_client.aio import AsyncClient
from img2img_client.client import Client
from img2img_client.diagnosis import Cause
from img2img_client.errors import (
    ClientClosedError,
    DeadlineExceededError,
    DeadlineTooShortError,
    Img2ImgError,
    InitImageFileError,
    InitImageNotFoundError,
    InternalError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
    InvalidRequestError,
    JobCancelledError,
    JobEndedError,
    JobEndError,
    JobFailedError,
    NotFoundError,
    PermissionDeniedError,
    QueueFullError,
    RateLimitedError,
    RequestIdReusedError,
    RpcError,
    StreamClosedError,
    UnauthenticatedError,
    UnavailableError,
    Violation,
)
from img2img_client.events import (
    Cancelled,
    Event,
    Failed,
    Preview,
    Queued,
    SampleFinished,
    SampleStored,
    Snapshot,
    Stage,
    StageFinished,
    Started,
    StepFinished,
    Succeeded,
)
from img2img_client.requests import ImageSource, Options
from img2img_client.resources import (
    Caller,
    Capabilities,
    DeterminismClass,
    GeneratedImage,
    Image,
    ImageFormat,
    Job,
    JobError,
    Lane,
    Limits,
    Model,
    Sample,
    Spec,
    State,
    Timings,
)
from img2img_client.result import Result
from img2img_client.resume import Retry
from img2img_client.stream import AsyncJobStream, JobStream

__all__ = [
    "AsyncClient",
    "AsyncJobStream",
    "Caller",
    "Cancelled",
    "Capabilities",
    "Cause",
    "Client",
    "ClientClosedError",
    "DeadlineExceededError",
    "DeadlineTooShortError",
    "DeterminismClass",
    "Event",
    "Failed",
    "GeneratedImage",
    "Image",
    "ImageFormat",
    "ImageSource",
    "Img2ImgError",
    "InitImageFileError",
    "InitImageNotFoundError",
    "InternalError",
    "InvalidArgumentError",
    "InvalidArgumentTypeError",
    "InvalidRequestError",
    "Job",
    "JobCancelledError",
    "JobEndError",
    "JobEndedError",
    "JobError",
    "JobFailedError",
    "JobStream",
    "Lane",
    "Limits",
    "Model",
    "NotFoundError",
    "Options",
    "PermissionDeniedError",
    "Preview",
    "QueueFullError",
    "Queued",
    "RateLimitedError",
    "RequestIdReusedError",
    "Result",
    "Retry",
    "RpcError",
    "Sample",
    "SampleFinished",
    "SampleStored",
    "Snapshot",
    "Spec",
    "Stage",
    "StageFinished",
    "Started",
    "State",
    "StepFinished",
    "StorageSettings",
    "StorageUpdate",
    "StreamClosedError",
    "Succeeded",
    "SystemDetails",
    "Timings",
    "UnauthenticatedError",
    "UnavailableError",
    "Violation",
]
