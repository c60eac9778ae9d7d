"""The protocol as clients see it. A released field number never changes its meaning."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)

from img2img.v1 import admin_service_pb2, event_pb2, job_pb2, service_pb2
from tests.golden_file import assert_golden
from tests.readme import ROOT


def described(file: FileDescriptor) -> Iterator[str]:
    """Returns one line for each enum value, field and method of the file."""
    proto = FileDescriptorProto()
    file.CopyToProto(proto)
    for enum in proto.enum_type:
        yield from enum_lines(enum, proto.package)
    for message in proto.message_type:
        yield from message_lines(message, proto.package)
    for service in proto.service:
        for method in service.method:
            stream = "stream " if method.server_streaming else ""
            types = f"({method.input_type[1:]}) -> {stream}{method.output_type[1:]}"
            yield f"rpc {proto.package}.{service.name}/{method.name}{types}"


def enum_lines(enum: EnumDescriptorProto, scope: str) -> Iterator[str]:
    for value in enum.value:
        yield f"enum {scope}.{enum.name} {value.number} {value.name}"


def message_lines(message: DescriptorProto, scope: str) -> Iterator[str]:
    name = f"{scope}.{message.name}"
    yield from (line for enum in message.enum_type for line in enum_lines(enum, name))
    for field in message.field:
        yield f"field {name} {field.number} {field.name}: {kind(field, message)}"
    yield from (line for nested in message.nested_type for line in message_lines(nested, name))


def kind(field: FieldDescriptorProto, message: DescriptorProto) -> str:
    """Returns a type, for example "optional int32", "repeated img2img.v1.Sample" or "bytes in
    source".
    """
    scalar = FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    name = field.type_name[1:] or scalar
    if field.label == FieldDescriptorProto.LABEL_REPEATED:
        return f"repeated {name}"
    if field.proto3_optional:
        return f"optional {name}"
    if field.HasField("oneof_index"):
        return f"{name} in {message.oneof_decl[field.oneof_index].name}"
    return name


def test_the_protocol_on_the_wire_is_the_golden_one() -> None:
    modules = (job_pb2, event_pb2, service_pb2, admin_service_pb2)
    lines = [line for module in modules for line in described(module.DESCRIPTOR)]
    assert_golden("descriptor.txt", "\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "proto/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_request_field_without_a_declared_behavior_is_found(
    generator: ModuleType, tmp_path: Path
) -> None:
    file = FileDescriptorProto()
    service_pb2.DESCRIPTOR.CopyToProto(file)
    [request] = [each for each in file.message_type if each.name == "CreateJobRequest"]
    found = tmp_path / "descriptors.binpb"
    found.write_bytes(FileDescriptorSet(file=[file]).SerializeToString())
    assert list(generator.fields_without_behavior(found)) == []
    request.field.add(name="colour", number=99, type=FieldDescriptorProto.TYPE_STRING)
    found.write_bytes(FileDescriptorSet(file=[file]).SerializeToString())
    assert list(generator.fields_without_behavior(found)) == [
        f"{file.name}: CreateJobRequest.colour"
    ]
