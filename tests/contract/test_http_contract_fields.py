"""One case for each rule about a field, in both modes (docs/http-contract.md#fields)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from img2img_server.errors import PermissionDeniedError
from img2img_server.testing.bus import memory_bus
from tests.http_stack import (
    ENTERPRISE,
    PHOTO_URL,
    V6,
    Gateway,
    error_body,
    fetch_photo,
    gateway_before,
    legacy,
    photo_base64,
    today,
)
from tests.stack import Stack, running_api, running_worker, two_tenants

__all__ = ["legacy", "today"]
MODES = ("today", "legacy")
pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass(frozen=True)
class Refused:
    """A rule, a request that breaks it, and the message of both modes."""

    rule: str
    sent: dict[str, Any]
    field: str
    today: str
    legacy: str = ""

    def legacy_sentence(self) -> str:
        return self.legacy or f"The {self.today}."


def required(name: str, value: Any) -> Refused:
    reported = f"{name} is required"
    rule = f"{name} is required, {value!r} is like absent"
    return Refused(rule, {name: value}, name, reported, f"The {name} field is required.")


def wrong(name: str, value: Any, reported: str) -> Refused:
    return Refused(
        f"{name} {reported}, not {str(value)[:30]!r}", {name: value}, name, f"{name} {reported}"
    )


BOOLEANS = ("safety_checker", "base64", "instant_response", "enhance_prompt", "temp")
REFUSED = [
    *(required(name, value) for name in ("prompt", "init_image") for value in (..., None, "")),
    wrong("prompt", 5, "must be a string"),
    wrong("prompt", "p" * 2001, "must not be longer than 2000 characters"),
    wrong("negative_prompt", ["x"], "must be a string"),
    wrong("negative_prompt", "n" * 2001, "must not be longer than 2000 characters"),
    wrong("init_image", 5, "must be a string"),
    *(
        wrong(name, value, reported)
        for name in ("width", "height")
        for value, reported in (
            ("wide", "must be an integer"),
            (True, "must be an integer"),
            (512.5, "must be an integer"),
            (248, "must be between 256 and 1024"),
            (1032, "must be between 256 and 1024"),
            (255, "must be between 256 and 1024"),
            ("513", "must be divisible by 8"),
        )
    ),
    wrong("samples", "two", "must be an integer"),
    wrong("samples", 0, "must be between 1 and 4"),
    wrong("samples", 5, "must be between 1 and 4"),
    wrong("strength", "much", "must be a number"),
    wrong("strength", True, "must be a number"),
    wrong("strength", "NaN", "must be a number"),
    wrong("strength", 1.01, "must be between 0 and 1"),
    wrong("strength", -0.01, "must be between 0 and 1"),
    wrong("seed", "x", "must be an integer"),
    wrong("seed", 4294967296, "must be between 0 and 4294967295"),
    wrong("seed", -2, "must be between 0 and 4294967295"),
    *(wrong(name, value, "must be true or false") for name in BOOLEANS for value in ("maybe", 2)),
    wrong("webhook", 5, "must be a string"),
    wrong("webhook", "not a url", "must be a valid URL"),
    wrong("webhook", "ftp://a.example/x", "must be a valid URL"),
    wrong("track_id", True, "must be a string or an integer"),
    wrong("track_id", 1.5, "must be a string or an integer"),
    wrong("track_id", "t" * 192, "must not be longer than 191 characters"),
    wrong("track_id", 10**191, "must not be longer than 191 characters"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.rule)
async def test_a_broken_rule_is_reported(case: Refused, today: Gateway) -> None:
    answer = await today.create(**case.sent)
    assert (answer.status_code, answer.json()) == (
        400,
        error_body("INVALID_REQUEST", case.today, errors={case.field: [case.today]}),
    )


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.rule)
async def test_a_broken_rule_is_reported_the_old_way(case: Refused, legacy: Gateway) -> None:
    answer = await legacy.create(**case.sent)
    reported = {case.field: [case.legacy_sentence()]}
    assert (answer.status_code, answer.json()) == (
        200,
        {"status": "error", "message": reported, "messege": reported},
    )


async def test_all_failures_are_reported_and_the_first_in_table_order_is_the_message(
    today: Gateway,
) -> None:
    answer = await today.create(temp=7, samples=9, width=513, prompt=None)
    assert answer.json() == {
        "status": "error",
        "message": "prompt is required",
        "reason": "INVALID_REQUEST",
        "errors": {
            "prompt": ["prompt is required"],
            "width": ["width must be divisible by 8"],
            "samples": ["samples must be between 1 and 4"],
            "temp": ["temp must be true or false"],
        },
    }


async def test_legacy_tells_all_failures_by_field(legacy: Gateway) -> None:
    answer = await legacy.create(width=200, prompt=None)
    reported = {
        "prompt": ["The prompt field is required."],
        "width": ["The width must be between 256 and 1024."],
    }
    assert answer.json() == {"status": "error", "message": reported, "messege": reported}


@dataclass(frozen=True)
class Accepted:
    """A rule, the sent value, and the value in `meta`."""

    rule: str
    sent: dict[str, Any]
    meta: dict[str, Any] = field(default_factory=dict)


ACCEPTED = [
    Accepted("an integer may be a decimal string", {"width": " 512 "}, {"width": 512}),
    Accepted("a number without fraction is an integer", {"height": 264.0}, {"height": 264}),
    Accepted("samples may be a string", {"samples": "2"}, {"n_samples": 2}),
    Accepted("strength may be a decimal string", {"strength": "0.5"}, {"strength": 0.5}),
    Accepted("null strength is the default", {"strength": None}, {"strength": 0.7}),
    Accepted("strength 0 is a strength", {"strength": 0}, {"strength": 0}),
    Accepted("strength 1 is a strength", {"strength": 1.0}, {"strength": 1}),
    Accepted(
        "the default size is 512", {"width": ..., "height": ""}, {"width": 512, "height": 512}
    ),
    Accepted("seed '0' is a seed", {"seed": "0"}, {"seed": 0}),
    Accepted("the largest seed", {"seed": 4294967295}, {"seed": 4294967295}),
    Accepted(
        "booleans may be words",
        {"safety_checker": "YES", "base64": "yes", "temp": "True", "enhance_prompt": "no"},
        {"safety_checker": "yes", "base64": "yes", "temp": "yes", "enhance_prompt": "no"},
    ),
    Accepted("booleans may be 0", {"safety_checker": 0}, {"safety_checker": "no"}),
    Accepted("null booleans take their defaults", {"safety_checker": None, "temp": None}),
    Accepted("a hint is clamped", {"guidance_scale": 99}, {"guidance_scale": 30}),
    Accepted("a hint that cannot be read is ignored", {"num_inference_steps": "many"}),
    Accepted("enhance_style is given back", {"enhance_style": "anime"}, {"enhance_style": "anime"}),
    Accepted("track_id stays a string", {"track_id": "12"}, {"track_id": "12"}),
    Accepted("track_id stays an integer", {"track_id": 12}, {"track_id": 12}),
    Accepted("an empty track_id is absent", {"track_id": ""}, {"track_id": None}),
    Accepted(
        "inline data is named base64", {"init_image": photo_base64()}, {"init_image": "base64"}
    ),
    Accepted(
        "a data URI's media type is not trusted",
        {"init_image": f"data:text/plain;base64,{photo_base64()}"},
        {"init_image": "base64"},
    ),
    Accepted("prompts may hold any text", {"prompt": "Größe 🎨"}, {"prompt": "Größe 🎨"}),
    Accepted("unknown fields are ignored", {"model_id": "flux", "scheduler": "x", "key2": {}}),
]


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case.rule)
@pytest.mark.parametrize("mode", MODES)
async def test_what_is_sent_is_understood(
    case: Accepted, mode: str, today: Gateway, legacy: Gateway
) -> None:
    answer = await {"today": today, "legacy": legacy}[mode].create(**case.sent)
    assert answer.json()["status"] == "success", answer.text
    expected = {
        "safety_checker": "yes",
        "base64": "no",
        "temp": "no",
        "enhance_prompt": "no",
        "instant_response": "no",
        "prompt": "a harbour at dusk",
        "width": 256,
        "height": 256,
        "seed": 1,
        "strength": 0.7,
        "guidance_scale": 1,
        "enhance_style": None,
        "track_id": None,
        **case.meta,
    }
    meta = answer.json()["meta"]
    assert {name: meta[name] for name in expected} == expected


@pytest.mark.parametrize("seed", [..., None, "", -1, "-1"])
async def test_a_random_seed_is_drawn_and_reported(
    seed: Any, today: Gateway, legacy: Gateway
) -> None:
    first, second = [await gateway.create(seed=seed) for gateway in (today, legacy)]
    seeds = [answer.json()["meta"]["seed"] for answer in (first, second)]
    assert all(0 <= drawn < 2**32 for drawn in seeds)
    assert seeds[0] != seeds[1]


def printed(key: str) -> str:
    """Returns the body on the hosted API's page, unchanged except its key and its init image."""
    return f"""{{
      "key": "{key}",
      "prompt": "a cat sitting on a bench",
      "negative_prompt": "bad quality",
      "init_image": "{PHOTO_URL}",
      "width": "512",
      "height": "512",
      "samples": "1",
      "temp": false,
      "safety_checker": false,
      "strength": 0.7,
      "seed": null,
      "webhook": null,
      "track_id": null
    }}"""


