"""This engine as one of the systems in the benchmark."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.engine_clock import Clock
from benchmarks.engine_load import Outcome, Request, Served
from benchmarks.engine_stock import feed, photo
from img2img_server.domain.params import JobParams
from img2img_server.engine.base import EngineEvent, EngineJob, JobDone, JobFailed, PreviewReady
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.engine import DiffusionEngine
from img2img_server.engine.family import ModelFiles
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.engine.options import ModelOptions


class EngineServer:
    """The server of this engine.

    Args:
        clock: clock of the pipeline's networks; None: not measured.
    """

    def __init__(
        self,
        pipeline: Any,
        clock: Clock | None,
        max_batch_size: int,
        options: ModelOptions | None = None,
        spec: ModelSpec | None = None,
    ) -> None:
        self._clock = clock
        denoiser = DiffusersDenoiser(pipeline, options, max_batch_size=max_batch_size)
        spec = spec or spec_of(pipeline)
        self._engine = DiffusionEngine(denoiser, spec, max_batch_size)

    def serve(self, load: Sequence[Request]) -> Served:
        """Runs a load in real time."""
        busy, networks = self._engine.busy_seconds, self._network_seconds
        done: queue.SimpleQueue[Outcome | Exception] = queue.SimpleQueue()
        start = time.perf_counter()

        def submit(request: Request) -> None:
            looks: list[float] = []

            def sink(event: EngineEvent) -> None:
                now = time.perf_counter() - start
                match event:
                    case PreviewReady():
                        looks.append(now)
                    case JobDone():
                        done.put(Outcome(request, looks[0] if looks else now, now))
                    case JobFailed(error):
                        done.put(error)

            self._engine.submit(job_of(request), sink)

        feeder = threading.Thread(target=feed, args=(load, start, submit))
        feeder.start()
        outcomes = []
        for _ in load:
            outcome = done.get()
            if isinstance(outcome, Exception):
                raise outcome
            outcomes.append(outcome)
        feeder.join()
        networks = self._network_seconds - networks
        while self._engine.busy_seconds - busy < networks:
            time.sleep(0.001)  # The last step is counted after its events.
        return Served(outcomes, self._engine.busy_seconds - busy, networks)

    def stop(self) -> None:
        self._engine.stop()

    @property
    def _network_seconds(self) -> float:
        return self._clock.seconds if self._clock else 0.0


def spec_of(pipeline: Any) -> ModelSpec:
    """Returns the spec of a pipeline that was not read from files."""
    files = ModelFiles.of_pipeline(pipeline)
    traits = detect(files, "the pipeline").traits(files)
    return ModelSpec(
        source="",
        name="bench",
        family=traits.family,
        kind=traits.kind,
        strength_rule=traits.strength_rule,
        guidance=traits.guidance,
        scheduler=traits.scheduler,
        schedulers=traits.schedulers,
        multiple=traits.side_multiple,
    )


def job_of(request: Request) -> EngineJob:
    params = JobParams(
        prompt=request.prompt,
        strength=request.strength,
        seed=request.seed,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        scheduler=request.traits.scheduler,
        preview_interval_steps=1,
    )
    image = photo(request.side)
    return EngineJob(job_id=request.number, tenant="bench", params=params, init_image=image)
