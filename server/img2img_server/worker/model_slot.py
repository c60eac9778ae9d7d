"""One model of a catalogue on one worker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from img2img_server.domain.models import ModelInfo, ModelState, WorkerInfo
from img2img_server.engine.catalogue import CatalogueModel
from img2img_server.interfaces.queue import ModelCommand
from img2img_server.worker.deps import Throughput
from img2img_server.worker.model_loader import LoadedModel
from img2img_server.worker.worker import Worker


@dataclass(slots=True, eq=False)
class ModelSlot:
    """A model of the catalogue on this worker. `since`: monotonic time since when jobs wait."""

    worker_name: str
    model: CatalogueModel
    rank: int = 0  # its place in the catalogue
    info: ModelInfo = field(init=False)
    state: ModelState = ModelState.COLD
    is_found: bool = False
    found_at: float = 0.0
    finding: asyncio.Task[None] | None = None  # finds its files
    command: ModelCommand | None = None  # to execute once its files are found
    size: int = 0
    failure: str = ""
    failed_at: float = 0.0
    load_seconds: float = 0.0
    since: float | None = None
    is_served: bool = False  # by another worker, at the last look
    loaded_at: float = 0.0
    refused_loras: frozenset[str] = frozenset()  # files that did not fit when it was loaded
    throughput: Throughput = field(default_factory=Throughput)
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    worker: Worker | None = None
    running: asyncio.Task[None] | None = None
    loaded: LoadedModel | None = None

    @property
    def name(self) -> str:
        return self.model.name

    def __post_init__(self) -> None:
        self.info = _unknown(self.model.name)

    @property
    def is_searched(self) -> bool:
        """Returns whether its files are searched or downloaded now."""
        return self.finding is not None and not self.finding.done()

    @property
    def announced_name(self) -> str:
        """The name under which the worker announces the model."""
        return f"{self.worker_name}/{self.model.name}"

    def worker_info(self, device: str, room_seconds: float) -> WorkerInfo:
        """Returns the announcement of the model while it is not loaded.

        Args:
            device: The name of the device, if known.
            room_seconds: Estimated seconds until there is room for it.
        """
        throughput = self.throughput
        return WorkerInfo(
            name=self.announced_name,
            model=replace(self.info, pixel_step_seconds=throughput.pixel_step_seconds),
            device=device,
            job_seconds=throughput.job_seconds,
            forward_seconds=throughput.forward_seconds,
            job_forward_seconds=throughput.job_forward_seconds,
            model_state=self.state,
            load_seconds=self.load_seconds + room_seconds,
            failure=self.failure if self.state is ModelState.FAILED else "",
            has_catalogue=True,
            rank=self.rank,
        )


def _unknown(name: str) -> ModelInfo:
    """Returns the placeholder of a model whose files were not found yet."""
    return ModelInfo(
        name=name,
        family="",
        schedulers=("ddim",),
        default_num_inference_steps=1,
        default_guidance_scale=1.0,
    )
