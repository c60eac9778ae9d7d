"""nats-server and weed (SeaweedFS) for one machine, their data under one folder.

<state_dir>/engines/lock           one supervisor at a time
<state_dir>/engines/s3.json        created once, mode 600: the user of weed, our key pair
<state_dir>/engines/nats.conf      written at every start, mode 600
<state_dir>/engines/nats.password  created once, mode 600
<state_dir>/engines/tls.{crt,key}  written at every start, mode 600: for the parts of weed
<state_dir>/engines/{nats,s3}/     data
<state_dir>/engines/{nats,s3}.log  their logs; .log.1: of the previous start
"""

from __future__ import annotations

import asyncio
import fcntl
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Final, Self

from img2img_server.devstack import weed
from img2img_server.devstack.child import HOST, Child, LocalServersError, ServerExitedError
from img2img_server.devstack.files import kept_secret
from img2img_server.devstack.nats import nats_server, nats_url
from img2img_server.ports import free_ports

START_SECONDS: Final = 30.0
START_TRIES: Final = 3
PORTS: Final = ("nats", *weed.PORTS)


class LocalServers(AsyncExitStack):
    """Both servers; they run while the context is open.

    Args:
        state_dir: Their files are in its folder `engines`.
        background: Entering only chooses the addresses; `serving` waits for the servers.

    Raises on entering:
        LocalServersError: A binary is missing, the folder is in use, or a server does not start.
    """

    def __init__(
        self, state_dir: Path, *, background: bool = False, payload_bytes: int = 0
    ) -> None:
        super().__init__()
        self.s3_access_key = self.s3_secret_key = ""
        self._background = background
        self._payload_bytes = payload_bytes
        self._serving: asyncio.Task[None] | None = None
        self._folder = state_dir.absolute() / "engines"
        self._ports: dict[str, int] = {}
        self._password = ""
        self._children: list[Child] = []

    @property
    def nats_url(self) -> str:
        """The URL with its password: for settings, not for logs."""
        return nats_url(self._ports["nats"], self._password)

    @property
    def s3_endpoint_url(self) -> str:
        return f"http://{HOST}:{self._ports['s3']}"

    async def died(self) -> ServerExitedError:
        """Waits until a server ends by itself. Returns which one, and why."""
        ends = [asyncio.ensure_future(child.ended()) for child in self._children]
        try:
            done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for end in ends:
                end.cancel()

    async def __aenter__(self) -> Self:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._folder.chmod(0o700)
            self.enter_context(_lock(self._folder / "lock"))
            self.push_async_callback(self._stop)
            self.s3_access_key, self.s3_secret_key = weed.key_pair(self._folder)
            self._password = kept_secret(self._folder / "nats.password")
            self._choose()
            self._serving = asyncio.create_task(self._start())
            if not self._background:
                await self.serving()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def serving(self) -> None:
        """Returns when both respond. Raises LocalServersError."""
        assert self._serving is not None, "its context is not open"
        await asyncio.shield(self._serving)

    def _choose(self) -> None:
        self._ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        weed.remove_sockets(self._ports)  # of servers that were killed
        self._children = [
            nats_server(
                self._folder,
                self._ports["nats"],
                self._password,
                payload_bytes=self._payload_bytes,
            ),
            weed.weed(self._folder, self._ports),
        ]

    async def _start(self) -> None:
        # The caller knows the ports already, so they cannot change in the background.
        for left in reversed(range(1 if self._background else START_TRIES)):
            death: BaseException | None = None
            try:
                async with asyncio.timeout(START_SECONDS), asyncio.TaskGroup() as starts:
                    for child in self._children:
                        starts.create_task(child.start())
            except* ServerExitedError as deaths:
                death = deaths.exceptions[0]
            except* TimeoutError:
                death = TimeoutError(
                    f"no response within {START_SECONDS:.0f} s; {self._folder}/*.log"
                )
            if death is None:
                return
            # Another process has usually taken a port meanwhile, so other ports are tried.
            await self._stop_children()
            if not left:
                raise LocalServersError(str(death)) from death
            self._choose()

    async def _stop(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)
        await self._stop_children()

    async def _stop_children(self) -> None:
        await asyncio.gather(*(child.stop() for child in self._children))
        if self._children:
            weed.remove_sockets(self._ports)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LocalServersError(
                f"{path.parent} is in use by another process: stop it, or set IMG2IMG_STATE_DIR "
                "to another folder"
            ) from error
        yield
