"""Every sentence that a rejected request or a failed job can give its caller, in one golden file.
Other tests assert fields and reasons, so a message is reworded in one place only.
"""

import inspect
from dataclasses import fields, replace

from img2img_server import errors
from img2img_server.compat.modelslab import sentences
from img2img_server.compat.modelslab.server_types import validate_server_type
from img2img_server.domain.params import JobParams, Limits, Lora, ValidationContext, validate
from img2img_server.domain.storage import StorageDetails, validate_storage
from img2img_server.domain.violations import Reason, Violation, invalid_type
from img2img_server.imaging import base
from tests.golden_file import assert_golden

# A value for each parameter of the errors' constructors.
ARGUMENTS = {
    "attempts": 3,
    "cause": "the server answered 403",
    "error_id": "0123456789abcdef",
    "height": 768,
    "hours": 24,
    "known": ("one", "two"),
    "limit": 15,
    "model": "dreamer",
    "name": "jobs/10000001",
    "needed_bytes": 2**30,
    "needed_seconds": 9.0,
    "per_minute": 60,
    "permission": "operate",
    "remaining_seconds": 3.0,
    "resource": "image bytes",
    "request_id": "6f1c0f3e-0000-4000-8000-000000000000",
    "retry_seconds": 4.0,
    "sentence": "This key may not …",
    "state": "succeeded",
    "width": 1024,
    "upload": "uploads/5b1f",
    "most_bytes": 2**30,
    "most_uploads": 1000,
    "violations": [invalid_type("width", "an integer")],
}
BAD_PARAMS = JobParams(
    prompt="",
    negative_prompt="x" * 2001,
    width=513,
    height=10,
    samples=9,
    strength=2.0,
    seed=-2,
    webhook="ftp://example.org",
    track_id="x" * 192,
    num_inference_steps=0,
    guidance_scale=99.0,
    scheduler="nope",
    loras=(Lora("nope", 9.0), Lora("nope")),
    true_cfg_scale=99.0,
    preview_interval_steps=-1,
    annotations=(("", "x" * 2001), *((f"name{index}", "") for index in range(16))),
)


def error_lines(root: type[errors.ServiceError] | type[errors.JobFailedError]) -> list[str]:
    lines = []
    for kind in root.__subclasses__():
        wanted = inspect.signature(kind.__init__).parameters
        given = {name: ARGUMENTS[name] for name in wanted if name in ARGUMENTS}
        error = kind(**given)
        lines.append(f"{error.reason}: {error}")
    return lines


def violations() -> list[Violation]:
    context = ValidationContext(schedulers=("ddim", "euler"), loras=("ink", "oil"))
    empty = StorageDetails(**{field.name: "" for field in fields(StorageDetails)})
    bad = StorageDetails(
        public_url="x",
        region_name="\n",
        endpoint_url="x",
        aws_access_key_id="x" * 1025,
        aws_secret_access_key="x",
        image_directory="..",
    )
    return [
        *validate(BAD_PARAMS, context),
        *validate(JobParams(prompt=" "), ValidationContext()),
        *validate(JobParams(prompt="p", loras=(Lora("ink"),)), ValidationContext()),
        *validate(JobParams(prompt="p", loras=(Lora("ink"),) * 9), ValidationContext()),
        *validate_storage(empty),
        *validate_storage(bad),
        *validate_server_type("toaster"),
        base.FetchError("the server answered 403").violation,
        base.not_an_image("the PNG image cannot be used: it is damaged").violation,
        base.too_large(Limits()).violation,
    ]


def test_the_golden_file_has_every_sentence() -> None:
    lines = ["# Errors of calls", *error_lines(errors.ServiceError)]
    lines += ["", "# Failures of jobs", *error_lines(errors.JobFailedError)]
    lines += ["", "# Broken rules: ours, then ModelsLab's and its older validator's if they differ"]
    for broken in violations():
        lines.append(f"{broken.field} {broken.reason}: {broken.text}")
        modelslab = replace(broken, message=sentences.field_sentence(broken)).text
        for other in (modelslab, sentences.legacy_field_sentence(broken)):
            if other != broken.text:
                lines.append(f"    {other}")
    lines += ["", "# Errors of calls in ModelsLab's words"]
    for reason in sentences.ERRORS:
        lines.append(
            f"{reason}: {sentences.error_sentence(reason, {'limit': '15', 'per_minute': '60'})}"
        )
    assert_golden("messages.txt", "\n".join(lines) + "\n")


def test_every_reason_is_a_code() -> None:
    kinds = [*errors.ServiceError.__subclasses__(), *errors.JobFailedError.__subclasses__()]
    for reason in (*Reason, *(kind.reason for kind in kinds)):
        assert reason.replace("_", "").isupper(), reason
