"""enhance_prompt through the service: what the job says, and what the engine gets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from img2img.v1 import job_pb2
from img2img_server.prompts.choose import NO_REWRITER
from img2img_server.prompts.rules import RuleRewriter
from img2img_server.testing.bus import memory_bus
from img2img_server.testing.fake_engine import FakeEngine
from img2img_server.worker.lease import REWRITER_FAILED
from tests.http_stack import running_gateway
from tests.stack import Api, running_api, running_stack, running_worker, settings, spec

BY_MODEL = settings(prompt_rewriter="model", prompt_model="models/writer")
OFF = settings(prompt_rewriter="off")


class Writer:
    """A rewriter on the worker: slow to think, or out of order."""

    warning = ""

    def __init__(self, *, broken: bool = False) -> None:
        self.asked: list[tuple[str, int]] = []
        self._broken = broken

    def rewrite(self, prompt: str, seed: int) -> str:
        self.asked.append((prompt, seed))
        if self._broken:
            raise RuntimeError("out of words")
        return f"{prompt} by model {seed}"


async def run_to_end(api: Api, **changes: Any) -> job_pb2.Job:
    async for message in api.generate(spec(**changes)):
        event = message.event
    return getattr(event, event.WhichOneof("event")).job


async def test_rules_rewrite_before_the_job_is_made() -> None:
    async with running_stack() as stack:
        job = await stack.api.create(spec(enhance_prompt=True))
        expected = RuleRewriter().rewrite("a harbour at dusk", 1)
        assert expected != "a harbour at dusk"
        assert (job.spec.prompt, job.original_prompt, job.warning) == (
            expected,
            "a harbour at dusk",
            "",
        )


async def test_a_prompt_that_nobody_asked_to_rewrite_stays() -> None:
    async with running_stack() as stack:
        job = await stack.api.create(spec())
        assert job.spec.prompt == job.original_prompt == "a harbour at dusk"


async def test_the_http_answer_has_the_text_used() -> None:
    async with running_gateway() as gateway:
        told = (await gateway.create(prompt="a harbour", seed=1, enhance_prompt="yes")).json()
        assert told["meta"]["prompt"] == RuleRewriter().rewrite("a harbour", 1)
        assert (told["meta"]["enhance_prompt"], told["warning"]) == ("yes", "")


async def test_off_uses_the_prompt_as_sent_and_says_so() -> None:
    bus = memory_bus()
    async with running_worker(bus), running_api(bus, OFF) as api:
        job = await run_to_end(api, enhance_prompt=True)
        assert (job.spec.prompt, job.warning) == ("a harbour at dusk", NO_REWRITER)
        assert (await run_to_end(api)).warning == ""


async def test_a_model_rewrites_when_the_worker_takes_the_job() -> None:
    bus, writer = memory_bus(), Writer()
    async with running_worker(bus, rewriter=writer), running_api(bus, BY_MODEL) as api:
        job = await run_to_end(api, enhance_prompt=True)
        assert job.state == job_pb2.Job.STATE_SUCCEEDED
        assert (job.spec.prompt, job.original_prompt, job.warning) == (
            "a harbour at dusk by model 1",
            "a harbour at dusk",
            "",
        )
        await run_to_end(api)
        assert writer.asked == [("a harbour at dusk", 1)]


async def test_the_engine_gets_the_text_that_the_record_names() -> None:
    class Fails(Writer):
        def rewrite(self, prompt: str, seed: int) -> str:
            return f"fail:{prompt}"  # the fake engine fails with what it was asked to paint

    bus = memory_bus()
    async with running_worker(bus, rewriter=Fails()), running_api(bus, BY_MODEL) as api:
        job = await run_to_end(api, enhance_prompt=True)
        assert job.error.message == "a harbour at dusk"


async def test_a_model_that_fails_does_not_fail_the_job() -> None:
    bus = memory_bus()
    writer = Writer(broken=True)
    async with running_worker(bus, rewriter=writer), running_api(bus, BY_MODEL) as api:
        job = await run_to_end(api, enhance_prompt=True)
        assert (job.state, job.spec.prompt, job.warning) == (
            job_pb2.Job.STATE_SUCCEEDED,
            "a harbour at dusk",
            REWRITER_FAILED,
        )


@pytest.mark.parametrize("handed_back", [False, True])
async def test_a_second_attempt_keeps_the_text_of_the_first(handed_back: bool) -> None:
    bus = memory_bus(ack_wait_seconds=0.3)
    first, second = Writer(), Writer()
    async with running_api(bus, BY_MODEL) as api:
        engine = FakeEngine(hold_after=1)
        config = settings(drain_seconds=0)
        async with running_worker(bus, engine, rewriter=first, config=config) as worker:
            job = await api.create(spec(enhance_prompt=True))
            async for message in api.watch(job.name):
                if message.event.WhichOneof("event") == "step":
                    break
            if handed_back:
                await worker.drained()
            else:
                worker.task.cancel()
                await asyncio.wait([worker.task])
        async with running_worker(bus, rewriter=second, name="w2"):
            async for _ in api.watch(job.name):
                pass
        done = await api.get(job.name)
        assert (done.state, done.spec.prompt) == (
            job_pb2.Job.STATE_SUCCEEDED,
            "a harbour at dusk by model 1",
        )
        assert (len(first.asked), second.asked) == (1, [])
