"""The gateway's parsing of ModelsLab's bodies: coercions, violations and the resulting JobSpec."""

from __future__ import annotations

import base64
import re
import time
from pathlib import Path
from typing import Any

import pytest

from img2img.v1 import job_pb2
from img2img_server.compat.modelslab import requests
from img2img_server.compat.modelslab.requests import HINTS, Img2ImgRequest, init_image, job_spec
from img2img_server.compat.modelslab.sentences import legacy_field_sentence
from img2img_server.domain.params import SEED_MAX, JobParams
from img2img_server.domain.violations import (
    Reason,
    Violation,
    invalid_type,
    out_of_range,
    required,
    too_long,
)
from img2img_server.imaging.base import FetchError
from img2img_server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {name: field for name, field in Img2ImgRequest.model_fields.items() if name != "key"}
SHARED = [n for n in FIELDS if n not in ("init_image", "instant_response", "enhance_style")]
GOOD = {"prompt": "a harbour", "init_image": "https://files.example.org/a.png"}
NAN, INFINITY = float("nan"), float("inf")
INTEGERS, NUMBER, BOOLEAN, STRING = ("seed", "width"), "strength", "base64", "negative_prompt"


def value_of(field: str, value: Any) -> Any:
    """Returns the parsed value of a field. Raises AssertionError if the field is invalid."""
    parsed = requests.parse(Img2ImgRequest, GOOD | {field: value})
    assert parsed.violations == []
    return parsed.values[field]


def expected_of(field: str, value: Any) -> str:
    """Returns the expected type in the message of an invalid field."""
    [violation] = requests.parse(Img2ImgRequest, GOOD | {field: value}).violations
    assert (violation.field, violation.reason) == (field, Reason.INVALID_TYPE)
    return violation.values["expected"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (512, 512),
        (512.0, 512),
        (" 512 ", 512),
        ("512", 512),
        ("512.0", 512),
        ("-1", -1),
        ("+8", 8),
        (0, 0),
        ("0", 0),
    ],
)
def test_an_integer_may_be_a_whole_number_or_a_decimal_string(value: Any, expected: int) -> None:
    assert [value_of(field, value) for field in INTEGERS] == [expected] * 2


@pytest.mark.parametrize(
    "value",
    [True, False, 512.5, NAN, INFINITY, "512.5", "abc", " ", "1e3", "0x10", "1_0", "٣", [], {}],
)
def test_what_is_no_integer_is_refused(value: Any) -> None:
    assert {expected_of(field, value) for field in INTEGERS} == {"an integer"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.7, 0.7), (1, 1.0), ("0.7", 0.7), (" 1 ", 1.0), ("5e-1", 0.5), (".5", 0.5), ("0", 0.0)],
)
def test_a_number_may_be_a_decimal_string(value: Any, expected: float) -> None:
    assert value_of(NUMBER, value) == expected


@pytest.mark.parametrize(
    "value", [True, NAN, INFINITY, "NaN", "inf", "1e999", 10**400, "half", "1,5", " ", [], {}]
)
def test_what_is_no_finite_number_is_refused(value: Any) -> None:
    assert expected_of(NUMBER, value) == "a number"


MEGABYTE = 2**20


@pytest.mark.parametrize(
    "text",
    [
        "1" * MEGABYTE,
        "1" * MEGABYTE + "x",
        "." + "1" * MEGABYTE + "x",
        "1." + "1" * MEGABYTE + "e" + "1" * MEGABYTE + "x",
        " " * MEGABYTE + "x",
        "1" + " " * MEGABYTE + "x",
        "1" * 400 + "." + "0" * 400 + " " * MEGABYTE + "x",
        "-" * MEGABYTE,
    ],
    ids=lambda text: f"{text[:4]!r}…{text[-1]}",
)
@pytest.mark.parametrize("field", ["seed", "strength", "base64", "track_id"])
def test_a_text_without_end_is_read_in_no_time(field: str, text: str) -> None:
    started = time.process_time()
    parsed = requests.parse(Img2ImgRequest, GOOD | {field: text})
    # The check takes a few milliseconds. With backtracking it would take hours.
    assert time.process_time() - started < 1
    assert [violation.field for violation in parsed.violations] == (
        [] if field == "track_id" else [field]  # Any string is a valid track_id.
    )


