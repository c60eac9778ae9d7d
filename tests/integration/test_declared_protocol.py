"""The api does as the descriptors of the protocol declare: reflection in both versions, and
required fields.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, MethodDescriptor
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection_pb2

from img2img.v1 import job_pb2, service_pb2
from img2img_server.api.reflection import SERVICE_NAMES
from img2img_server.domain.violations import Reason
from tests.stack import DEV, WAIT_SECONDS, Api, Refusal, photo, refusal, running_stack

SERVICE = service_pb2.DESCRIPTOR.services_by_name["Img2ImgService"]


@pytest_asyncio.fixture
async def api() -> AsyncIterator[Api]:
    async with running_stack() as stack:
        stack.worker.engine.release()
        yield stack.api


async def reflected(api: Api, service: str, **request: str) -> Any:
    """Returns the response of one version of the reflection service."""
    asked = reflection_pb2.ServerReflectionRequest(**request)
    call = api.channel.stream_stream(
        f"/{service}/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    [response] = [each async for each in call(iter([asked]), timeout=WAIT_SECONDS)]
    return response


@pytest.mark.parametrize("service", SERVICE_NAMES)
async def test_a_client_of_reflection_reads_every_service_that_is_listed(
    api: Api, service: str
) -> None:
    listed = await reflected(api, service, list_services="")
    names = {each.name for each in listed.list_services_response.service}
    assert names == {
        "img2img.v1.Img2ImgService",
        "img2img.v1.AdminService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    files: dict[str, FileDescriptorProto] = {}
    # google.rpc: clients print the details of errors.
    for name in (*names, "google.rpc.BadRequest", "google.rpc.ErrorInfo"):
        found = await reflected(api, service, file_containing_symbol=name)
        for data in found.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(data)
            files[file.name] = file
    pool = DescriptorPool()
    waiting = list(files.values())
    while waiting:  # A file can be added after those that it imports.
        added = [file for file in waiting if not set(file.dependency) & {f.name for f in waiting}]
        assert added
        for file in added:
            pool.Add(file)
        waiting = [file for file in waiting if file not in added]
    for name in names:
        for method in pool.FindServiceByName(name).methods:
            assert method.input_type.full_name.rpartition(".")[0] == name.rpartition(".")[0]
    prompt = pool.FindFieldByName("img2img.v1.JobSpec.prompt")
    assert prompt.GetOptions().ByteSize() > 0


def required(message: Descriptor) -> Iterator[str]:
    """Yields the names of the required fields, in place of a message those of its own fields."""
    for field in message.fields:
        if (
            field_behavior_pb2.REQUIRED
            in field.GetOptions().Extensions[field_behavior_pb2.field_behavior]
        ):
            inner = list(required(field.message_type)) if field.message_type else []
            yield from inner or [field.name]


async def refused(api: Api, method: MethodDescriptor) -> Refusal:
    """Returns the error of a call with an empty request."""
    kind = api.channel.unary_stream if method.server_streaming else api.channel.unary_unary
    call = kind(f"/{SERVICE.full_name}/{method.name}")(b"", metadata=DEV, timeout=WAIT_SECONDS)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (call.read() if method.server_streaming else call)
    return refusal(caught.value)


async def test_a_request_without_its_required_fields_is_refused_and_only_then(api: Api) -> None:
    for method in SERVICE.methods:
        fields = set(required(method.input_type))
        if fields <= {"name"}:  # A resource without a name is not found.
            continue
        fields -= {"init_image"} if method.name == "EstimateJob" else set()
        found = await refused(api, method)
        assert (method.name, found.reasons) == (
            method.name,
            dict.fromkeys(fields, Reason.REQUIRED),
        )
    accepted = await api.create(
        job_pb2.JobSpec(prompt="a harbour at dusk", init_image=job_pb2.InitImage(data=photo()))
    )
    assert accepted.state == job_pb2.Job.STATE_QUEUED
