"""Makes a JobState of a running job, and continues a job from it.

The tensors are in the format of safetensors, which holds no code. For each sample that has steps
left: the slots of its sampler, the state of its random generator, and the noise that it drew for a
step that did not run. Prompts are encoded again, because they are larger than the latents and the
same on every engine of one state key.
"""

from __future__ import annotations

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from img2img_server.engine.base import JobState, JobSuspended, StateError
from img2img_server.engine.host_copy import to_device
from img2img_server.engine.rows import EngineJobState, SampleState

_LAST = ".channels_last"  # ends the name of a mark: a tensor has this memory format


def suspended(run: EngineJobState, state_key: str) -> JobSuspended:
    """Returns the event of a job that is suspended at a step boundary.

    Args:
        state_key: the key of the engine, see Engine.state_key.
    """
    total = len(run.schedule.steps)
    samples = [sample for sample in run.samples if sample.steps_done < total]
    tensors = {
        name: _on_host(tensor) for sample in samples for name, tensor in _tensors(sample).items()
    }
    marks = {name + _LAST: torch.ones(1) for name, tensor in tensors.items() if _is_last(tensor)}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()} | marks
    state = JobState(
        state_key=state_key,
        job_id=run.job.job_id,
        tenant=run.job.tenant,
        steps={sample.index: sample.steps_done for sample in samples},
        total=total,
        tensors=safetensors.torch.save(tensors),
        finished_steps=run.finished_steps + total * (len(run.samples) - len(samples)),
        device_seconds=run.device,
        shares=run.shares,
        batches=run.batches,
    )
    return JobSuspended(state=state, spans=tuple(run.spans), engine_seconds=run.engine_seconds)


def load_samples(run: EngineJobState, state: JobState, state_key: str) -> list[SampleState]:
    """Returns the samples of a job as they were when it was suspended.

    Args:
        state_key: The key of the engine; empty: it cannot continue the job.

    Raises:
        StateError: the state belongs to another engine or job, or is damaged.
    """
    if not state_key or state.state_key != state_key:
        raise StateError("another kind of engine has made it")
    if (state.job_id, state.tenant) != (run.job.job_id, run.job.tenant):
        raise StateError("it belongs to another job")
    total = len(run.schedule.steps)
    missing = set(run.job.indices) - state.steps.keys()
    if (
        missing
        or state.total != total
        or not all(0 <= done < total for done in state.steps.values())
    ):
        raise StateError("it has other samples or steps than the job")
    try:
        tensors = safetensors.torch.load(state.tensors)
        return [_sample(run, index, state.steps[index], tensors) for index in run.job.indices]
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise StateError(f"its tensors cannot be read: {type(error).__name__}") from error


def _tensors(sample: SampleState) -> dict[str, Tensor]:
    found = {f"{sample.index}.slot.{place}": slot for place, slot in enumerate(sample.slots)}
    found[f"{sample.index}.generator"] = sample.generator.get_state()
    if sample.noise is not None:
        found[f"{sample.index}.noise"] = sample.noise
    return found


def _sample(
    run: EngineJobState, index: int, steps_done: int, tensors: dict[str, Tensor]
) -> SampleState:
    # The last two weights are those of the output and of the noise.
    count = len(run.schedule.steps[steps_done].clean) - 2
    slots = [_placed(tensors, f"{index}.slot.{place}") for place in range(count)]
    noise = _placed(tensors, f"{index}.noise") if f"{index}.noise" in tensors else None
    for tensor in (*slots, *(() if noise is None else (noise,))):
        if tensor.dtype != torch.float32 or tensor.dim() != 4 or tensor.shape != slots[0].shape:
            raise StateError("its tensors have other shapes than latents")
    generator = torch.Generator()
    generator.set_state(tensors[f"{index}.generator"])
    device = run.table.device
    placed = tuple(to_device(slot, device) for slot in slots)
    return SampleState(
        run,
        index,
        generator,
        placed,
        clean=placed[0],
        steps_done=steps_done,
        noise=None if noise is None else to_device(noise, device),
    )


def _on_host(tensor: Tensor) -> Tensor:
    """Copies a tensor to memory of its own: rows of a batch share their memory."""
    return tensor.detach().to("cpu", copy=True)


def _is_last(tensor: Tensor) -> bool:
    """Returns whether the channels are the last dimension in memory."""
    is_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return is_last and not tensor.is_contiguous()


def _placed(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Returns a tensor in memory of its own and in its former memory format, because the last bits
    of a convolution depend on both.
    """
    is_last = name + _LAST in tensors
    wanted = torch.channels_last if is_last else torch.contiguous_format
    return tensors[name].clone(memory_format=wanted)