@pytest.mark.parametrize("value", [True, 1, "true", "TRUE", "yes", "Yes", "1"])
def test_these_are_true(value: Any) -> None:
    assert value_of(BOOLEAN, value) is True


@pytest.mark.parametrize("value", [False, 0, "false", "False", "no", "NO", "0"])
def test_these_are_false(value: Any) -> None:
    assert value_of(BOOLEAN, value) is False


@pytest.mark.parametrize("value", [2, -1, 1.0, "on", "off", " ", [], {}, NAN])
def test_what_is_no_boolean_is_refused(value: Any) -> None:
    assert expected_of(BOOLEAN, value) == "true or false"


@pytest.mark.parametrize("value", [1, 1.5, True, [], {}, "\ud800"])
def test_a_string_must_be_a_json_string_of_unicode_text(value: Any) -> None:
    assert expected_of(STRING, value) == "a string"


def test_a_body_without_options_reads_to_its_two_required_fields() -> None:
    assert requests.read(GOOD) == requests.ParsedBody(dict(GOOD), [])


@pytest.mark.parametrize("nothing", [None, ""])
def test_null_and_the_empty_string_equal_an_absent_optional_field(nothing: Any) -> None:
    optional = [name for name, field in FIELDS.items() if not field.is_required()]
    assert len(optional) == len(FIELDS) - 2
    assert requests.read(GOOD | dict.fromkeys(optional, nothing)) == requests.read(GOOD)


def test_unknown_fields_are_ignored_and_named() -> None:
    extra = {"model_id": "x", "scheduler": "DDIM", "watermark": "no", "scale_down": [1]}
    reading, plain = requests.read(GOOD | extra), requests.read(GOOD)
    assert (reading.values, reading.violations) == (plain.values, plain.violations)
    assert plain.warnings == []
    assert reading.warnings == [
        "The fields model_id, scheduler, watermark and scale_down have no effect here and were "
        "ignored."
    ]


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"clip_skip": 2}, ["The field clip_skip has no effect here and was ignored."]),
        ({"enhance_style": "x"}, ["The field enhance_style has no effect here and was ignored."]),
        ({"lora_model": None, "scheduler": "", "key": "k", "track_id": 5}, []),
        ({"a b\n": 0}, ["The field 'a b\\n' has no effect here and was ignored."]),
        ({"x" * 99: 0}, [f"The field {'x' * 40}… has no effect here and was ignored."]),
        (
            {f"f{index}": 0 for index in range(1000)},
            [
                f"The fields {', '.join(f'f{index}' for index in range(20))} and 980 more have no "
                "effect here and were ignored."
            ],
        ),
    ],
    ids=["one", "echoed", "absent or known", "odd", "long", "many"],
)
def test_a_warning_names_the_fields_without_effect(extra: dict[str, Any], named: list[str]) -> None:
    assert requests.read(GOOD | extra).warnings == named


def test_every_violation_is_reported_in_table_order() -> None:
    body = {
        "track_id": "x" * 192,
        "seed": 2**32,
        "height": 257,
        "width": "wide",
        "negative_prompt": "n" * 2001,
        "temp": "perhaps",
    }
    assert requests.read(body).violations == [
        required("prompt"),
        too_long("negative_prompt", 2000),
        required("init_image"),
        invalid_type("width", "an integer"),
        Violation(
            "height",
            Reason.NOT_DIVISIBLE,
            "height must be divisible by 8",
            values={"divisor": "8"},
        ),
        out_of_range("seed", 0, 2**32 - 1),
        invalid_type("temp", "true or false"),
        too_long("track_id", 191),
    ]


@pytest.mark.parametrize("seed", [-1, "-1", -1.0])
def test_seed_minus_one_means_random(seed: Any) -> None:
    assert requests.read(GOOD | {"seed": seed}) == requests.read(GOOD)


def test_seed_zero_is_a_seed() -> None:
    spec = job_spec(requests.read(GOOD | {"seed": "0"}).values, "http://a")
    assert (spec.HasField("seed"), spec.seed) == (True, 0)


