"""What the api brings to the delivery of webhooks: their bodies and its own settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from img2img_server.api import convert
from img2img_server.compat.modelslab import results
from img2img_server.domain.job import Job
from img2img_server.nats.bus import Bus
from img2img_server.settings import Settings
from img2img_server.webhooks.dispatcher import BackoffPolicy, WebhookDispatcher
from img2img_server.webhooks.sender import WebhookSender
from img2img_server.webhooks.signature import Signer

# The texts behind links. Raises StorageError.
InlineBase64 = Callable[[Sequence[str]], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class Webhooks:
    """How webhooks are sent. `texts`: puts texts in place of links to base64 files, when set."""

    post: WebhookSender
    signer: Signer
    pauses: BackoffPolicy = field(default_factory=BackoffPolicy)
    texts: InlineBase64 | None = None

    def deliverer(self, settings: Settings, bus: Bus) -> WebhookDispatcher:
        """The component that delivers what lies in the outbox."""

        async def payload(job: Job) -> bytes:
            message = convert.job(job, retention_hours=settings.retention_hours)
            output = results.links(message)
            if self.texts and job.params.base64:
                output = await self.texts(output)
            return results.webhook(message, output)

        return WebhookDispatcher(
            bus.outbox,
            bus.jobs,
            payload,
            self.post,
            self.signer,
            self.pauses,
            drain_seconds=settings.drain_seconds,
        )
