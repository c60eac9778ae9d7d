"""Validation lists every violation in the order of the fields."""

import dataclasses
import math

import pytest

from img2img_server.domain.params import JobParams, Lora, ValidationContext, validate
from img2img_server.domain.violations import Reason, invalid_url

GOOD = JobParams(prompt="a cat")
CONTEXT = ValidationContext(schedulers=("ddim", "euler"), loras=("ink", "oil"))
SCALES = {"min_scale": "-2", "max_scale": "2"}


def test_a_good_request_has_no_violation() -> None:
    assert validate(GOOD, CONTEXT) == []


def test_the_limits_themselves_are_allowed() -> None:
    for changes in (
        {"prompt": "é" * 2000, "width": 256, "height": 1024, "samples": 4, "strength": 0.0},
        {"strength": 1.0, "seed": 2**63 - 1, "num_inference_steps": 100, "guidance_scale": 30.0},
        {"track_id": "x" * 191, "webhook": "https://example.org/hook", "scheduler": "euler"},
        {"loras": (Lora("ink", 2.0), Lora("oil", 0.0))},
        {"loras": (Lora("ink", -2.0),)},
    ):
        assert validate(dataclasses.replace(GOOD, **changes), CONTEXT) == []


@pytest.mark.parametrize(
    ("changes", "reason", "values"),
    [
        ({"prompt": ""}, Reason.REQUIRED, {}),
        ({"prompt": "   "}, Reason.REQUIRED, {}),
        ({"prompt": "\t\n\u3000\u200b\ufeff"}, Reason.REQUIRED, {}),
        ({"prompt": "x" * 2001}, Reason.TOO_LONG, {"max": "2000"}),
        ({"negative_prompt": "x" * 2001}, Reason.TOO_LONG, {"max": "2000"}),
        ({"width": 255}, Reason.OUT_OF_RANGE, {"min": "256", "max": "1024"}),
        ({"width": 513}, Reason.NOT_DIVISIBLE, {"divisor": "8"}),
        ({"height": 1032}, Reason.OUT_OF_RANGE, {"min": "256", "max": "1024"}),
        ({"samples": 0}, Reason.OUT_OF_RANGE, {"min": "1", "max": "4"}),
        ({"samples": 9}, Reason.OUT_OF_RANGE, {"min": "1", "max": "4"}),
        ({"strength": 1.5}, Reason.OUT_OF_RANGE, {"min": "0", "max": "1"}),
        ({"strength": math.nan}, Reason.OUT_OF_RANGE, {"min": "0", "max": "1"}),
        ({"seed": -2}, Reason.OUT_OF_RANGE, {"min": "0", "max": "9223372036854775807"}),
        ({"seed": 2**63}, Reason.OUT_OF_RANGE, {"min": "0", "max": "9223372036854775807"}),
        ({"track_id": "x" * 192}, Reason.TOO_LONG, {"max": "191"}),
        ({"num_inference_steps": 0}, Reason.OUT_OF_RANGE, {"min": "1", "max": "100"}),
        ({"guidance_scale": math.inf}, Reason.OUT_OF_RANGE, {"min": "0", "max": "30"}),
        ({"scheduler": "nope"}, Reason.NOT_SUPPORTED, {}),
        ({"clip_skip": -1}, Reason.OUT_OF_RANGE, {"min": "0", "max": "32"}),
        ({"clip_skip": 33}, Reason.OUT_OF_RANGE, {"min": "0", "max": "32"}),
        ({"loras": (Lora("ink"), Lora("wool"))}, Reason.NOT_SUPPORTED, {}),
        ({"loras": (Lora(""),)}, Reason.NOT_SUPPORTED, {}),
        ({"loras": (Lora("oil"), Lora("ink", 2.1))}, Reason.OUT_OF_RANGE, SCALES),
        ({"loras": (Lora("oil"), Lora("ink", -2.1))}, Reason.OUT_OF_RANGE, SCALES),
        ({"loras": (Lora("ink", math.nan),)}, Reason.OUT_OF_RANGE, SCALES),
        ({"loras": (Lora("ink", 0.5), Lora("ink", 0.7))}, Reason.INVALID_FORMAT, {}),
        ({"loras": (Lora("ink"),) * 9}, Reason.TOO_MANY, {"max_entries": "8"}),
        ({"true_cfg_scale": 30.1}, Reason.OUT_OF_RANGE, {"min": "0", "max": "30"}),
        ({"preview_interval_steps": -1}, Reason.OUT_OF_RANGE, {"min": "0", "max": "100"}),
    ],
)
def test_each_broken_rule_is_named(
    changes: dict[str, object], reason: Reason, values: dict[str, str]
) -> None:
    (field,) = changes
    (found,) = validate(dataclasses.replace(GOOD, **changes), CONTEXT)
    assert (found.field, found.reason, found.values) == (field, reason, values)


