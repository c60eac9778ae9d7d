"""One attempt at a webhook over real sockets, and the outcome for the caller."""

from __future__ import annotations

import ssl

import trustme
from receiver import receiving
from web_peers import RESET, Names, origin

from img2img_server.outbound.policy import OutboundPolicy
from img2img_server.webhooks.sender import webhook_sender


async def test_an_attempt_says_why_the_server_was_not_reached() -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("cdn.test").configure_cert(context)
    names = Names("127.0.0.1", no_test=[[]])
    policy = OutboundPolicy.parse("cdn.test, no.test")
    reasons = []
    post = webhook_sender(policy, resolver=names, timeout_seconds=5)
    async with origin(RESET) as broken, origin(tls=context) as unknown:
        for url in (
            f"http://cdn.test:{broken.port}/",
            f"https://cdn.test:{unknown.port}/",
            "https://no.test/",
            "https://cdn.test\\@no.test/",
        ):
            outcome = await post(url, b"{}", {})
            assert not outcome.delivered
            reasons.append(outcome.reason)
    assert reasons == [
        "the connection broke before the server answered",
        "the TLS certificate of cdn.test is not valid: unable to get local issuer certificate",
        "the name no.test cannot be resolved",
        "the address contains a backslash",
    ]


async def test_a_server_that_does_not_respond_is_reported_with_the_time() -> None:
    policy = OutboundPolicy.parse("127.0.0.1")
    post = webhook_sender(policy, timeout_seconds=0.1)
    async with receiving(held=True) as receiver:
        outcome = await post(receiver.url, b"{}", {})
        receiver.may_answer.set()
    assert outcome.reason == "the server did not answer within 0.1 s"