async def test_the_body_printed_on_the_hosted_page_works_as_it_stands(
    today: Gateway, legacy: Gateway
) -> None:
    for gateway in (today, legacy):
        for family in (ENTERPRISE, V6):
            answer = await gateway.http.post(f"{family}/img2img", content=printed("dev-key"))
            assert answer.json()["status"] == "success", answer.text
            assert answer.json()["meta"]["safety_checker"] == "no"


async def test_a_key_without_the_right_is_reported_so_and_may_leave_the_checker_on(
    tmp_path: Path,
) -> None:
    ring, _, key = two_tenants(tmp_path)
    reported = str(PermissionDeniedError("unsafe"))
    bus = memory_bus()
    async with (
        running_worker(bus) as worker,
        running_api(bus, fetch=fetch_photo, keys=ring) as api,
        gateway_before(Stack(bus, api, worker)) as gateway,
        gateway_before(Stack(bus, api, worker), legacy=True) as old,
    ):
        answer = await gateway.http.post(f"{ENTERPRISE}/img2img", content=printed(key))
        assert (answer.status_code, answer.json()) == (
            403,
            {"status": "error", "message": reported, "reason": "PERMISSION_DENIED"},
        )
        answer = await old.http.post(f"{ENTERPRISE}/img2img", content=printed(key))
        expected = {"status": "error", "message": reported, "messege": reported}
        assert (answer.status_code, answer.json()) == (200, expected)
        safe = printed(key).replace('"safety_checker": false', '"safety_checker": null')
        for each in (gateway, old):
            answer = await each.http.post(f"{ENTERPRISE}/img2img", content=safe)
            assert answer.json()["meta"]["safety_checker"] == "yes"