@pytest.mark.parametrize(
    ("sent", "kept", "reported"),
    [
        (
            {"guidance_scale": 99},
            {"guidance_scale": 30.0},
            "guidance_scale was set to 30, the largest value allowed.",
        ),
        (
            {"guidance_scale": -3},
            {"guidance_scale": 0},
            "guidance_scale was set to 0, the smallest value allowed.",
        ),
        ({"guidance_scale": "7.5"}, {"guidance_scale": 7.5}, ""),
        ({"guidance_scale": "strong"}, {}, "guidance_scale was ignored: it must be a number."),
        (
            {"num_inference_steps": 0},
            {"num_inference_steps": 1},
            "num_inference_steps was set to 1, the smallest value allowed.",
        ),
        (
            {"num_inference_steps": "500"},
            {"num_inference_steps": 100},
            "num_inference_steps was set to 100, the largest value allowed.",
        ),
        (
            {"num_inference_steps": 20.5},
            {},
            "num_inference_steps was ignored: it must be an integer.",
        ),
        ({"enhance_style": 5}, {}, "The field enhance_style has no effect here and was ignored."),
    ],
)
def test_hints_are_clamped_or_ignored_with_a_warning_and_never_an_error(
    sent: dict[str, Any], kept: dict[str, Any], reported: str
) -> None:
    warnings = [reported] if reported else []
    assert requests.read(GOOD | sent) == requests.ParsedBody(GOOD | kept, [], warnings)


def test_length_is_counted_in_code_points() -> None:
    assert requests.read(GOOD | {"prompt": "🎨" * 2000}).violations == []
    assert len(requests.read(GOOD | {"prompt": "🎨" * 2001}).violations) == 1


def test_a_full_body_becomes_this_job_spec() -> None:
    body = {
        "prompt": "a harbour",
        "negative_prompt": "blurry",
        "init_image": "https://files.example.org/a.png",
        "width": "768",
        "height": 640.0,
        "samples": "2",
        "strength": "0.55",
        "seed": 7,
        "safety_checker": "no",
        "base64": 1,
        "instant_response": "yes",
        "enhance_prompt": True,
        "temp": "TRUE",
        "webhook": "https://hooks.example.org/a",
        "track_id": 12,
        "guidance_scale": 7,
        "num_inference_steps": 20,
        "enhance_style": "anime",
    }
    expected = job_pb2.JobSpec(
        prompt="a harbour",
        negative_prompt="blurry",
        init_image=job_pb2.InitImage(url="https://files.example.org/a.png"),
        width=768,
        height=640,
        samples=2,
        strength=0.55,
        seed=7,
        safety_checker=False,
        base64=True,
        enhance_prompt=True,
        temp=True,
        webhook="https://hooks.example.org/a",
        track_id="12",
        guidance_scale=7,
        num_inference_steps=20,
        annotations={
            "http.link_base": "https://img.example.com",
            "http.instant_response": "yes",
            "http.enhance_style": "anime",
            "http.track_id_type": "integer",
        },
    )
    assert job_spec(requests.read(body).values, "https://img.example.com") == expected


def test_the_table_has_every_field_of_the_spec_that_http_callers_may_set() -> None:
    ours = {"model", "scheduler", "output_format", "preview_interval_steps", "lane", "annotations"}
    ours |= {"loras", "true_cfg_scale", "strength_mode", "allow_partial"}
    ours |= {"output_quality"}
    ours |= {"prompt_weights", "clip_skip"}
    in_spec = FIELDS.keys() - {"instant_response", "enhance_style"}
    assert in_spec == set(job_pb2.JobSpec.DESCRIPTOR.fields_by_name) - ours


def test_the_documented_defaults_are_those_of_the_domain() -> None:
    defaults = JobParams(prompt="")
    random_or_none = {"seed": None, "webhook": None, "track_id": None, "strength": None}
    # the model's own default
    random_or_none |= {"num_inference_steps": None, "guidance_scale": None}
    for name in SHARED:
        if not FIELDS[name].is_required():
            expected = random_or_none.get(name, getattr(defaults, name))
            assert (name, FIELDS[name].default) == (name, expected)


