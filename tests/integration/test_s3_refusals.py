"""Buckets with few permissions: a missing optional permission is a warning, any other error names
its setting.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from benchmarks.local_stack import free_port
from img2img_server.errors import StorageError
from img2img_server.lifecycle import StoppedError, unless_stopped
from img2img_server.settings import Settings, SettingsError
from img2img_server.storage import s3_blobs, s3_faults
from img2img_server.storage.s3_blobs import connect_blobs
from img2img_server.storage.watched_blobs import WatchedBlobs
from tests.fake_s3 import Answer, FakeS3, fake_s3

KEY = "generations/5f0c2a6e-0.png"
HTML = "<html>hello</html>"
REFUSALS = [
    Answer(403, "AccessDenied"),
    Answer(403),
    Answer(501, "NotImplemented"),
    Answer(405, "MethodNotAllowed"),
    Answer(400, "MalformedXML"),
    Answer(404, "NoSuchThing"),
    Answer(501, "", "no such function", "text/plain"),
    Answer(200, "", HTML),
    Answer(200, "", "<x", "application/xml"),
]


@pytest.fixture
async def s3() -> AsyncIterator[FakeS3]:
    async with fake_s3() as store:
        yield store


@pytest.mark.parametrize("answer", REFUSALS, ids=str)
@pytest.mark.parametrize("call", ["GET lifecycle", "PUT lifecycle"])
async def test_a_bucket_without_lifecycle_rules_is_a_warning(
    s3: FakeS3, call: str, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    s3.answers[call] = answer
    with caplog.at_level(logging.WARNING):
        async with connect_blobs(Settings(**s3.settings())) as blobs:
            await blobs.prepare()
            await blobs.put(KEY, b"x", "image/png")
    assert s3.files == {f"img2img/{KEY}": b"x"}
    (line,) = caplog.messages
    assert "the bucket img2img takes no lifecycle rules" in line
    assert "so nothing deletes old files" in line
    assert "expire generations/ and temp/ after 1 days" in line


async def test_rules_that_cannot_be_read_are_not_replaced(s3: FakeS3) -> None:
    s3.answers["GET lifecycle"] = Answer(403, "AccessDenied")
    async with connect_blobs(Settings(**s3.settings())) as blobs:
        await blobs.prepare()
    assert "PUT lifecycle" not in s3.calls


async def test_only_put_is_needed_by_a_worker(s3: FakeS3, caplog: pytest.LogCaptureFixture) -> None:
    refused = Answer(403, "AccessDenied")
    for call in ("HEAD bucket", "GET bucket", "PUT bucket", "GET object", "DELETE object"):
        s3.answers[call] = refused
    s3.answers["GET lifecycle"] = refused
    with caplog.at_level(logging.WARNING):
        async with connect_blobs(Settings(**s3.settings())) as blobs:
            await blobs.prepare()
            await blobs.put(KEY, b"x", "image/png")
    assert f"img2img/{KEY}" in s3.files
    assert any("may not delete files" in line for line in caplog.messages)


async def test_a_missing_bucket_is_created_with_its_rules(s3: FakeS3) -> None:
    s3.buckets.clear()
    async with connect_blobs(Settings(**s3.settings())) as blobs:
        await blobs.prepare()
    assert s3.buckets == {"img2img"}
    assert sorted(s3.prefixes()) == ["generations/", "temp/", "uploads/"]
    assert s3.files == {}


ERRORS = [
    ("PUT object", Answer(403, "SignatureDoesNotMatch"), "S3_SECRET_KEY", "refused the signature"),
    ("PUT object", Answer(403, "InvalidAccessKeyId"), "S3_ACCESS_KEY", "does not know the access"),
    ("PUT object", Answer(403, "AccessDenied"), "S3_ACCESS_KEY", "needs s3:PutObject"),
    ("PUT object", Answer(400, "ExpiredToken"), "S3_SESSION_TOKEN", "has expired"),
    ("PUT object", Answer(400, "InvalidToken"), "S3_SESSION_TOKEN", "is wrong"),
    ("PUT object", Answer(400, "AuthorizationHeaderMalformed"), "S3_REGION", "region us-east-1"),
    ("PUT object", Answer(301, "PermanentRedirect"), "S3_REGION", "that of the bucket"),
    ("PUT object", Answer(403, "RequestTimeTooSkewed"), "S3_ENDPOINT_URL", "its clock"),
    ("PUT object", Answer(404, "InvalidBucketName"), "S3_BUCKET", "has no bucket"),
    ("any", Answer(200, "", HTML), "S3_ENDPOINT_URL", "it is no S3 endpoint"),
    ("any", Answer(404, "", HTML), "S3_ENDPOINT_URL", "answered HTTP 404 and not as"),
    ("any", Answer(405, "", HTML), "S3_ENDPOINT_URL", "answered HTTP 405 and not as"),
    ("any", Answer(404, "", HTML, "application/xml"), "S3_ENDPOINT_URL", "S3 endpoint"),
    ("any", Answer(403, "", "<x", "application/xml"), "S3_ENDPOINT_URL", "no S3 endpoint"),
    (
        "any",
        Answer(400, "", "Client sent an HTTP request to an HTTPS server.", "text/plain"),
        "S3_ENDPOINT_URL",
        "write https://",
    ),
]


@pytest.mark.parametrize(("call", "answer", "setting", "why"), ERRORS, ids=str)
async def test_a_refusal_ends_the_start_at_once_and_names_the_setting(
    s3: FakeS3, call: str, answer: Answer, setting: str, why: str
) -> None:
    s3.answers[call] = answer
    async with connect_blobs(Settings(**s3.settings())) as blobs, asyncio.timeout(30):
        with pytest.raises(SettingsError) as caught:
            await blobs.prepare(60.0)
    assert str(caught.value).startswith(f"IMG2IMG_{setting}: ")
    assert why in str(caught.value)
    assert "its-secret" not in str(caught.value)


async def test_a_bucket_that_is_missing_and_cannot_be_created_is_named(s3: FakeS3) -> None:
    s3.answers["PUT bucket"] = Answer(403, "AccessDenied")
    async with connect_blobs(Settings(**s3.settings(s3_bucket="other"))) as blobs:
        with pytest.raises(SettingsError, match="IMG2IMG_S3_BUCKET: the bucket other does not"):
            await blobs.prepare(60.0)


@pytest.mark.parametrize("answer", [Answer(501, "", "no", "text/plain"), Answer(405)], ids=str)
async def test_a_store_that_creates_no_buckets_says_that_it_is_missing(
    s3: FakeS3, answer: Answer
) -> None:
    s3.answers["PUT bucket"] = answer
    async with connect_blobs(Settings(**s3.settings(s3_bucket="other"))) as blobs:
        with pytest.raises(SettingsError, match="IMG2IMG_S3_BUCKET: the bucket other does not"):
            await blobs.prepare(60.0)


async def test_a_bucket_that_never_answers_for_its_rules_is_a_warning(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_blobs, "RULES_SECONDS", 0.1)
    s3.hangs.add("GET lifecycle")
    async with connect_blobs(Settings(**s3.settings())) as blobs:
        await blobs.prepare()
        s3.released.set()
    assert any("no response within 0.1 s" in line for line in caplog.messages)


async def test_wrong_keys_are_refused_by_a_real_server(engine_settings: Any) -> None:
    for change, setting in (
        ({"s3_secret_key": "wrong-wrong-wrong"}, "IMG2IMG_S3_SECRET_KEY"),
        ({"s3_access_key": "nobody"}, "IMG2IMG_S3_ACCESS_KEY"),
    ):
        async with connect_blobs(engine_settings(**change)) as blobs:
            with pytest.raises(SettingsError, match=f"^{setting}: "):
                await blobs.prepare(60.0)
            with pytest.raises(SettingsError, match=f"^{setting}: "):
                await blobs.start_reading(60.0)


async def test_a_server_that_answers_everything_is_no_store_for_a_gateway_either(
    s3: FakeS3,
) -> None:
    s3.answers["any"] = Answer(200, "", HTML)
    async with connect_blobs(Settings(**s3.settings())) as blobs:
        with pytest.raises(SettingsError, match="never stored: it is no S3 endpoint"):
            await blobs.start_reading(60.0)


async def test_a_store_that_never_answers_is_given_up_in_the_stated_time(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_blobs, "ATTEMPT_SECONDS", 0.1)
    monkeypatch.setattr(s3_blobs, "CLOSE_SECONDS", 0.1)
    s3.hangs |= {"PUT object", "GET object"}
    said = "does not answer in time; given up after 0.2 s"
    async with asyncio.timeout(30), connect_blobs(Settings(**s3.settings())) as blobs:
        for proof in (blobs.prepare, blobs.start_reading):
            with pytest.raises(StorageError, match=said):
                await proof(0.2)
    s3.released.set()


@asynccontextmanager
async def tls_server(certificate: trustme.LeafCert) -> AsyncIterator[int]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)

    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


async def test_tls_that_does_not_fit_is_distinguished(
    s3: FakeS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, past = trustme.CA(), datetime(2020, 1, 1, tzinfo=UTC)
    known.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    for certificate, why in (
        (trustme.CA().issue_cert("127.0.0.1"), "is not trusted .*SSL_CERT_FILE"),
        (known.issue_cert("elsewhere.example"), "for another host .*use a name that is in"),
        (
            known.issue_cert("127.0.0.1", not_before=past - timedelta(9), not_after=past),
            "not valid now .*has expired",
        ),
    ):
        async with tls_server(certificate) as port:
            assert re.search(why, await refused_start(s3, f"https://127.0.0.1:{port}"))
    assert "does not speak TLS" in await refused_start(s3, s3.url.replace("http:", "https:"))


async def refused_start(s3: FakeS3, url: str) -> str:
    async with connect_blobs(Settings(**s3.settings(s3_endpoint_url=url))) as blobs:
        with pytest.raises(SettingsError, match=r"^IMG2IMG_S3_ENDPOINT_URL: ") as caught:
            await blobs.prepare(60.0)
    return str(caught.value)


async def test_what_cannot_be_reached_is_tried_for_the_stated_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(s3_blobs, "RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(
        s3_blobs, "RETRIES", s3_blobs.RETRIES.new(backoff_factor=0.0, backoff_jitter=0.0)
    )

    def unknown(*_: object) -> None:  # Some machines' resolvers need seconds for the same answer.
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    for host, why in (
        (f"127.0.0.1:{free_port()}", "refused"),
        ("no-such-host.invalid", "cannot be resolved"),
    ):
        if why != "refused":
            monkeypatch.setattr(socket, "getaddrinfo", unknown)
        settings = Settings(
            s3_endpoint_url=f"http://{host}", s3_access_key="a", s3_secret_key="b" * 8
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            async with connect_blobs(settings) as blobs:
                with pytest.raises(StorageError, match=f"IMG2IMG_S3_ENDPOINT_URL: .*{why}.*given"):
                    await blobs.prepare(0.5)
        assert any("trying again" in line and host in line for line in caplog.messages)


async def test_a_store_that_comes_late_is_used_then(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_blobs, "RETRY_SECONDS", (0.01,))
    monkeypatch.setattr(
        s3_blobs, "RETRIES", s3_blobs.RETRIES.new(backoff_factor=0.0, backoff_jitter=0.0)
    )
    s3.answers["any"] = Answer(503, "", HTML)
    async with connect_blobs(Settings(**s3.settings())) as blobs, asyncio.timeout(20):
        preparing = asyncio.create_task(blobs.prepare(60.0))
        while len(s3.calls) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        s3.answers.clear()
        await preparing


async def test_a_clock_that_differs_from_the_stores_is_reported_with_the_difference(
    s3: FakeS3, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real_time = time.time
    monkeypatch.setattr(s3_faults, "time", SimpleNamespace(time=lambda: real_time() - 3600))
    async with connect_blobs(Settings(**s3.settings())) as blobs:
        await blobs.put(KEY, b"x", "image/png")
        assert "s behind that of the object store" in caplog.text
        s3.answers["PUT object"] = Answer(403, "RequestTimeTooSkewed")
        with pytest.raises(StorageError) as refused:
            await blobs.put(KEY, b"x", "image/png")
    (seconds,) = re.findall(r"differ by (\d+) s", refused.value.detail)
    assert abs(int(seconds) - 3600) <= 2


async def test_a_stop_ends_the_wait_for_the_store_at_once() -> None:
    stop = asyncio.Event()
    settings = Settings(
        s3_endpoint_url=f"http://127.0.0.1:{free_port()}",
        s3_access_key="a",
        s3_secret_key="b" * 8,
    )
    async with connect_blobs(settings) as blobs, asyncio.timeout(30):
        asyncio.get_running_loop().call_later(0.05, stop.set)
        with pytest.raises(StoppedError):
            await unless_stopped(stop, blobs.start_reading(60.0))


async def test_without_the_right_to_list_a_missing_file_is_missing(
    s3: FakeS3, caplog: pytest.LogCaptureFixture
) -> None:
    """AWS responds with 403 for a missing file, and with 403 for a wrong key. Only the response to
    GET distinguishes them.
    """
    s3.answers.update({"HEAD object": Answer(403), "GET object": Answer(403, "AccessDenied")})
    async with connect_blobs(Settings(**s3.settings())) as blobs:
        await blobs.start_reading()
        assert await blobs.stat(KEY) is None
        with pytest.raises(KeyError):
            _ = [chunk async for chunk in blobs.read(KEY)]
        s3.answers["GET object"] = Answer(403, "SignatureDoesNotMatch")
        with pytest.raises(StorageError, match="SignatureDoesNotMatch"):
            await blobs.stat(KEY)
    assert [line for line in caplog.messages if "s3:ListBucket" in line]


async def test_a_store_that_fails_is_probed_until_it_takes_files_again(s3: FakeS3) -> None:
    async with connect_blobs(Settings(**s3.settings())) as blobs:
        store = WatchedBlobs(blobs, pauses_seconds=(0.01,))
        watching = asyncio.create_task(store.watch())
        s3.answers["PUT object"] = Answer(403, "SignatureDoesNotMatch")
        storing = asyncio.create_task(store.put(KEY, b"x", "image/png"))
        calls = len(s3.calls)
        async with asyncio.timeout(30):
            while len(s3.calls) < calls + 3:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            assert store.trouble.startswith("IMG2IMG_S3_SECRET_KEY: ")
            assert not store.takes_work
            s3.answers.clear()
            await storing
        assert store.trouble == ""
        assert s3.files[f"img2img/{KEY}"] == b"x"
        watching.cancel()


@pytest.mark.parametrize(
    ("answer", "tries"),
    [
        (Answer(400, "RequestTimeout"), 3),
        (Answer(409, "OperationAborted"), 3),
        (Answer(403, "AccessDenied"), 1),
    ],
)
async def test_refusals_that_pass_are_repeated_whatever_their_status(
    answer: Answer, tries: int, s3: FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_blobs, "REPEAT_SECONDS", (0.01, 0.01))
    async with connect_blobs(Settings(**s3.settings())) as blobs:
        s3.answers["PUT object"] = answer
        with pytest.raises(StorageError, match=answer.code) as refused:
            await blobs.put(KEY, b"x", "image/png")
        assert s3.calls.count("PUT object") == tries
        assert refused.value.final is (tries == 1)
