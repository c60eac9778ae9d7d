"""Server reflection in both versions: v1, and v1alpha for older clients.

grpcio-reflection has v1alpha only. v1 has the same messages in another package, so its descriptor
is derived from that of v1alpha.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha import reflection, reflection_pb2

_V1ALPHA: Final = "grpc.reflection.v1alpha"
_V1: Final = "grpc.reflection.v1"
_FILE: Final = "grpc/reflection/v1/reflection.proto"
SERVICE_NAMES: Final = (f"{_V1}.ServerReflection", reflection.SERVICE_NAME)


def add_reflection(server: grpc.aio.Server, services: Iterable[str]) -> None:
    """Registers both versions. Each lists `services` and both versions."""
    _add_descriptor()
    names = (*services, *SERVICE_NAMES)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {"ServerReflectionInfo": handler}
    server.add_registered_method_handlers(SERVICE_NAMES[0], handlers)


def _add_descriptor() -> None:
    """Adds the descriptor of v1 to the pool, so that clients can read every listed service."""
    pool = descriptor_pool.Default()
    try:
        pool.FindFileByName(_FILE)
    except KeyError:
        file = FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(file)
        file.name, file.package = _FILE, _V1
        file.ClearField("options")
        for field in (field for message in file.message_type for field in message.field):
            if field.HasField("type_name"):
                field.type_name = field.type_name.replace(_V1ALPHA, _V1)
        for method in (method for service in file.service for method in service.method):
            method.input_type = method.input_type.replace(_V1ALPHA, _V1)
            method.output_type = method.output_type.replace(_V1ALPHA, _V1)
        pool.Add(file)
