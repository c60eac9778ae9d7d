"""Rows of one batch do not change each other's images, and an error of one affects no other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from img2img_server.domain.events import Stage, StageFinished
from img2img_server.domain.params import Lane
from img2img_server.engine.base import (
    Engine,
    EngineEvent,
    EngineJob,
    JobDone,
    JobFailed,
    PreviewReady,
)
from img2img_server.engine.denoiser import Conditioning, DeviceImage, TextInput
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.samplers import DIFFUSION_SAMPLERS
from img2img_server.errors import EngineError, OutOfMemoryError
from img2img_server.imaging.base import Pixels
from tests.engine_bench import (
    BOUND,
    ReplyInbox,
    blocks,
    difference,
    images,
    job,
    run,
    running,
)
from tests.tiny_models import write_sd

POISON = "poison"


class Faulty(DiffusersDenoiser):
    """The real denoiser, which raises errors as a test requests. It records the size of every
    batch.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.heal()

    def heal(self) -> None:
        self.forwards_seen: list[int] = []
        self.refused: list[int] = []
        self.most_forwards = self.most_images = 100
        self.fails: dict[str, Exception] = {}
        self.poison: Conditioning | None = None

    def encode_texts(self, texts: Sequence[TextInput]) -> list[Conditioning]:
        bad = [text.prompt == POISON for text in texts]
        self._maybe_fail("encode", any(bad))
        found = super().encode_texts(texts)
        for conditioning, is_bad in zip(found, bad, strict=True):
            if is_bad:
                self.poison = conditioning
        return found

    def denoise(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        conditionings: Sequence[Conditioning],
    ) -> Sequence[Tensor]:
        forwards = sum(1 if row.negative is None else 2 for row in conditionings)
        if forwards > self.most_forwards:
            self.refused.append(forwards)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")
        self._maybe_fail("denoise", any(row is self.poison for row in conditionings))
        self.forwards_seen.append(forwards)
        return super().denoise(latents, timesteps, conditionings)

    def decode(self, latents: Tensor) -> Sequence[DeviceImage]:
        self._maybe_fail("decode", True)
        if len(latents) > self.most_images:
            raise torch.OutOfMemoryError("out of memory")
        return super().decode(latents)

    def preview(self, latents: Tensor) -> Sequence[DeviceImage]:
        self._maybe_fail("preview", True)
        return super().preview(latents)

    def _maybe_fail(self, where: str, is_bad: bool) -> None:
        if is_bad and where in self.fails:
            raise self.fails[where]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    folder: Path = write_sd(tmp_path_factory.mktemp("sd"))
    return Faulty.load(str(folder), torch.device("cpu"), torch.float32)


@pytest.fixture
def denoiser(loaded: Faulty) -> Faulty:
    loaded.heal()
    return loaded


def strangers(first_id: int = 100) -> list[EngineJob]:
    """Returns jobs of every kind: each sampler, guided and unguided, short and long, and another
    size.
    """
    found = [
        job(
            job_id=first_id + index,
            tenant=f"tenant {index % 3}",
            lane=Lane.BATCH if index % 2 else Lane.REALTIME,
            prompt=f"stranger {index}",
            scheduler=scheduler,
            seeds=(index,),
            guidance_scale=6.0 if index % 2 else 1.0,
            strength=1.0 - index / 20,
            num_inference_steps=5 + 2 * index,
            init_image=blocks(64, 72, seed=index),
        )
        for index, scheduler in enumerate(DIFFUSION_SAMPLERS)
    ]
    return [*found, job(job_id=first_id + 99, init_image=blocks(72, 64))]


WANTED = [
    job(scheduler="euler_a", guidance_scale=5.0, num_inference_steps=9, seeds=(7, 8)),
    job(scheduler="dpmpp_2m", strength=1.0, num_inference_steps=8),
]


@pytest.fixture(scope="module")
def alone(loaded: Faulty) -> list[list[Pixels]]:
    loaded.heal()
    with running(loaded) as engine:
        return [images(run(engine, wanted)) for wanted in WANTED]


def worst(found: Sequence[Pixels], expected: Sequence[Pixels]) -> int:
    return max(difference(one, other) for one, other in zip(found, expected, strict=True))


