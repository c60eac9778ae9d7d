"""Encoded events: one encoding for all streams, equal for both calls that stream events."""

from __future__ import annotations

import pytest

from img2img.v1 import service_pb2
from img2img_server.api import convert, encoded
from img2img_server.api.encoded import EncodedEvents, streamed
from img2img_server.domain.events import EncodedImage, Envelope, SampleFinished


def envelope(sequence: int, size: int = 10) -> Envelope:
    image = EncodedImage(
        data=b"x" * size, media_type="image/png", sha256="a" * 64, width=8, height=8
    )
    event = SampleFinished(sample=0, seed=1, image=image)
    return Envelope(sequence=sequence, time=1.0, job_id=10_000_001, event=event)


def test_the_encoding_is_a_response_of_generate_and_of_watch_job() -> None:
    message = convert.event(envelope(1))
    event = streamed(message)
    assert event.kind == "sample_finished"
    for response in (service_pb2.GenerateResponse, service_pb2.WatchJobResponse):
        assert response.FromString(event.data).event == message
        assert response(event=message).SerializeToString() == event.data


def test_an_event_is_encoded_once_and_the_kept_bytes_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoded, "KEPT_BYTES", 3_500)
    events = EncodedEvents()
    first = events.get(envelope(1, 1000))
    assert events.get(envelope(1, 1000)) is first
    for sequence in range(2, 6):
        events.get(envelope(sequence, 1000))
    assert events.get(envelope(1, 1000)) is not first
    assert events._bytes <= 3_500
