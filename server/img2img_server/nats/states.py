"""States of suspended jobs on the STATES stream, in chunks."""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress

from img2img_server.errors import UnavailableError
from img2img_server.interfaces.states import StateTooLargeError
from img2img_server.nats import subjects
from img2img_server.nats.connection import NatsConnection
from img2img_server.nats.faults import is_full
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
                *(self._publish(key, number, chunk) for number, chunk in enumerate(chunks))
            )
        except BaseException:
            with suppress(UnavailableError):
                await self.remove(key)
            raise
        return key

    async def _publish(self, key: str, number: int, chunk: bytes) -> None:
        subject = subjects.state_subject(key, str(number))
        try:
            await self._link.publish(subject, chunk, repeatable=True)
        except UnavailableError as error:
            if is_full(error.__cause__):
                raise StateTooLargeError("the states of other jobs need all the room") from error
            raise

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