def submit_all(engine: Engine, jobs: Sequence[EngineJob]) -> list[ReplyInbox]:
    inboxes = [ReplyInbox() for _ in jobs]
    for each, inbox in zip(jobs, inboxes, strict=True):
        engine.submit(each, inbox)
    return inboxes


def test_an_out_of_memory_makes_later_batches_smaller(denoiser: Faulty) -> None:
    denoiser.most_forwards = 3
    jobs = [job(job_id=i, seeds=(1, 2, 3, 4), num_inference_steps=10) for i in (1, 2)]
    with running(denoiser) as engine:
        for inbox in submit_all(engine, jobs):
            assert isinstance(inbox.all()[-1], JobDone)

    assert denoiser.refused == [4], "tried once and never again"


def test_batches_stay_within_the_capacity(denoiser: Faulty) -> None:
    with running(denoiser, max_batch_size=5) as engine:
        for inbox in submit_all(engine, strangers()):
            inbox.all()

    assert max(denoiser.forwards_seen) <= 5


class Mixing(DiffusersDenoiser):
    """A model that accepts rows of several sizes in one call."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sizes_seen: list[set[torch.Size]] = []

    @property
    def fixed_step_cost(self) -> None:
        """Returns None: batching always helps, as on a GPU."""

    def max_vae_batch(self, height: int, width: int) -> int:
        return 16

    def batch_key(self, text: TextInput) -> Hashable:
        return ()

    def denoise(
        self,
        latents: Sequence[Tensor],
        timesteps: Tensor,
        conditionings: Sequence[Conditioning],
    ) -> Sequence[Tensor]:
        self.sizes_seen.append({row.shape for row in latents})
        rows = zip(latents, torch.split(timesteps, 1), conditionings, strict=True)
        return [super(Mixing, self).denoise([x], t, [row])[0] for x, t, row in rows]


def test_rows_of_several_sizes_share_a_batch_where_the_model_takes_them(
    tmp_path: Path, alone: list[list[Pixels]]
) -> None:
    folder = write_sd(tmp_path / "sd")
    denoiser = Mixing.load(str(folder), torch.device("cpu"), torch.float32)
    large = [
        replace(
            one,
            job_id=70 + index,
            params=replace(one.params, seed=3, samples=1),
            init_image=blocks(80, 64),
        )
        for index, one in enumerate(WANTED)
    ]
    jobs = [*strangers(), *large, *(replace(one, job_id=50 + i) for i, one in enumerate(WANTED))]
    with running(denoiser, max_batch_size=64) as engine:
        ends = [inbox.all() for inbox in submit_all(engine, jobs)]

    assert all(isinstance(events[-1], JobDone) for events in ends)
    assert images(ends[-3])[0].shape == (80, 64, 3)
    assert max(map(len, denoiser.sizes_seen)) >= 3
    assert [worst(images(ends[i - 2]), alone[i]) <= BOUND for i in (0, 1)] == [True, True]


def run_poisoned(denoiser: Faulty) -> tuple[Exception, list[list[Pixels]]]:
    """Returns the error of the failing job, and the images of the other jobs."""
    with running(denoiser) as engine:
        jobs = [WANTED[0], job(job_id=66, prompt=POISON), job(job_id=2)]
        inboxes = submit_all(engine, jobs)
        end = inboxes[1].all()[-1]
        assert isinstance(end, JobFailed)
        return end.error, [images(inboxes[0].all()), images(inboxes[2].all())]


@pytest.mark.parametrize("where", ["encode", "denoise"])
def test_an_error_stays_with_the_row_that_causes_it(
    denoiser: Faulty, alone: list[list[Pixels]], where: str
) -> None:
    cause = RuntimeError("boom")
    denoiser.fails[where] = cause
    error, others = run_poisoned(denoiser)

    assert error is cause
    assert worst(others[0], alone[0]) <= BOUND


def test_out_of_memory_fails_the_culprit_with_its_need(
    denoiser: Faulty, alone: list[list[Pixels]]
) -> None:
    denoiser.fails["denoise"] = torch.OutOfMemoryError("Tried to allocate 1.50 GiB. GPU 0 has")
    error, others = run_poisoned(denoiser)

    assert isinstance(error, OutOfMemoryError)
    assert (error.width, error.height, error.needed_bytes) == (72, 64, 3 * 2**29)
    assert worst(others[0], alone[0]) <= BOUND


def test_a_decode_that_fails_ends_the_job_and_not_the_engine(denoiser: Faulty) -> None:
    denoiser.fails["decode"] = RuntimeError("boom")
    with running(denoiser) as engine:
        first = run(engine, job())[-1]
        denoiser.heal()
        second = run(engine, job(job_id=2))[-1]

    assert (type(first), type(second)) == (JobFailed, JobDone)


def test_a_fault_outside_every_stage_ends_the_batch_and_not_the_engine(
    denoiser: Faulty, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise LookupError("unexpected")

    with running(denoiser) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(denoiser, "max_vae_batch", broken)
            (end,) = run(engine, job())
        assert isinstance(run(engine, job())[-1], JobDone)

    assert isinstance(end, JobFailed)
    assert isinstance(end.error, LookupError)


def test_a_failed_preview_costs_the_preview_only(denoiser: Faulty) -> None:
    denoiser.fails["preview"] = RuntimeError("boom")
    with running(denoiser) as engine:
        events = run(engine, job(preview_interval_steps=1, strength=1.0))

    assert isinstance(events[-1], JobDone)
    assert not [event for event in events if isinstance(event, PreviewReady)]


def test_an_image_with_values_that_are_not_finite_is_an_error(denoiser: Faulty) -> None:
    with running(denoiser) as engine:
        events = run(engine, job(guidance_scale=float("inf")))

    assert isinstance(events[-1], JobFailed)
    assert str(events[-1].error) == "the image has values that are not finite"


def test_a_scheduler_that_cannot_run_the_steps_fails_the_job(denoiser: Faulty) -> None:
    with running(denoiser) as engine:
        events = run(engine, job(scheduler="lcm", num_inference_steps=60))

    assert [type(event) for event in events] == [JobFailed]
    error = events[0].error
    assert isinstance(error, EngineError)
    assert str(error) == "scheduler lcm cannot run 60 steps of this model"


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"max_num_inference_steps": 3}, "tiny runs at most 3 steps"),
        ({"multiple": 16}, "tiny needs sides divisible by 16"),
    ],
)
def test_the_models_own_limits_hold(
    denoiser: Faulty, limits: dict[str, int], sentence: str
) -> None:
    with running(denoiser, **limits) as engine:
        (end,) = run(engine, job())

    assert isinstance(end, JobFailed)
    assert str(end.error) == sentence


def test_a_second_job_with_the_id_of_a_running_one_is_refused(denoiser: Faulty) -> None:
    first, second = ReplyInbox(), ReplyInbox()
    with running(denoiser) as engine:

        def sink(event: EngineEvent) -> None:
            first(event)
            if event == StageFinished(stage=Stage.IMAGE_ENCODED):
                engine.submit(job(), second)

        engine.submit(job(), sink)
        assert isinstance(first.all()[-1], JobDone)
        assert [type(event) for event in second.all()] == [JobFailed]


def test_a_prompt_is_encoded_once(denoiser: Faulty, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    pipeline = denoiser._model.pipeline
    encode: Callable[..., Any] = pipeline.encode_prompt

    def spy(prompts: list[str], **options: Any) -> Any:
        seen.append(prompts)
        return encode(prompts, **options)

    monkeypatch.setattr(pipeline, "encode_prompt", spy)
    with running(denoiser) as engine:
        for guidance_scale in (1.0, 3.0, 4.0):
            run(engine, job(prompt="only once", guidance_scale=guidance_scale))

    assert [prompt for prompts in seen for prompt in prompts].count("only once") == 1


def test_images_that_do_not_fit_together_are_decoded_one_by_one(
    denoiser: Faulty, alone: list[list[Pixels]]
) -> None:
    denoiser.most_images = 1
    with running(denoiser) as engine:
        found = images(run(engine, WANTED[0]))

    assert worst(found, alone[0]) <= BOUND
