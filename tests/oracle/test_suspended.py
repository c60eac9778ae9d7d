"""A request that is suspended between two steps and continues in another engine, for every family
and sampler.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest

from img2img_server.domain.events import StageFinished, StepFinished
from img2img_server.engine.base import (
    RESTARTED_WARNING,
    EngineEvent,
    EngineJob,
    JobDone,
    JobState,
    JobSuspended,
    SampleReady,
)
from img2img_server.engine.diffusers.denoiser import DiffusersDenoiser
from img2img_server.engine.diffusers.families import families as served
from img2img_server.imaging.base import Pixels
from img2img_server.nats import codec
from tests.engine_bench import (
    BOUND,
    ReplyInbox,
    blocks,
    difference,
    images,
    job,
    load,
    run,
    running,
)
from tests.oracle.harness import IS_FULL, OracleModel, families

SCHEDULERS = {family.name: family.schedulers for family in served()}


class Pair(NamedTuple):
    """Two denoisers that were loaded from the files of one model, as two workers do."""

    first: DiffusersDenoiser
    second: DiffusersDenoiser
    model: OracleModel
    schedulers: tuple[str, ...]


@pytest.fixture(scope="module", params=families())
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    model = next(iter(families()[request.param].values()))
    folder = model.write(tmp_path_factory.mktemp("model"))
    schedulers = model.schedulers or SCHEDULERS[request.param]
    return Pair(load(folder), load(folder), model, schedulers)


def wanted(pair: Pair, scheduler: str, **changes: object) -> EngineJob:
    options = {
        "scheduler": scheduler,
        "guidance_scale": pair.model.guidance_scales[-1],
        "negative_prompt": "fog",
        "strength": 1.0,
        "num_inference_steps": min(6, pair.model.most_steps),
        "init_image": blocks(*pair.model.sizes[0]),
        "seeds": (7, 8),
    }
    return job(**options | dict(pair.model.options) | changes)


def suspended_after(
    denoiser: DiffusersDenoiser, one: EngineJob, step: int, *others: EngineJob
) -> tuple[list[EngineEvent], JobState]:
    """Runs a job until its last sample has taken this step. Returns its events and its state as
    another process reads it.
    """
    inbox, last = ReplyInbox(), one.indices[-1]
    with running(denoiser) as engine:

        def sink(event: EngineEvent) -> None:
            if isinstance(event, StepFinished) and (event.sample, event.step) == (last, step):
                engine.suspend(one.job_id)
            inbox(event)

        for other in others:
            engine.submit(other, ReplyInbox())
        engine.submit(one, sink)
        events = inbox.all()
    assert isinstance(events[-1], JobSuspended), events[-1]
    return events, codec.decode(codec.encode(events[-1].state), JobState)


def continued(
    denoiser: DiffusersDenoiser, one: EngineJob, before: list[EngineEvent], state: JobState
) -> list[Pixels]:
    """Continues a job. Returns its images; no step may run twice."""
    stored = frozenset(event.sample for event in before if isinstance(event, SampleReady))
    with running(denoiser) as engine:
        after = run(engine, replace(one, state=state, stored=stored))
    done = after[-1]
    assert isinstance(done, JobDone), done
    assert RESTARTED_WARNING not in done.warnings
    assert not any(isinstance(event, StageFinished) for event in after)
    events = [*before, *after]
    steps = [(event.sample, event.step) for event in events if isinstance(event, StepFinished)]
    assert len(steps) == len(set(steps)) == len(one.seeds) * state.total == done.timings.steps
    return images([event for event in events if event is not before[-1]])


def test_a_suspended_request_gives_the_same_image_with_every_sampler(pair: Pair) -> None:
    assert pair.first.state_key == pair.second.state_key
    for scheduler in pair.schedulers:
        one = wanted(pair, scheduler, seeds=(7,))
        with running(pair.first) as engine:
            expected = images(run(engine, one))
        schedule = pair.first.schedule(
            scheduler, one.params.num_inference_steps, 1.0, one.height, one.width
        )
        total = len(schedule.steps)
        # Some samplers remember several steps.
        steps = range(1, total) if IS_FULL else {total // 2} - {0}
        for step in steps:
            before, state = suspended_after(pair.first, one, step)
            found = continued(pair.second, one, before, state)
            assert len(found) == len(expected)
            for image, alone in zip(found, expected, strict=True):
                assert np.array_equal(image, alone), (scheduler, step)


def test_a_request_that_was_suspended_in_a_batch_stays_within_the_bound(pair: Pair) -> None:
    scheduler = pair.schedulers[len(pair.schedulers) // 2]
    one = wanted(pair, scheduler)
    others = [
        wanted(pair, each, job_id=10 + index, seeds=(20 + index,), prompt="a stranger")
        for index, each in enumerate(pair.schedulers[:3])
    ]
    with running(pair.first) as engine:
        expected = images(run(engine, one))
    before, state = suspended_after(pair.first, one, 1, *others)
    found = continued(pair.second, one, before, state)
    assert max(map(difference, found, expected)) <= BOUND
