"""Client of the img2img service: blocking (`Client`) and asyncio (`AsyncClient`).

from pathlib import Path
from img2img_client import Client

with Client("127.0.0.1:50051", api_key="dev-key") as client:
    result = client.generate(
        prompt="a watercolour of a cat", init_image=Path("photo.jpg"), strength=0.7
    )
    result.pictures[0].save("out.png")
"""

import os

# gRPC reads it when first imported, and would tell on stderr what we handle ourselves.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

from img2img_client.admin import StorageSettings, StorageUpdate, SystemDetails
from img2img_client.aio import AsyncClient
from img2img_client.client import Client
from img2img_client.errors import (
    DeadlineExceededError,
    DeadlineTooShortError,
    Img2ImgError,
    InternalError,
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
from img2img_client.request import ImageSource, Options
from img2img_client.resources import (
    Capabilities,
    DeterminismClass,
    Image,
    ImageFormat,
    Job,
    JobError,
    Lane,
    Limits,
    Model,
    Picture,
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
    "Cancelled",
    "Capabilities",
    "Client",
    "DeadlineExceededError",
    "DeadlineTooShortError",
    "DeterminismClass",
    "Event",
    "Failed",
    "Image",
    "ImageFormat",
    "ImageSource",
    "Img2ImgError",
    "InternalError",
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
    "Picture",
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
    "Succeeded",
    "SystemDetails",
    "Timings",
    "UnauthenticatedError",
    "UnavailableError",
    "Violation",
]
