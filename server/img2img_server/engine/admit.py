"""Whether a job may begin: the model's own limits, and the device's memory."""

from __future__ import annotations

from img2img_server.engine.base import EngineJob, Sink
from img2img_server.engine.denoiser import Denoiser
from img2img_server.engine.memory import MemoryModel
from img2img_server.engine.model_spec import ModelSpec
from img2img_server.engine.rows import EngineJobState, text_of
from img2img_server.errors import EngineError, OutOfMemoryError


def admit(
    job: EngineJob, sink: Sink, denoiser: Denoiser, spec: ModelSpec, memory: MemoryModel
) -> EngineJobState:
    """The run of a job.

    Raises:
        EngineError: the model does not do what was asked.
        OutOfMemoryError: it can never fit the device.
        ValueError: the scheduler cannot run so many steps.
        Exception: whatever else a broken device raises.
    """
    if sentence := spec.refusal(job.height, job.width, job.num_inference_steps):
        raise EngineError(sentence)
    if job.lora and job.lora not in spec.loras:
        raise EngineError(f"{spec.name} has no LoRA {job.lora}")
    text = text_of(job)
    forwards = denoiser.forwards(text)
    if need := memory.shortfall(job.height, job.width, forwards):
        raise OutOfMemoryError(job.width, job.height, need)
    schedule = denoiser.schedule(
        job.scheduler, job.num_inference_steps, job.strength, job.height, job.width
    )
    return EngineJobState.begin(
        job, sink, schedule, forwards, denoiser.device, denoiser.batch_key(text)
    )
