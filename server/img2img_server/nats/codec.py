"""Domain objects as MessagePack bytes and back.

During a rolling update roles of two successive versions exchange messages: a reader ignores fields
that it does not know, fields that were not sent take their defaults (so a new field needs one), and
an event of an unknown type decodes to None.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar, get_args

import msgspec

from img2img_server.domain.events import TERMINAL, Envelope, Event

T = TypeVar("T")

_encoder: Final = msgspec.msgpack.Encoder()
_decoders: Final[dict[type, msgspec.msgpack.Decoder[Any]]] = {}


class UndecodableError(Exception):
    """The bytes do not describe the expected type."""


def encode(value: object) -> bytes:
    """Encodes a domain dataclass as a map of its fields."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """Decodes a value of the type `kind`. Raises UndecodableError."""
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value: T = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UndecodableError(f"not a {kind.__name__}: {error}") from error
    return value


class EventHead(msgspec.Struct, frozen=True):
    """The fields of an event log's entry that every type of event has: {"sequence": 3,
    "type": "Queued", "time": 1.7e9, "job_id": 10000001, "event": {…}}."""

    sequence: int
    time: float
    job_id: int
    type: str
    event: msgspec.Raw
    previous: int = -1
    log_bytes: int = 0  # of the events before this one

    @property
    def is_terminal(self) -> bool:
        return self.type in _TERMINAL_NAMES


_EVENT_TYPES: Final[dict[str, type]] = {kind.__name__: kind for kind in get_args(Event)}
_TERMINAL_NAMES: Final = frozenset(kind.__name__ for kind in TERMINAL)


def encode_event(envelope: Envelope, log_bytes: int = 0) -> bytes:
    """Encodes an envelope; the event is tagged with the name of its class.

    Args:
        log_bytes: The bytes of the events before it.
    """
    head = EventHead(
        sequence=envelope.sequence,
        time=envelope.time,
        job_id=envelope.job_id,
        type=type(envelope.event).__name__,
        event=msgspec.Raw(encode(envelope.event)),
        previous=envelope.previous,
        log_bytes=log_bytes,
    )
    return encode(head)


def decode_head(data: bytes) -> EventHead:
    """Decodes the head of an envelope, without its event. Raises UndecodableError."""
    return decode(data, EventHead)


def decode_event(data: bytes) -> Envelope | None:
    """Decodes an envelope.

    Returns:
        None when a later version wrote the event: its type or a value in it, for example a stage,
        is unknown here.

    Raises:
        UndecodableError: The bytes are no envelope, or hold an unknown terminal event.
    """
    head = decode_head(data)
    kind = _EVENT_TYPES.get(head.type)
    if kind is None:
        return None
    try:
        event: Event = decode(bytes(head.event), kind)
    except UndecodableError:
        if head.is_terminal:  # A terminal event must not be skipped.
            raise
        return None
    return Envelope(
        sequence=head.sequence,
        time=head.time,
        job_id=head.job_id,
        event=event,
        previous=head.previous,
    )
