"""JSON bodies of /v1: numbers that no field of the proto can hold."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from img2img.v1 import job_pb2, service_pb2
from img2img_server.domain.violations import Reason
from img2img_server.gateway.v1 import protojson

_INTEGERS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
_MESSAGES: list[type[Message]] = [
    service_pb2.CreateJobRequest,
    service_pb2.EstimateJobRequest,
    service_pb2.CreateUploadRequest,
    service_pb2.ListJobsRequest,
    service_pb2.WatchJobRequest,
    job_pb2.JobSpec,
    job_pb2.Lora,
]


@pytest.mark.parametrize("value", [2**70, -(2**70), str(2**70)], ids=["above", "below", "text"])
@pytest.mark.parametrize("message", _MESSAGES, ids=lambda kind: kind.DESCRIPTOR.name)
def test_integers_beyond_the_bits_of_their_field_are_out_of_range(
    message: type[Message], value: int | str
) -> None:
    for field in message.DESCRIPTOR.fields:
        if field.cpp_type in _INTEGERS:
            [found] = protojson.fill(message(), {field.name: value})
            assert (found.field, found.reason) == (field.name, Reason.OUT_OF_RANGE)
