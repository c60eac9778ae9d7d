"""Encodes each event once for all streams of an api."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from img2img.v1 import event_pb2, service_pb2
from img2img_server.api import convert
from img2img_server.domain.events import Envelope

KEPT_BYTES: Final = 32 * 2**20


@dataclass(frozen=True, slots=True)
class StreamedEvent:
    """An event as it is sent. `kind`: the name of its field in JobEvent.

    `data` is a GenerateResponse and a WatchJobResponse at the same time: both have only the event,
    in the same field.
    """

    kind: str
    data: bytes


def streamed(message: event_pb2.JobEvent) -> StreamedEvent:
    """Encodes a message of one stream."""
    data = service_pb2.WatchJobResponse(event=message).SerializeToString()
    return StreamedEvent(message.WhichOneof("event") or "", data)


def serializer(encode: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Returns a serializer of responses that leaves encoded ones unchanged."""
    return lambda response: response if isinstance(response, bytes) else encode(response)


class EncodedEvents:
    """Keeps the encodings of the events that were sent last, up to KEPT_BYTES."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, int], StreamedEvent] = OrderedDict()
        self._bytes = 0

    def get(self, envelope: Envelope) -> StreamedEvent:
        """Returns the encoding of an event that is not terminal."""
        key = (envelope.job_id, envelope.sequence)
        if found := self._kept.get(key):
            return found
        event = self._kept[key] = streamed(convert.event(envelope))
        self._bytes += len(event.data)
        while self._bytes > KEPT_BYTES:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= len(oldest.data)
        return event
