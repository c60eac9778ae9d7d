"""Domain objects as MessagePack bytes and back.

Roles of two neighbouring versions talk while a cluster is rolled: fields that a reader does not
know are ignored, fields that a writer did not send take their defaults (so a new field needs one),
and an event of an unknown type decodes to None.
"""

from __future__ import annotations

from typing import Any, Final, TypeVar, get_args

import msgspec

from img2img_server.domain.events import TERMINAL, Envelope, Event

T = TypeVar("T")

_encoder: Final = msgspec.msgpack.Encoder()
_decoders: Final[dict[type, msgspec.msgpack.Decoder[Any]]] = {}


class UndecodableError(Exception):
    """The bytes are not what they should be: a stranger's, or two versions apart."""


def encode(value: object) -> bytes:
    """A domain dataclass as a map of its fields."""
    return _encoder.encode(value)


def decode(data: bytes, kind: type[T]) -> T:
    """The dataclass `kind` from its bytes.

    Raises:
        UndecodableError: they do not describe one.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        decoder = _decoders[kind] = msgspec.msgpack.Decoder(kind)
    try:
        value: T = decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UndecodableError(f"not a {kind.__name__}: {error}") from error
    return value


class EventHead(msgspec.Struct, frozen=True):
    """What is known about an entry of a log, whatever its type: {"sequence": 3, "type": "Queued",
    "time": 1.7e9, "job_id": 10000001, "event": {…}}."""

    sequence: int
    time: float
    job_id: int
    type: str
    event: msgspec.Raw

    @property
    def is_terminal(self) -> bool:
        return self.type in _TERMINAL_NAMES


_EVENT_TYPES: Final[dict[str, type]] = {kind.__name__: kind for kind in get_args(Event)}
_TERMINAL_NAMES: Final = frozenset(kind.__name__ for kind in TERMINAL)


def encode_event(envelope: Envelope) -> bytes:
    """An envelope, its event tagged by the name of its class."""
    head = EventHead(
        sequence=envelope.sequence,
        time=envelope.time,
        job_id=envelope.job_id,
        type=type(envelope.event).__name__,
        event=msgspec.Raw(encode(envelope.event)),
    )
    return encode(head)


def decode_head(data: bytes) -> EventHead:
    """The envelope without looking into its event. Raises UndecodableError."""
    return decode(data, EventHead)


def decode_event(data: bytes) -> Envelope | None:
    """The envelope, or None when a later version wrote its event: a type that is not known here, or
    a value, for example a stage, that is not. Raises UndecodableError."""
    head = decode_head(data)
    kind = _EVENT_TYPES.get(head.type)
    if kind is None:
        return None
    try:
        event: Event = decode(bytes(head.event), kind)
    except UndecodableError:
        if head.is_terminal:  # must not be skipped
            raise
        return None
    return Envelope(sequence=head.sequence, time=head.time, job_id=head.job_id, event=event)
