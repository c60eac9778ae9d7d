"""A webhook is delivered although every role dies, with real processes and servers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from receiver import receiving, until
from standardwebhooks import Webhook

from tests.processes import Role
from tests.real_stack import LONG, PHOTO, SECRET, RealStack, stack, worker

__all__ = ["stack", "worker"]
pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
PATH = "/api/v1/enterprise/realtime"


async def post(stack: RealStack, path: str, **fields: Any) -> dict[str, Any]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{stack.http_url}{PATH}/{path}", json={"key": "dev-key", **fields}) as answer,
    ):
        found: dict[str, Any] = await answer.json()
        return found


async def killed_and_restarted(*roles: Role) -> None:
    await asyncio.gather(*(role.kill() for role in roles))
    await asyncio.gather(*(role.start() for role in roles))


async def test_a_webhook_is_delivered_although_every_role_dies_on_the_way(
    stack: RealStack, worker: Role
) -> None:
    async with receiving(500, 200) as receiver, stack.client() as client:
        options = {key: value for key, value in LONG.items() if key != "output_format"}
        job = await client.create(
            "a cat", PHOTO, webhook=receiver.url, track_id="order-77", **options
        )
        async with client.watch(job) as stream:
            async for event in stream:
                if type(event).__name__ == "StepFinished":
                    break
        await killed_and_restarted(worker, stack.api, stack.gateway)  # The job is running.

        refused = await receiver.next()
        fetch = f"fetch/{job.id}"

        async def status() -> object:
            return (await post(stack, fetch)).get("webhook_status")

        await until(status, "retrying")
        before = await post(stack, fetch)
        # The webhook waits between two attempts.
        await killed_and_restarted(stack.api, stack.gateway)
        delivered = await receiver.next()
        reported = Webhook(SECRET).verify(delivered.body, delivered.headers)
        assert (delivered.body, delivered.headers["webhook-id"]) == (
            refused.body,
            f"msg_{job.id}",
        )
        assert (reported["status"], reported["track_id"]) == ("success", "order-77")
        await until(status, "success")
        after = await post(stack, fetch)
        assert after == before | {"webhook_status": "success"}
        assert reported["output"] == after["output"] == json.loads(refused.body)["output"]
        assert (await client.get(job)).attempt == 2
        assert receiver.arrived.empty()
