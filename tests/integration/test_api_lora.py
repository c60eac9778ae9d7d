"""LoRA and deadline on the way from the caller to the engine."""

from __future__ import annotations

import time
from dataclasses import replace

import grpc
import pytest

from img2img.v1 import job_pb2, service_pb2
from img2img_server.domain.params import Lora
from img2img_server.engine.base import EngineJob, Sink
from img2img_server.testing.fake_engine import FAKE_MODEL, FakeEngine
from tests.stack import DEV, refusal, running_stack, spec


class Listening(FakeEngine):
    """An engine that records its jobs."""

    def __init__(self) -> None:
        self.jobs: list[EngineJob] = []
        refused = (("wool", "it belongs to another model"),)
        super().__init__(replace(FAKE_MODEL, loras=("ink", "oil"), refused_loras=refused))

    def submit(self, job: EngineJob, sink: Sink) -> None:
        self.jobs.append(job)
        super().submit(job, sink)


async def test_loras_go_with_the_job_and_are_returned_to_callers() -> None:
    engine = Listening()
    async with running_stack(engine) as stack:
        found = await stack.api.stub.GetCapabilities(
            service_pb2.GetCapabilitiesRequest(), metadata=DEV
        )
        loras = [job_pb2.Lora(name="oil", scale=0.5), job_pb2.Lora(name="ink")]
        messages = [m async for m in stack.api.generate(spec(loras=loras))]
        [m async for m in stack.api.generate(spec())]

    assert list(found.models[0].loras) == ["ink", "oil"]
    assert dict(found.models[0].refused_loras) == {"wool": "it belongs to another model"}
    job = messages[-1].event.succeeded.job
    assert [(lora.name, lora.scale) for lora in job.spec.loras] == [("oil", 0.5), ("ink", 1.0)]
    assert [job.params.loras for job in engine.jobs] == [(Lora("oil", 0.5), Lora("ink")), ()]


async def test_an_unknown_lora_is_refused_with_the_known_ones() -> None:
    async with running_stack(Listening()) as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.create(spec(loras=[job_pb2.Lora(name="nope")]))

    assert refusal(caught.value).violations == {
        "loras": "loras must be of ink, oil; there is no 'nope'"
    }


async def test_the_callers_deadline_reaches_the_engine_unless_it_only_creates_a_job() -> None:
    engine = Listening()
    async with running_stack(engine) as stack:
        before = time.monotonic()
        request = service_pb2.GenerateRequest(spec=spec())
        [m async for m in stack.api.stub.Generate(request, metadata=DEV, timeout=20.0)]
        job = await stack.api.create(spec())
        [m async for m in stack.api.watch(job.name)]

    with_deadline, without = engine.jobs
    assert with_deadline.deadline is not None
    # gRPC sends the remaining time in tenths of a second, rounded up.
    assert before + 19 < with_deadline.deadline < time.monotonic() + 20.2
    assert without.deadline is None
