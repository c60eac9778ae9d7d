"""enhance_prompt in the whole service: the record of the job, and the prompt for the engine."""

from __future__ import annotations

from typing import Any

from img2img.v1 import job_pb2
from img2img_server.prompts import NO_REWRITER, rewrite
from img2img_server.testing.bus import memory_bus
from tests.http_stack import running_gateway
from tests.stack import Api, running_api, running_stack, running_worker, settings, spec

OFF = settings(prompt_rewriter="off")


async def run_to_end(api: Api, **changes: Any) -> job_pb2.Job:
    async for message in api.generate(spec(**changes)):
        event = message.event
    return getattr(event, event.WhichOneof("event")).job


async def test_rules_rewrite_before_the_job_is_made() -> None:
    async with running_stack() as stack:
        job = await stack.api.create(spec(enhance_prompt=True))
        expected = rewrite("a harbour at dusk", 1)
        assert expected != "a harbour at dusk"
        assert (job.spec.prompt, job.original_prompt, job.warning) == (
            expected,
            "a harbour at dusk",
            "",
        )


async def test_a_prompt_without_enhance_prompt_stays() -> None:
    async with running_stack() as stack:
        job = await stack.api.create(spec())
        assert job.spec.prompt == job.original_prompt == "a harbour at dusk"


async def test_the_http_answer_has_the_text_used() -> None:
    async with running_gateway() as gateway:
        reported = (await gateway.create(prompt="a harbour", seed=1, enhance_prompt="yes")).json()
        assert reported["meta"]["prompt"] == rewrite("a harbour", 1)
        assert (reported["meta"]["enhance_prompt"], reported["warning"]) == ("yes", "")


async def test_off_uses_the_prompt_as_sent_and_says_so() -> None:
    bus = memory_bus()
    async with running_worker(bus), running_api(bus, OFF) as api:
        job = await run_to_end(api, enhance_prompt=True)
        assert (job.spec.prompt, job.warning) == ("a harbour at dusk", NO_REWRITER)
        assert (await run_to_end(api)).warning == ""


async def test_the_engine_gets_the_text_that_the_record_names() -> None:
    async with running_stack() as stack:
        # The fake engine fails with the text after "fail:".
        job = await run_to_end(stack.api, prompt="fail:a harbour", enhance_prompt=True, seed=1)
        assert job.spec.prompt == rewrite("fail:a harbour", 1) != "fail:a harbour"
        assert job.error.message == job.spec.prompt.removeprefix("fail:")
