"""Targets with several servers: calls are spread over them, and streams resume on another one."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
import trustme

import img2img_client as api
from img2img_client import AsyncClient, Client
from tests.client_runs import RETRY
from tests.fake_service import FakeService, serving

HEADER = struct.Struct("!6H")
A_RECORD, IN = 1, 1


class NameServer:
    """A DNS server for one name. `addresses` are those of the name, which a test may change."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses
        self.questions = 0
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._answer_all)

    @contextmanager
    def running(self) -> Iterator[NameServer]:
        self._thread.start()
        try:
            yield self
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                sender.sendto(b"", ("127.0.0.1", self.port))  # An empty message ends the thread.
            self._thread.join()
            self._socket.close()

    def _answer_all(self) -> None:
        while (received := self._socket.recvfrom(512))[0]:
            message, sender = received
            number = HEADER.unpack_from(message)[0]
            end = message.index(b"\0", HEADER.size) + 5
            question = message[HEADER.size : end]
            is_a = struct.unpack("!H", question[-4:-2])[0] == A_RECORD
            addresses = self.addresses if is_a else ()
            self.questions += is_a
            record = struct.pack("!HHHIH", 0xC00C, A_RECORD, IN, 0, 4)
            answers = b"".join(record + socket.inet_aton(each) for each in addresses)
            head = HEADER.pack(number, 0x8180, 1, len(addresses), 0, 0)
            self._socket.sendto(head + question + answers, sender)


@contextmanager
def servers(
    first: FakeService, second: FakeService, credentials: grpc.ServerCredentials | None = None
) -> Iterator[str]:
    """Yields the target of two servers."""
    with (
        serving(first, credentials=credentials) as one,
        serving(second, credentials=credentials) as two,
    ):
        yield f"ipv4:127.0.0.1:{one},127.0.0.1:{two}"


def call_blocking(target: str, is_done: Callable[[], bool], **options: Any) -> int:
    """Makes calls until `is_done`; returns their number."""
    with Client(target, api_key="k", retry=RETRY, **options) as client:
        for number in range(10_000):
            if is_done():
                return number
            client.caller()
    raise AssertionError


def call_async(target: str, is_done: Callable[[], bool], **options: Any) -> int:
    async def main() -> int:
        async with AsyncClient(target, api_key="k", retry=RETRY, **options) as client:
            for number in range(10_000):
                if is_done():
                    return number
                await client.caller()
        raise AssertionError

    return asyncio.run(main())


CALLS = {"blocking": call_blocking, "async": call_async}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_calls_are_spread_evenly_over_all_servers(call: Callable[..., int]) -> None:
    first, second = FakeService(), FakeService()
    with servers(first, second) as target:
        # Each server gets 5 calls. Without balancing, the second one never gets any.
        made = call(target, lambda: len(first.requests) >= 5 and len(second.requests) >= 5)
    assert len(first.requests) + len(second.requests) == made


def test_a_list_with_tls_needs_the_name_of_the_certificates() -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("img2img.example.com")
    pair = (issued.private_key_pem.bytes(), issued.cert_chain_pems[0].bytes())
    first, second = FakeService(), FakeService()
    roots = {"root_certificates": authority.cert_pem.bytes()}
    with servers(first, second, grpc.ssl_server_credentials([pair])) as target:
        with pytest.raises(api.InvalidArgumentError, match="tls_name is missing"):
            Client(target, **roots)
        with Client(target, retry=RETRY, tls_name="other.example.com", **roots) as client:
            with pytest.raises(api.UnavailableError) as caught:
                client.caller()
            assert caught.value.metadata["cause"] == "CERTIFICATE_REJECTED"
            assert "set it as tls_name" in str(caught.value)
        name = {"tls_name": "img2img.example.com"}
        call_blocking(target, lambda: bool(first.requests and second.requests), **roots, **name)
    with pytest.raises(api.InvalidArgumentError, match="without TLS"):
        Client("127.0.0.1", **name)


@pytest.mark.parametrize("kind", [Client, AsyncClient], ids=["blocking", "async"])
def test_a_stream_resumes_on_another_server_when_its_own_stops(kind: type[Any]) -> None:
    services = [FakeService(pause_after=3), FakeService(pause_after=3)]
    running = [serving(service) for service in services]
    ports = [server.__enter__() for server in running]
    target = f"ipv4:127.0.0.1:{ports[0]},127.0.0.1:{ports[1]}"
    sequences: list[int] = []

    def take(event: api.Event) -> None:
        sequences.append(event.sequence)
        if event.sequence == 3:  # The last event of the first server.
            own = next(number for number, each in enumerate(services) if each.requests)
            services[1 - own].pause_after = None
            running.pop(own).__exit__(None, None, None)
            services.append(services.pop(own))

    async def read() -> None:
        if kind is Client:
            with Client(target, api_key="k", retry=RETRY) as client:
                for event in client.stream("p", b"photo"):
                    take(event)
        else:
            async with AsyncClient(target, api_key="k", retry=RETRY) as client:
                async for event in client.stream("p", b"photo"):
                    take(event)

    asyncio.run(read())
    running[0].__exit__(None, None, None)
    other, own = services
    assert sequences == [0, *(event.sequence for event in other.log)]
    assert [type(request).__name__ for request in own.requests] == ["GenerateRequest"]
    assert [request.after_sequence for request in other.requests] == [3]  # type: ignore[attr-defined]


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_addresses_of_a_dns_name_are_balanced_and_asked_for_again(
    call: Callable[..., int],
) -> None:
    services = [FakeService() for _ in range(3)]
    names = NameServer("127.0.0.1", "127.0.0.2")
    with names.running(), listening(services) as (port, stop):
        target = f"dns://127.0.0.1:{names.port}/img2img.test:{port}"
        stopped: list[int] = []

        def is_done() -> bool:
            if not stopped and all(each.requests for each in services[:2]):
                # Both replicas are replaced by one with another address, as in a rollout.
                names.addresses = ("127.0.0.3",)
                stop(2)
                stopped.append(len(services[2].requests))
            return bool(services[2].requests)

        call(target, is_done)
        assert stopped == [0]
        assert names.questions >= 2


@contextmanager
def listening(services: list[FakeService]) -> Iterator[tuple[int, Callable[[int], None]]]:
    """Yields the port of servers on 127.0.0.1, 127.0.0.2 and so on, and a function that stops the
    first ones."""
    with serving(services[0]) as port:
        pass
    open_servers = [
        serving(each, port, host=f"127.0.0.{number}") for number, each in enumerate(services, 1)
    ]
    for each in open_servers:
        each.__enter__()

    def stop(count: int) -> None:
        for _ in range(count):
            open_servers.pop(0).__exit__(None, None, None)

    try:
        yield port, stop
    finally:
        stop(len(open_servers))
