"""No log contains a secret or the path of a webhook (docs/http-contract.md#logs)."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from aiohttp import web
from receiver import receiving, until
from structlog.testing import capture_logs
from web_peers import serving

from img2img_server.api.keys import KeyRing, new_key
from img2img_server.api.server import Webhooks
from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.storage import tenant_s3
from img2img_server.storage.vault import new_key as new_storage_key
from img2img_server.testing.bus import memory_bus
from img2img_server.webhooks.dispatcher import BackoffPolicy
from img2img_server.webhooks.sender import webhook_sender
from img2img_server.webhooks.signature import Signer
from tests.http_stack import ENTERPRISE, fetch_photo, gateway_before
from tests.stack import Stack, running_api, running_worker, settings

ACCESS_KEY, SECRET_KEY = "AKIAEXAMPLE0S3KEY", "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLE"
WEBHOOK_SECRET = "bG9jYWwtdGVzdC1zZWNyZXQtMzItYnl0ZXMtbG9uZyE="
UPDATE = "/api/v1/enterprise/update_s3"
REFUSAL = f"""<?xml version="1.0"?><Error><Code>InvalidAccessKeyId</Code>
<Message>The key {ACCESS_KEY} with {SECRET_KEY} is not known.</Message>
<AWSAccessKeyId>{ACCESS_KEY}</AWSAccessKeyId></Error>"""


async def refuse(_: web.Request) -> web.Response:
    """Responds as S3 does, which repeats values of the request."""
    return web.Response(status=403, text=REFUSAL, content_type="application/xml")


async def test_logs_hold_no_s3_key_no_s3_secret_and_no_webhook_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tenant_s3, "FIRST_PAUSE_SECONDS", 0.001)
    caplog.set_level(logging.DEBUG)
    api_key, entry = new_key("shop", ["manage"])
    keys_file = tmp_path / "keys.toml"
    keys_file.write_text(entry)
    config = settings(outbound_allow="127.0.0.1")
    bus = memory_bus(storage_keys=new_storage_key())
    signer, once_more = Signer(f"whsec_{WEBHOOK_SECRET}"), BackoffPolicy(delays_seconds=(0.01,))
    post = webhook_sender(OutboundPolicy.parse("127.0.0.1"))
    with capture_logs() as logs:
        async with (
            serving(web.put("/{path:.*}", refuse)) as store,
            receiving(500) as receiver,
            running_worker(bus, config=config) as worker,
            running_api(
                bus,
                config,
                fetch=fetch_photo,
                keys=KeyRing(keys_file, dev_key=False),
                webhooks=Webhooks(post, signer, once_more),
            ) as api,
            gateway_before(Stack(bus, api, worker), outbound_allow="127.0.0.1") as gateway,
        ):
            details = {
                "key": api_key,
                "public_url": "https://cdn.example.com/",
                "region_name": "eu-west-1",
                "endpoint_url": f"http://127.0.0.1:{store}",
                "aws_access_key_id": ACCESS_KEY,
                "aws_secret_access_key": SECRET_KEY,
                "image_directory": "renders",
            }
            wrong = [{"endpoint_url": "ftp://x"}, {"public_url": ""}, {"deploy_type": "none"}]
            answers = [await gateway.http.post(UPDATE, json=details | change) for change in wrong]
            assert [answer.status_code for answer in answers] == [400, 400, 400]
            answers += [await gateway.http.post(UPDATE, json=details)]
            assert answers[-1].status_code == 200
            job = (await gateway.create(key=api_key, instant_response=True)).json()

            async def state() -> tuple[str, str]:
                fetched = await gateway.fetch(job["id"], key=api_key)
                answers.append(fetched)
                return fetched.json()["status"], fetched.json()["webhook_status"]

            await until(state, ("success", ""))
            assert "did not take the files" in answers[-1].json()["warning"]
            found = await gateway.create(key=api_key, webhook=receiver.url)
            assert found.status_code == 200, found.text
            job = found.json()
            await until(state, ("success", "failed"))
    said = {str(line["event"]) for line in logs}
    assert {"storage_settings_stored", "tenant_upload_failed", "webhook"} <= said
    everything = repr(logs) + caplog.text + "".join(answer.text for answer in answers)
    assert f"{ENTERPRISE}/fetch" in everything
    (attempt, *_) = [line for line in logs if line["event"] == "webhook"]
    assert attempt["url"] == f"http://127.0.0.1:{receiver.port}"
    assert "/hook" not in repr(logs) + caplog.text
    for hidden in (ACCESS_KEY, SECRET_KEY, WEBHOOK_SECRET, api_key):
        assert hidden not in everything
