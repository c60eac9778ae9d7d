"""A small grpcurl with the options of the README. It uses server reflection and none of our stubs.

grpcurl -plaintext -H 'NAME: VALUE' [-d @] HOST:PORT PACKAGE.SERVICE/METHOD
"""

from __future__ import annotations

import argparse
import sys

import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.json_format import MessageToJson, Parse
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)


def main() -> int:
    """Prints each response as JSON. Returns 1 if the call fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-plaintext", action="store_true", required=True)
    parser.add_argument("-H", dest="header", required=True)
    parser.add_argument("-d", dest="data", choices=["@"])
    parser.add_argument("address")
    parser.add_argument("method")
    arguments = parser.parse_args()
    service_name, _, method_name = arguments.method.partition("/")
    name, _, value = arguments.header.partition(": ")
    options = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(arguments.address, options) as channel:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
        method = pool.FindServiceByName(service_name).methods_by_name[method_name]
        request = GetMessageClass(method.input_type)()
        if arguments.data:
            Parse(sys.stdin.read(), request, descriptor_pool=pool)
        kind = channel.unary_stream if method.server_streaming else channel.unary_unary
        call = kind(
            f"/{arguments.method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        try:
            answer = call(request, metadata=[(name, value)], timeout=60)
            for message in answer if method.server_streaming else [answer]:
                print(MessageToJson(message, descriptor_pool=pool), flush=True)
        except grpc.RpcError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