def proto_comments() -> dict[str, str]:
    """Returns the comment of job.proto about each field of JobSpec, on one line."""
    text = (ROOT / "proto/img2img/v1/job.proto").read_text(encoding="utf-8")
    message = re.search(r"^message JobSpec \{(.*?)^\}", text, re.M | re.S)
    assert message
    found = re.findall(r"((?:  //.*\n)+)  [^\n]*?(\w+) = \d+[^;\n]*;", message[1])
    return {name: re.sub(r"\s*\n?  // ?", " ", comment) for comment, name in found}


def schema_of(name: str) -> dict[str, Any]:
    """Returns the documented limits of a field; a hint has none in the document."""
    if name in HINTS:
        _, least, most = HINTS[name]
        return {"minimum": least, "maximum": most}
    schema = Img2ImgRequest.model_json_schema()["properties"][name]
    return schema.get("anyOf", [schema])[0]


@pytest.mark.parametrize("name", SHARED)
def test_the_fields_and_the_comments_of_the_proto_say_the_same(name: str) -> None:
    said, schema, field = proto_comments()[name].lower(), schema_of(name), FIELDS[name]
    if "maximum" in schema and name != "strength":
        low, high = schema["minimum"], schema["maximum"]
        if name == "seed":  # The contract's range of seeds is narrower.
            low, high = 0, SEED_MAX
        elif name in ("width", "height"):  # The contract's range of sides is narrower.
            high = Settings().max_side_pixels
        decimal = ".0" if name == "guidance_scale" else ""
        assert f"{low:.0f}{decimal} to {high}" in said
    if "multipleOf" in schema:
        assert "a multiple of model.side_multiple" in said
    if "maxLength" in schema:
        assert f"{schema['maxLength']} characters" in said
    if field.is_required():
        assert "required" in said
    elif isinstance(field.default, bool | int | float):
        assert f"default {str(field.default).lower()}" in said
    else:
        assert re.search(
            r"default:? (empty|none|the model's own)|absent or -1: drawn at random", said
        )


PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@pytest.mark.parametrize(
    "text",
    [
        base64.b64encode(PNG).decode(),
        base64.b64encode(PNG).decode().rstrip("="),
        base64.urlsafe_b64encode(PNG).decode(),
        base64.encodebytes(PNG).decode(),
        "  " + base64.b64encode(PNG).decode() + "\n",
        "data:image/png;base64," + base64.b64encode(PNG).decode(),
        "data:text/html;charset=x;base64," + base64.b64encode(PNG).decode(),
        "DATA:;base64," + base64.b64encode(PNG).decode().rstrip("="),
    ],
)
def test_an_inline_image_may_come_in_these_forms(text: str) -> None:
    assert init_image(text) == job_pb2.InitImage(data=PNG)


@pytest.mark.parametrize("url", ["http://a.example/x", "https://a.example/x", "HTTPS://a.example"])
def test_an_address_begins_with_http_or_https(url: str) -> None:
    assert init_image(f" {url} ") == job_pb2.InitImage(url=url)
    assert init_image(f"{url}\u00a0") == job_pb2.InitImage(url=f"{url}\u00a0")


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("not base64!", b"not base64!"),
        ("ftp://a.example/x", b"ftp://a.example/x"),
        ("AAAAA", b"AAAAA"),
        ("é", "é".encode()),
    ],
)
def test_the_api_gets_the_text_that_is_not_base64_and_names_its_format(
    text: str, data: bytes
) -> None:
    assert init_image(text) == job_pb2.InitImage(data=data)


@pytest.mark.parametrize("text", ["data:image/png;base64", "data:;base64,", "data:;base64,*"])
def test_the_api_gets_a_data_uri_that_cannot_be_decoded(text: str) -> None:
    assert init_image(text) == job_pb2.InitImage(url=text)


def test_legacy_sentences_follow_the_pattern_of_the_old_validator() -> None:
    sentence = legacy_field_sentence
    assert sentence(required("prompt")) == "The prompt field is required."
    assert sentence(out_of_range("width", 256, 1024)) == "The width must be between 256 and 1024."
    assert sentence(FetchError().violation) == "Unable to fetch image from provided URL."
