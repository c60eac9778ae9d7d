"""A process with a server that never ends its responses, or that sends them byte by byte.

`python tests/hostile_server.py [CERTIFICATE [TICKETS]]` prints its port. The path of a request
chooses the response.
"""

from __future__ import annotations

import gzip
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
SENT_AT_ONCE = 64 * 1024

# Name of the response: its beginning, and what the server repeats after it.
FLOODS = {
    "continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "short-continue": (b"", b"HTTP/1.1 100 \r\n\r\n"),
    "early-hints": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"),
    "early-hints-with-headers": (b"", b"HTTP/1.1 103 E\r\n" + b"a:b\r\n" * 400 + b"\r\n"),
    "chunks-of-1-byte": (CHUNKED, b"1\r\na\r\n"),
    "chunks-of-16-bytes": (CHUNKED, b"10\r\n0123456789abcdef\r\n"),
    "chunk-extension": (CHUNKED + b"1;", b"a"),
    "chunk-extensions": (CHUNKED, b"1;a\r\na\r\n"),
    "headers": (OK, b"a: b\r\n"),
    "header-line": (OK + b"a:", b"a"),
    "folded-header": (OK + b"a: b\r\n", b" a\r\n"),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\n", b"a: b\r\n"),
    "reason-phrase": (b"HTTP/1.1 200 ", b"a"),
    "empty-lines": (b"", b"\r\n"),
    "content": (OK + b"\r\n", b"a"),
}
# Name of the response: its beginning, and what the server sends byte by byte after it.
TRICKLES = {
    "trickled-content": (OK + b"Content-Length: 100000\r\n\r\n", b"a"),
    "trickled-headers": (OK, b"a: b\r\n"),
    "trickled-chunks": (CHUNKED, b"1\r\na\r\n"),
    "trickled-continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}
TRICKLE_SECONDS = 0.01


def respond(connection: socket.socket, name: str) -> None:
    """Sends the named response. Raises OSError when the client has gone."""
    if name in FLOODS:
        begin, repeated = FLOODS[name]
        connection.sendall(begin)
        while True:
            connection.sendall(repeated * (SENT_AT_ONCE // len(repeated)))
    elif name in TRICKLES:
        begin, repeated = TRICKLES[name]
        connection.sendall(begin)
        while True:
            for byte in repeated:
                connection.sendall(bytes([byte]))
                time.sleep(TRICKLE_SECONDS)
    elif name == "tls-records-of-1-byte":
        connection.sendall(CHUNKED)
        while True:
            for byte in b"1\r\na\r\n":
                connection.sendall(bytes([byte]))
    elif name == "redirects-after-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 4000)
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: /{name}\r\n".encode())
        connection.sendall(b"Connection: close\r\nContent-Length: 0\r\n\r\n")
    elif name == "gzip-members":
        body = gzip.compress(b"") * 20_000
        connection.sendall(OK + b"Content-Encoding: gzip\r\n")
        connection.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
    elif name == "silence":
        connection.recv(1)
    else:
        connection.sendall(OK + b"Content-Length: 1\r\n\r\na")


def serve(connection: socket.socket, tls: ssl.SSLContext | None) -> None:
    """Reads a request and sends the response that its path names."""
    with suppress(OSError), connection:
        if tls is not None:
            connection = tls.wrap_socket(connection, server_side=True)
        request = b""
        while b"\r\n\r\n" not in request:
            part = connection.recv(65536)
            if not part:
                return
            request += part
        with connection:
            respond(connection, request.split(b" ")[1].decode().split("/")[1])


@contextmanager
def hostile_server(*arguments: str) -> Iterator[int]:
    """Yields the port of the server in a process of its own, so that it does not share the loop."""
    command = [sys.executable, __file__, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def main(certificate: str = "", tickets: str = "2") -> None:
    """Serves until the process is killed. Each TLS handshake ends with so many session tickets."""
    tls = None
    if certificate:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(certificate)
        tls.num_tickets = int(tickets)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    print(listener.getsockname()[1], flush=True)
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=serve, args=(connection, tls), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])
