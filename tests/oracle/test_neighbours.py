"""The same request alone, in a mixed batch, joining a running batch, and after an out-of-memory
split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from img2img_server.domain.events import StepFinished
from img2img_server.domain.params import Lane
from img2img_server.engine.base import Engine, EngineEvent, EngineJob, JobDone
from img2img_server.engine.denoiser import Conditioning
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import families as served
from img2img_server.engine.rows import text_of
from img2img_server.imaging.base import Pixels
from tests.engine_bench import BOUND, ReplyInbox, blocks, difference, images, job, run, running
from tests.oracle.harness import PROMPTS, OracleModel, families

SCHEDULERS = {family.name: family.schedulers for family in served()}


class SmallDevice(DiffusersDenoiser):
    """The real denoiser on a device that runs out of memory. It records the size of every batch and
    the number of batches with images of several sizes.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.reset()

    def reset(self) -> None:
        """Makes all memory available again."""
        self.batches: list[int] = []
        self.mixed_batches = 0
        self.most_forwards = 100

    def denoise(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        conditionings: Sequence[Conditioning],
    ) -> Sequence[Tensor]:
        forwards = sum(1 if row.negative is None else 2 for row in conditionings)
        if forwards > self.most_forwards:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")
        self.batches.append(len(conditionings))
        self.mixed_batches += len({row.shape for row in latents}) > 1
        return super().denoise(latents, timesteps, conditionings)


class Subject(NamedTuple):
    """A family's first model, its requests and their images alone."""

    denoiser: SmallDevice
    model: OracleModel
    schedulers: tuple[str, ...]
    wanted: list[EngineJob]
    alone: list[list[Pixels]]


@pytest.fixture(scope="module", params=families())
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    model = next(iter(families()[request.param].values()))
    folder = model.write(tmp_path_factory.mktemp("model"))
    denoiser = SmallDevice.load(str(folder), torch.device("cpu"), torch.float32)
    schedulers = model.schedulers or SCHEDULERS[request.param]
    image, scale = blocks(*model.sizes[0]), model.guidance_scales[-1]
    wanted = [
        job(
            scheduler=schedulers[len(schedulers) // 2],
            guidance_scale=scale,
            negative_prompt="fog",
            num_inference_steps=9,
            seeds=(7, 8),
            init_image=image,
            **model.options,
        ),
        job(
            scheduler=schedulers[-1],
            guidance_scale=model.guidance_scales[0],
            strength=1.0,
            num_inference_steps=8,
            init_image=image,
            **model.options,
        ),
    ]
    with running(denoiser) as engine:
        alone = [images(run(engine, each)) for each in wanted]
    return Subject(denoiser, model, schedulers, wanted, alone)


@pytest.fixture
def subject(loaded: Subject) -> Subject:
    loaded.denoiser.reset()
    return loaded


def strangers(subject: Subject) -> list[EngineJob]:
    """Returns jobs of every kind: each sampler, guided and unguided, short and long, and other
    sizes.
    """
    model, schedulers = subject.model, subject.schedulers
    return [
        job(
            job_id=100 + index,
            tenant=f"tenant {index % 3}",
            lane=Lane.BATCH if index % 2 else Lane.REALTIME,
            prompt=f"stranger {PROMPTS[index % 2][: 4 * index + 1]}",
            negative_prompt="fog" if index % 3 else "",
            scheduler=schedulers[index % len(schedulers)],
            seeds=(index,),
            guidance_scale=model.guidance_scales[index % len(model.guidance_scales)],
            strength=1.0 - index / 10,
            num_inference_steps=min(5 + 3 * index, int(model.most_steps * (1.0 - index / 10))),
            init_image=blocks(*model.sizes[0 if index < 5 else index % len(model.sizes)], index),
            **model.options,
        )
        for index in range(8)
    ]


def submit_all(engine: Engine, jobs: Sequence[EngineJob]) -> list[ReplyInbox]:
    inboxes = [ReplyInbox() for _ in jobs]
    for each, inbox in zip(jobs, inboxes, strict=True):
        engine.submit(each, inbox)
    return inboxes


def worst(found: Sequence[Pixels], expected: Sequence[Pixels]) -> int:
    return max(difference(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("most_forwards", [100, 3])
def test_an_image_is_the_same_alone_and_in_batches_of_strangers(
    subject: Subject, case: int, most_forwards: int
) -> None:
    subject.denoiser.most_forwards = most_forwards
    with running(subject.denoiser) as engine:
        *others, inbox = submit_all(engine, [*strangers(subject), subject.wanted[case]])
        found = images(inbox.all())
        assert all(isinstance(other.all()[-1], JobDone) for other in others)

    assert worst(found, subject.alone[case]) <= BOUND
    assert max(subject.denoiser.batches) >= (2 if most_forwards == 3 else 5), "they shared batches"
    if most_forwards > 3:
        assert (subject.denoiser.mixed_batches > 0) == sizes_share_batches(subject)


def sizes_share_batches(subject: Subject) -> bool:
    """Returns whether the family takes images of two of the sizes in one forward."""
    sizes = subject.model.sizes
    texts = [text_of(job(init_image=blocks(*size))) for size in sizes]
    return len({subject.denoiser.batch_key(text) for text in texts}) < len(sizes)


@pytest.mark.parametrize("case", [0, 1])
def test_an_image_is_the_same_when_it_joins_in_mid_run(subject: Subject, case: int) -> None:
    inbox = ReplyInbox()
    image, schedulers = subject.wanted[case].init_image, subject.schedulers
    with running(subject.denoiser) as engine:

        def join(event: EngineEvent) -> None:
            if isinstance(event, StepFinished) and event.step == 2:
                engine.submit(subject.wanted[case], inbox)

        engine.submit(strangers(subject)[0], ReplyInbox())
        first = job(
            job_id=50,
            strength=1.0,
            num_inference_steps=4,
            init_image=image,
            scheduler=schedulers[0],
        )
        engine.submit(first, join)
        found = images(inbox.all())

    assert worst(found, subject.alone[case]) <= BOUND


def test_a_warm_up_runs_as_many_forwards_as_it_measures(subject: Subject) -> None:
    subject.denoiser.most_forwards = 1  # The negative half of a guided row runs out of memory.
    with running(subject.denoiser) as engine:
        engine.warm_up(*subject.model.sizes[0])

    assert set(subject.denoiser.batches) == {1}