def test_a_lora_of_a_model_without_any_is_refused() -> None:
    (found,) = validate(dataclasses.replace(GOOD, loras=(Lora("ink"),)), ValidationContext())
    assert (found.field, found.reason) == ("loras", Reason.NOT_SUPPORTED)
    unknown = ValidationContext(loras=None)  # An unknown model is rejected later, with its name.
    assert validate(dataclasses.replace(GOOD, loras=(Lora("ink"),)), unknown) == []


def test_all_violations_are_listed_at_once() -> None:
    bad = dataclasses.replace(GOOD, prompt="", width=513, height=1, samples=9, strength=2.0)
    fields = [violation.field for violation in validate(bad, CONTEXT)]
    assert fields == ["prompt", "width", "height", "samples", "strength"]


@pytest.mark.parametrize(
    ("port", "wanted"),
    [
        *((port, []) for port in ("", ":443", ":80", ":1024", ":8443", ":65535")),
        *((port, ["webhook"]) for port in (":0", ":22", ":25", ":1023", ":65536", ":x")),
    ],
)
def test_webhooks_go_to_no_port_of_another_protocol(port: str, wanted: list[str]) -> None:
    address = f"https://hooks.example.org{port}/a"
    found = validate(JobParams(prompt="a", webhook=address), ValidationContext())
    assert [violation.field for violation in found] == wanted


def test_plain_http_webhooks_go_where_the_context_says() -> None:
    context = ValidationContext(is_listed=lambda url: "listed" in url)
    for address, wanted in (
        ("http://listed.example/a", []),
        ("https://listed.example:22/a", []),
        ("http://other.example/a", ["webhook"]),
    ):
        found = validate(JobParams(prompt="a", webhook=address), context)
        assert [violation.field for violation in found] == wanted


@pytest.mark.parametrize(
    ("webhook", "cause"),
    [
        ("ftp://example.org", ""),
        (
            "http://example.org/hook",
            "it must begin with https://, since the operator does not list its host",
        ),
        ("https://example.org:25/", "port 25 is not a port for HTTP"),
        (
            "https://user:secret@example.org/",
            "it contains a user name or password (user@host), which is not supported",
        ),
        ("https://exa mple.org/", "it has a host name that is not well formed"),
        ("https:///hook", "it has no host"),
        ("https://example.org/a\nb", "it contains a control character"),
    ],
)
def test_a_webhook_is_refused_with_its_cause(webhook: str, cause: str) -> None:
    found = validate(JobParams(prompt="a", webhook=webhook), ValidationContext())
    assert found == [invalid_url("webhook", cause)]
    assert found[0].text.endswith(f": {cause}" if cause else found[0].message)


@pytest.mark.parametrize(
    "webhook",
    ["HTTPS://Example.org/a b?c=%2b&ü", " https://example.org/hook\n", "https://[2606:4700::1]/"],
)
def test_a_webhook_that_a_browser_would_take_is_taken(webhook: str) -> None:
    assert validate(JobParams(prompt="a", webhook=webhook), ValidationContext()) == []
