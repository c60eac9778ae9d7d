"""What the api brings to the delivery of webhooks: their bodies and its own settings."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from img2img_server.api import convert
from img2img_server.compat.modelslab import results
from img2img_server.domain.job import Job
from img2img_server.nats.bus import Bus
from img2img_server.settings import Settings
from img2img_server.webhooks.deliverer import Deliverer
from img2img_server.webhooks.pauses import Pauses
from img2img_server.webhooks.post import Post
from img2img_server.webhooks.signature import Signer

# The texts behind links. Raises StorageError.
Texts = Callable[[Sequence[str]], Awaitable[list[str]]]


@dataclass(frozen=True, slots=True)
class Webhooks:
    """How webhooks are sent. `texts`: puts texts in place of links to base64 files, when set."""

    post: Post
    signer: Signer
    pauses: Pauses = field(default_factory=Pauses)
    texts: Texts | None = None

    def deliverer(self, settings: Settings, bus: Bus) -> Deliverer:
        """The component that delivers what lies in the outbox."""

        async def payload(job: Job) -> bytes:
            message = convert.job(job, retention_hours=settings.retention_hours)
            output = results.links(message)
            if self.texts and job.params.base64:
                output = await self.texts(output)
            return results.webhook(message, output)

        return Deliverer(
            bus.outbox,
            bus.jobs,
            payload,
            self.post,
            self.signer,
            self.pauses,
            drain_seconds=settings.drain_seconds,
        )
