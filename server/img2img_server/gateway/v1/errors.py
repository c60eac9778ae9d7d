"""The errors of /v1: our own sentences, and the reasons of gRPC for the error and its fields."""

from __future__ import annotations

from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from img2img_server.compat.modelslab.errors import RequestError
from img2img_server.compat.modelslab.response_formats import Plain, Reply
from img2img_server.compat.modelslab.responses import Error
from img2img_server.domain.violations import Violation


class FieldViolation(TypedDict):
    """A rule that a field of a request broke."""

    field: Annotated[str, Field(description="Name of the field, or the place of the fault.")]
    reason: Annotated[
        str,
        Field(
            pattern="^[A-Z][A-Z0-9_]*$",
            description="Machine-readable reason, equal to that of BadRequest over gRPC.",
        ),
    ]
    message: str
    values: Annotated[
        dict[str, str], Field(description="Limits and names in the message, such as min and max.")
    ]


class V1Error(Error):
    """A request to /v1 that was refused. `violations` has every invalid field."""

    violations: NotRequired[list[FieldViolation]]


class ErrorFormat(Plain):
    """The format of every error below /v1, in legacy mode too."""

    def error(self, error: RequestError) -> Reply:
        body, status, headers = super().error(error)
        if error.violations:
            body = {**body, "violations": list(map(_violation, error.violations))}
        return body, status, headers


def _violation(violation: Violation) -> FieldViolation:
    return {
        "field": violation.field,
        "reason": str(violation.reason),
        "message": violation.text,
        "values": dict(violation.values),
    }
