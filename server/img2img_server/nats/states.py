"""States of suspended jobs on the STATES stream, in chunks."""

from __future__ import annotations

import asyncio
import uuid

import nats.js.errors

from img2img_server.interfaces.states import StateTooLargeError
from img2img_server.nats import subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.topology import STATE_CHUNK_BYTES, STATES_BYTES

MOST_BYTES = STATES_BYTES // 4  # of one state


class JetStreamStates:
    """A JobStates on JetStream. The stream removes states that no worker took in time."""

    def __init__(self, link: NatsConnection) -> None:
        self._link = link

    async def save(self, job_id: int, data: bytes) -> str:
        if len(data) > MOST_BYTES:
            raise StateTooLargeError(f"it has {len(data)} bytes, more than {MOST_BYTES}")
        key = f"{job_id}-{uuid.uuid4().hex}"
        starts = range(0, len(data), STATE_CHUNK_BYTES)
        chunks = [data[start : start + STATE_CHUNK_BYTES] for start in starts]
        try:
            # A reader knows the number of bytes, so the order of the chunks' arrival is free.
            await asyncio.gather(
                *(
                    self._link.publish(
                        subjects.state_subject(key, str(number)), chunk, repeatable=True
                    )
                    for number, chunk in enumerate(chunks)
                )
            )
        except nats.js.errors.APIError as error:  # for example, the stream is full
            raise StateTooLargeError(str(error.description)) from error
        return key

    async def load(self, key: str, size: int) -> bytes | None:
        count = -(-size // STATE_CHUNK_BYTES)
        messages = [
            await self._link.last(subjects.STATES, subjects.state_subject(key, str(number)))
            for number in range(count)
        ]
        if not all(messages):
            return None
        return b"".join(message.data or b"" for message in messages if message)

    async def remove(self, key: str) -> None:
        subject = subjects.state_subject(key, ">")
        await self._link.ask(lambda: self._link.js.purge_stream(subjects.STATES, subject=subject))
