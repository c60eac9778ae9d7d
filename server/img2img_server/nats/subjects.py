"""Names in NATS: streams, buckets, subjects.

img2img.jobs.<model>.<lane>.<size>.<slot>.<tenant>  the work queue
img2img.dead.<model>.<lane>.<size>.<slot>.<tenant>  dead letters
img2img.events.<job id>.log              a job's numbered events
img2img.events.<job id>.preview.<sample> its newest preview
img2img.event-use.<tenant>               one entry for each ended log
img2img.notices.<job id>.…               headers of each stored event, not stored
img2img.webhooks.<tenant>                webhooks of ended jobs, until delivered
img2img.ids.<tenant>                     one empty message a job id
img2img.permits.<tenant>                 one message for each unfinished job: its job id
img2img.states.<key>.<chunk>              the state of a suspended job
img2img.control.cancel                   not stored
img2img.control.command                  not stored
img2img.control.models                   commands to load or unload a model, not stored
img2img.control.streams                  between apis, not stored
img2img.control.usage                    device time by tenant, between workers, not stored
img2img.control.queued.<model>           a job waits, not stored
img2img.control.wanted.<model>           a worker is idle, not stored
"""

from __future__ import annotations

import re
import string
from typing import Final

from img2img_server.domain.params import Lane
from img2img_server.interfaces.queue import slot_of

JOBS: Final = "JOBS"
ALL_JOBS: Final = "img2img.jobs.>"
DEAD: Final = "DEAD"
EVENTS: Final = "EVENTS"
EVENT_USE: Final = "EVENT_USE"
IDS: Final = "IDS"
PERMITS: Final = "PERMITS"
STATES: Final = "STATES"
WEBHOOKS: Final = "WEBHOOKS"
WEBHOOKS_CONSUMER: Final = "webhooks"  # consumer that all api processes share

RECORDS_BUCKET: Final = "img2img-jobs"
REQUESTS_BUCKET: Final = "img2img-requests"
WORKERS_BUCKET: Final = "img2img-workers"
MODELS_BUCKET: Final = "img2img-models"
STORAGE_BUCKET: Final = "img2img-storage"
RETIRED_STORAGE_BUCKET: Final = "img2img-storage-retired"
USAGE_BUCKET: Final = "img2img-usage"
UPLOADS_BUCKET: Final = "img2img-uploads"
RATES_BUCKET: Final = "img2img-rates"

EVENTS_SUBJECT: Final = "img2img.events.>"
EVENT_USE_SUBJECT: Final = "img2img.event-use.>"
STATES_SUBJECT: Final = "img2img.states.>"
NOTICES_SUBJECT: Final = "img2img.notices.>"
CANCEL_SUBJECT: Final = "img2img.control.cancel"
COMMAND_SUBJECT: Final = "img2img.control.command"
MODELS_SUBJECT: Final = "img2img.control.models"
STREAMS_SUBJECT: Final = "img2img.control.streams"
USAGE_SUBJECT: Final = "img2img.control.usage"

_PLAIN: Final = frozenset((string.ascii_letters + string.digits + "_-").encode())


def token(text: str) -> str:
    """Encodes a text as one token of a subject or key: bytes other than [A-Za-z0-9_-] become =XX.

    Different texts have different tokens; the empty text is "=".
    """
    return "".join(chr(b) if b in _PLAIN else f"={b:02X}" for b in text.encode()) or "="


def text_of(encoded: str) -> str:
    """Returns the text of a token."""
    if encoded == "=":
        return ""
    plain = re.sub(rb"=([0-9A-F]{2})", lambda code: bytes([int(code[1], 16)]), encoded.encode())
    return plain.decode()


def jobs_subject(model: str, lane: Lane, size: int, tenant: str) -> str:
    slot = slot_of(tenant)
    return f"img2img.jobs.{token(model)}.{lane.value}.{size}.{slot}.{token(tenant)}"


def state_subject(key: str, chunk: str) -> str:
    """Returns the subject of one chunk of a suspended job's state; ">" stands for all chunks."""
    return f"img2img.states.{key}.{chunk}"


def model_filter(model: str) -> str:
    """Returns the filter for all jobs of one model."""
    return f"img2img.jobs.{token(model)}.>"


def source_filter(model: str, lane: Lane, size: int, slot: int) -> str:
    """Returns the filter for the jobs of one source."""
    return f"img2img.jobs.{token(model)}.{lane.value}.{size}.{slot}.*"


def tenant_filter(tenant: str) -> str:
    """Returns the filter for all jobs of one tenant."""
    return f"img2img.jobs.*.*.*.*.{token(tenant)}"


def source_consumer(model: str, lane: Lane, size: int, slot: int) -> str:
    """Returns the name of the consumer that all workers of a model share for a source."""
    return f"worker-{token(model)}-{lane.value}-{size}-{slot}"


def earlier_lane_filter(model: str, lane: Lane) -> str:
    """Returns the filter for jobs that an api of version 0.1.0 queued during a rolling update."""
    return f"img2img.jobs.{token(model)}.{lane.value}.*"


def earlier_lane_consumer(model: str, lane: Lane) -> str:
    """Returns the name of the consumer of these jobs, which workers of version 0.1.0 share."""
    return f"worker-{token(model)}-{lane.value}"


def queued_subject(model: str) -> str:
    return f"img2img.control.queued.{token(model)}"


def wanted_subject(model: str) -> str:
    return f"img2img.control.wanted.{token(model)}"


def dead_subject(jobs_subject: str) -> str:
    return jobs_subject.replace("img2img.jobs.", "img2img.dead.", 1)


def webhooks_subject(tenant: str) -> str:
    return f"img2img.webhooks.{token(tenant)}"


def ids_subject(tenant: str) -> str:
    return f"img2img.ids.{token(tenant)}"


def permits_subject(tenant: str) -> str:
    return f"img2img.permits.{token(tenant)}"


def log_subject(job_id: int) -> str:
    return f"img2img.events.{job_id}.log"


def preview_subject(job_id: int, sample: int) -> str:
    return f"img2img.events.{job_id}.preview.{sample}"


def events_filter(job_id: int) -> str:
    """Returns the filter for all events of one job."""
    return f"img2img.events.{job_id}.>"


def notices_filter(job_id: int) -> str:
    """Returns the filter for the notices about all events of one job."""
    return f"img2img.notices.{job_id}.>"


def event_use_subject(tenant: str) -> str:
    return f"img2img.event-use.{token(tenant)}"


def bucket_stream(bucket: str) -> str:
    """Returns the stream of a key-value bucket."""
    return f"KV_{bucket}"


def key_subject(bucket: str, key: str) -> str:
    return f"$KV.{bucket}.{key}"
