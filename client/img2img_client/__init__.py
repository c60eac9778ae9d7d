"""Client of the img2img service: blocking (`Client`) and asyncio (`AsyncClient`).

from pathlib import Path
from img2img_client import Client

with Client("127.0.0.1:50051", api_key="dev-key") as client:
    result = client.generate(
        prompt="a watercolour of a cat", init_image=Path("photo.jpg"), strength=0.7
    )
    result.images[0].save("out.png")
"""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from img2img_client.admin import StorageSettings as StorageSettings
from img2img_client.admin import StorageUpdate as StorageUpdate
from img2img_client.admin import SystemDetails as SystemDetails
from img2img_client.admin import Usage as Usage
from img2img_client.admin import UsageOfDay as UsageOfDay
from img2img_client.channel import CHANNEL_OPTIONS as CHANNEL_OPTIONS
from img2img_client.client import AsyncClient as AsyncClient
from img2img_client.client import Client as Client
from img2img_client.diagnosis import Cause as Cause
from img2img_client.errors import ClientClosedError as ClientClosedError
from img2img_client.errors import ClientUsageError as ClientUsageError
from img2img_client.errors import DeadlineExceededError as DeadlineExceededError
from img2img_client.errors import DeadlineTooShortError as DeadlineTooShortError
from img2img_client.errors import Img2ImgError as Img2ImgError
from img2img_client.errors import InitImageFileError as InitImageFileError
from img2img_client.errors import InitImageNotFoundError as InitImageNotFoundError
from img2img_client.errors import InternalError as InternalError
from img2img_client.errors import InvalidArgumentError as InvalidArgumentError
from img2img_client.errors import InvalidArgumentTypeError as InvalidArgumentTypeError
from img2img_client.errors import InvalidRequestError as InvalidRequestError
from img2img_client.errors import JobCancelledError as JobCancelledError
from img2img_client.errors import JobEndedError as JobEndedError
from img2img_client.errors import JobEndError as JobEndError
from img2img_client.errors import JobFailedError as JobFailedError
from img2img_client.errors import NotFoundError as NotFoundError
from img2img_client.errors import PermissionDeniedError as PermissionDeniedError
from img2img_client.errors import QueueFullError as QueueFullError
from img2img_client.errors import RateLimitedError as RateLimitedError
from img2img_client.errors import RequestIdReusedError as RequestIdReusedError
from img2img_client.errors import RpcError as RpcError
from img2img_client.errors import StreamClosedError as StreamClosedError
from img2img_client.errors import UnauthenticatedError as UnauthenticatedError
from img2img_client.errors import UnavailableError as UnavailableError
from img2img_client.errors import Violation as Violation
from img2img_client.events import Cancelled as Cancelled
from img2img_client.events import Ended as Ended
from img2img_client.events import Event as Event
from img2img_client.events import Failed as Failed
from img2img_client.events import Preview as Preview
from img2img_client.events import Queued as Queued
from img2img_client.events import SampleFinished as SampleFinished
from img2img_client.events import SampleStored as SampleStored
from img2img_client.events import Snapshot as Snapshot
from img2img_client.events import Stage as Stage
from img2img_client.events import StageFinished as StageFinished
from img2img_client.events import Started as Started
from img2img_client.events import StepFinished as StepFinished
from img2img_client.events import StorageWaiting as StorageWaiting
from img2img_client.events import Succeeded as Succeeded
from img2img_client.resources import Caller as Caller
from img2img_client.resources import Capabilities as Capabilities
from img2img_client.resources import DeterminismClass as DeterminismClass
from img2img_client.resources import Estimate as Estimate
from img2img_client.resources import GeneratedImage as GeneratedImage
from img2img_client.resources import Guidance as Guidance
from img2img_client.resources import Image as Image
from img2img_client.resources import Job as Job
from img2img_client.resources import JobError as JobError
from img2img_client.resources import Limits as Limits
from img2img_client.resources import Model as Model
from img2img_client.resources import ModelKind as ModelKind
from img2img_client.resources import ModelState as ModelState
from img2img_client.resources import Result as Result
from img2img_client.resources import Sample as Sample
from img2img_client.resources import State as State
from img2img_client.resources import StrengthRule as StrengthRule
from img2img_client.resources import Timings as Timings
from img2img_client.resume import Retry as Retry
from img2img_client.spec import CreateOptions as CreateOptions
from img2img_client.spec import ImageFormat as ImageFormat
from img2img_client.spec import ImageSource as ImageSource
from img2img_client.spec import Lane as Lane
from img2img_client.spec import Lora as Lora
from img2img_client.spec import Loras as Loras
from img2img_client.spec import Options as Options
from img2img_client.spec import Spec as Spec
from img2img_client.spec import StreamOptions as StreamOptions
from img2img_client.spec import StrengthMode as StrengthMode
from img2img_client.stream import AsyncJobStream as AsyncJobStream
from img2img_client.stream import JobStream as JobStream
from img2img_client.uploads import Upload as Upload

try:
    __version__ = _version("img2img-client")
except _PackageNotFoundError:  # A checkout on PYTHONPATH has no version.
    __version__ = "0+unknown"
