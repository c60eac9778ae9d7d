"""Parts of webhook delivery that need no network: signatures, delays, bodies and the record."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from standardwebhooks import Webhook
from structlog.testing import capture_logs

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import responses
from img2img_server.domain.job import Job, State
from img2img_server.domain.params import JobParams
from img2img_server.domain.tenants import TENANT_RULE
from img2img_server.interfaces.records import Stored, UnreadableError
from img2img_server.outbound.retry_after import seconds_of
from img2img_server.settings import SettingsError
from img2img_server.testing.memory_records import MemoryJobStore
from img2img_server.testing.memory_webhooks import MemoryWebhookOutbox
from img2img_server.webhooks.dispatcher import DELAYS_SECONDS, BackoffPolicy, WebhookDispatcher
from img2img_server.webhooks.record import announce, set_status
from img2img_server.webhooks.sender import Outcome
from img2img_server.webhooks.signature import Signer

SECRET = "whsec_bG9jYWwtdGVzdC1zZWNyZXQtMzItYnl0ZXMtbG9uZyE="
OTHER = "whsec_" + base64.b64encode(bytes(range(64))).decode()
BODY = (
    b'{"status":"failed","id":10000042,"message":"Processing failed: out of memory",'
    b'"output":[],"track_id":"order-77"}'
)


def ended(**params: object) -> Job:
    return Job(
        id=10_000_042,
        tenant="acme",
        params=JobParams(prompt="a cat", **params),  # type: ignore[arg-type]
        file_prefix="5e0c8a0e",
        future_urls=(),
        create_time=1.0,
        state=State.SUCCEEDED,
    )


def test_the_signature_is_that_of_the_contracts_vector() -> None:
    assert Signer(SECRET).headers(10_000_042, 1767225600, BODY) == {
        "webhook-id": "msg_10000042",
        "webhook-timestamp": "1767225600",
        "webhook-signature": "v1,j2zUSd2y4N6M805OrStL4cuxJBikhxveG3j62ZGDJhY=",
    }


def test_a_tenant_has_secrets_of_its_own_which_change_without_a_restart(tmp_path: Path) -> None:
    def signature(tenant: str) -> str:
        return signer.headers(1, 1767225600, BODY, tenant)["webhook-signature"]

    def signed_by(*secrets: str) -> str:
        return Signer(" ".join(secrets)).headers(1, 1767225600, BODY)["webhook-signature"]

    third = "whsec_" + base64.b64encode(b"3" * 24).decode()
    file = tmp_path / "secrets.toml"
    file.write_text(f'shop = ["{OTHER}"]\n')
    signer = Signer(SECRET, file)
    assert (signature("shop"), signature("lab")) == (signed_by(OTHER), signed_by(SECRET))
    file.write_text(f'shop = ["{third}", "{OTHER}"]\nlab = ["{third}"]\n')
    assert (signature("shop"), signature("lab")) == (signed_by(third, OTHER), signed_by(third))
    for broken in (
        'shop = ["whsec_short"]',
        f'shop = "{OTHER}"',
        "shop = []",
        "shop = [1]",
        f'"a b" = ["{OTHER}"]',
        f'Shop = ["{OTHER}"]',
        'shop = ["whsec_äääääääääääääääääääääääääääääääääääääääää"]',
        "no toml",
    ):
        file.write_text(broken)
        with capture_logs() as logs:
            assert signature("shop") == signed_by(third, OTHER)
        assert "IMG2IMG_WEBHOOK_SECRETS_FILE" in logs[0]["error"]
        assert OTHER not in str(logs)
        with pytest.raises(SettingsError, match="IMG2IMG_WEBHOOK_SECRETS_FILE"):
            Signer(file=file)


def test_the_webhook_secrets_have_the_names_that_keys_can_have(tmp_path: Path) -> None:
    file = tmp_path / "secrets.toml"
    file.write_text(f'"a b" = ["{OTHER}"]\n')
    with pytest.raises(SettingsError) as refused:
        Signer(file=file)
    text = str(refused.value)
    assert text.startswith(f"IMG2IMG_WEBHOOK_SECRETS_FILE: {file}: the name of a tenant must have")
    assert text.endswith("; it is 'a b'")
    assert TENANT_RULE in text


def test_the_body_of_a_failure_is_that_of_the_contracts_vector() -> None:
    job = job_pb2.Job(
        id=10_000_042,
        state=job_pb2.Job.STATE_FAILED,
        error=job_pb2.JobError(reason="OUT_OF_MEMORY", message="out of memory"),
        spec=job_pb2.JobSpec(track_id="order-77"),
    )
    assert responses.webhook(job, []) == BODY


def test_the_body_of_a_success_has_the_keys_of_the_contract() -> None:
    spec = job_pb2.JobSpec(track_id="7", annotations={"http.track_id_type": "integer"})
    job = job_pb2.Job(id=10_000_042, state=job_pb2.Job.STATE_SUCCEEDED, spec=spec)
    job.timings.engine.FromMilliseconds(1104)
    found = json.loads(responses.webhook(job, ["https://img.example.com/é.png"]))
    assert len(found.pop("meta")) == 28
    assert found == {
        "status": "success",
        "id": 10_000_042,
        "output": ["https://img.example.com/é.png"],
        "generationTime": 1.1,
        "track_id": 7,
        "proxy_links": ["https://img.example.com/é.png"],
        "nsfw_content_detected": False,
        "warning": "",
    }


def test_a_note_of_a_stranger_does_not_break_the_track_id() -> None:
    spec = job_pb2.JobSpec(track_id="seven", annotations={"http.track_id_type": "integer"})
    assert responses.track_id(job_pb2.Job(spec=spec)) == "seven"


def test_two_secrets_give_two_signatures_either_of_which_verifies() -> None:
    headers = Signer(f"{SECRET} {OTHER}").headers(1, 1767225600, BODY)
    first, second = headers["webhook-signature"].split(" ")
    assert first == Signer(SECRET).headers(1, 1767225600, BODY)["webhook-signature"]
    assert second == Signer(OTHER).headers(1, 1767225600, BODY)["webhook-signature"]
    assert first != second
    assert Webhook(OTHER)  # The reference library accepts the signature, too.


def test_without_a_secret_there_is_no_signature() -> None:
    assert set(Signer().headers(1, 1, b"{}")) == {"webhook-id", "webhook-timestamp"}


@pytest.mark.parametrize(
    "secret",
    [
        "bG9jYWwtdGVzdC1zZWNyZXQtMzItYnl0ZXMtbG9uZyE=",
        "whsec_",
        "whsec_!!",
        "whsec_" + base64.b64encode(bytes(23)).decode(),
        "whsec_" + base64.b64encode(bytes(65)).decode(),
    ],
)
def test_a_secret_of_another_form_is_refused_without_being_shown(secret: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Signer(secret)
    assert secret.removeprefix("whsec_")[:8] not in str(caught.value) or secret == "whsec_"


def test_pauses_follow_the_contracts_table_for_eight_attempts() -> None:
    shortest = BackoffPolicy(uniform=lambda low, high: low)
    longest = BackoffPolicy(uniform=lambda low, high: high)
    assert [shortest.after(n) for n in range(1, 9)] == [*(0.8 * d for d in DELAYS_SECONDS), None]
    assert [longest.after(n) for n in range(1, 9)] == [*(1.2 * d for d in DELAYS_SECONDS), None]
    assert DELAYS_SECONDS == (5, 30, 2 * 60, 10 * 60, 30 * 60, 2 * 3600, 6 * 3600)


def test_pauses_differ_by_chance_within_a_fifth() -> None:
    drawn = [BackoffPolicy().after(1) or 0.0 for _ in range(200)]
    assert 4.0 <= min(drawn) < 4.5
    assert 5.5 < max(drawn) <= 6.0


def test_retry_after_lengthens_a_pause_up_to_an_hour_and_never_shortens_it() -> None:
    pauses = BackoffPolicy(uniform=lambda low, high: 1.0)
    assert pauses.after(1, 2.0) == 5.0
    assert pauses.after(1, 60.0) == 60.0
    assert pauses.after(1, 90_000.0) == 3600.0
    assert pauses.after(7, 3600.0) == 6 * 3600.0
    assert pauses.after(8, 60.0) is None


def test_what_finds_no_place_waits_twice_as_long_each_time_up_to_five_minutes() -> None:
    pauses = BackoffPolicy(uniform=lambda low, high: high)
    waits = [pauses.overflow_delay(times) for times in (1, 2, 3, 6, 7, 8, 5000)]
    assert waits == [6.0, 12.0, 24.0, 192.0, 360.0, 360.0, 360.0]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        (" 5 ", 5.0),
        ("9" * 40, 999_999_999.0),
        (formatdate(1_000_090, usegmt=True), 90.0),
        (formatdate(999_000, usegmt=True), 0.0),
        ("", 0.0),
        ("soon", 0.0),
        ("-5", 0.0),
        ("²", 0.0),
        ("Thu, 01 Jan 99999 00:00:00 GMT", 0.0),
        ("Thu, 01 Jan 2026 00:00:00 +99999999999999999999", 0.0),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str, seconds: float) -> None:
    assert seconds_of(header, 1_000_000.0) == seconds


async def test_a_job_without_webhook_puts_nothing_into_the_outbox() -> None:
    outbox, jobs = MemoryWebhookOutbox(), MemoryJobStore()
    await announce(outbox, jobs, ended())
    assert await outbox.pull(1, 0.01) == []


async def test_a_full_outbox_gives_up_the_webhook_and_says_so() -> None:
    outbox, jobs, job = (
        MemoryWebhookOutbox(limit=0),
        MemoryJobStore(),
        ended(webhook="https://a.example"),
    )
    await jobs.create(job)
    await announce(outbox, jobs, job)
    stored = await jobs.get(job.tenant, job.id)
    assert stored is not None
    why = "too many webhooks of the tenant are waiting"
    assert stored.job == replace(job, webhook_status="failed", webhook_error=why)


async def test_the_status_is_written_past_a_change_under_way() -> None:
    class Busy(MemoryJobStore):
        """A store that changes a record right after the first read."""

        async def get(self, tenant: str, job_id: int) -> object:  # type: ignore[override]
            stored = await super().get(tenant, job_id)
            if stored and not stored.job.warning:
                await self.update(replace(stored.job, warning="changed"), stored.revision)
            return stored

    jobs, job = Busy(), ended(webhook="https://a.example")
    await jobs.create(job)
    await set_status(jobs, job, "success")
    stored = await MemoryJobStore.get(jobs, job.tenant, job.id)
    assert stored is not None
    assert stored.job == replace(job, warning="changed", webhook_status="success")


async def test_a_webhook_that_was_deferred_has_lost_no_attempt() -> None:
    async def post(address: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
        return Outcome(delivered=False, reason="the server answered 500")

    async def payload(job: Job) -> bytes:
        return BODY

    outbox, jobs, stop = MemoryWebhookOutbox(), MemoryJobStore(), asyncio.Event()
    job = ended(webhook="https://a.example")
    await jobs.create(job)
    await outbox.put(job)
    for _ in range(9):
        (pending,) = await outbox.pull(1, 5.0)
        await pending.retry(0.0)
    backoff = BackoffPolicy(delays_seconds=(0.0,) * 7)
    dispatcher = WebhookDispatcher(outbox, jobs, payload, post, Signer(), backoff, drain_seconds=5)
    with capture_logs() as logs:
        running = asyncio.create_task(dispatcher.run(stop))
        async with asyncio.timeout(30):
            while not (logs and logs[-1].get("status") == "failed"):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        stop.set()
        await running
    assert [line["attempt"] for line in logs if line["event"] == "webhook"] == list(range(1, 9))
    stored = await jobs.get(job.tenant, job.id)
    assert stored is not None
    assert (stored.job.webhook_status, stored.job.webhook_attempts) == ("failed", 8)


async def test_a_record_that_has_expired_is_left_alone() -> None:
    jobs = MemoryJobStore()
    await set_status(jobs, ended(webhook="https://a.example"), "success")
    assert await jobs.get("acme", 10_000_042) is None


async def test_a_record_that_cannot_be_read_holds_up_neither_webhooks_nor_the_service() -> None:
    class Unreadable(MemoryJobStore):
        """A store with a record of another version."""

        async def get(self, tenant: str, job_id: int) -> Stored | None:
            if job_id == first.id:
                raise UnreadableError("two versions apart")
            return await super().get(tenant, job_id)

    posted: asyncio.Queue[str] = asyncio.Queue()

    async def post(address: str, body: bytes, headers: Mapping[str, str]) -> Outcome:
        posted.put_nowait(headers["webhook-id"])
        return Outcome(delivered=True)

    async def payload(job: Job) -> bytes:
        return BODY

    first = ended(webhook="https://a.example")
    second = replace(first, id=first.id + 1)
    outbox, jobs, stop = MemoryWebhookOutbox(), Unreadable(), asyncio.Event()
    await jobs.create(second)
    deliverer = WebhookDispatcher(
        outbox, jobs, payload, post, Signer(), BackoffPolicy(), drain_seconds=5.0
    )
    running = asyncio.create_task(deliverer.run(stop))
    for job in (first, second):
        await outbox.put(job)
        assert await asyncio.wait_for(posted.get(), 30) == f"msg_{job.id}"
    stop.set()
    await running
    stored = await jobs.get(second.tenant, second.id)
    assert stored is not None
    assert stored.job.webhook_status == "success"
    # Both webhooks are delivered, and none is left to be redelivered.
    assert await outbox.pull(1, 0.01) == []
