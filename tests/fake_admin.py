"""Management calls that always succeed, for FakeService."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from img2img.v1 import admin_service_pb2, admin_service_pb2_grpc


class FakeAdmin(admin_service_pb2_grpc.AdminServiceServicer):
    """Passes each request to `note` and returns a fixed response."""

    def __init__(self, note: Callable[[Message, Any], None]) -> None:
        def answering(answer: Message) -> Any:
            def call(request: Message, context: grpc.ServicerContext[Any, Any]) -> Message:
                note(request, context)
                return answer

            return call

        details = admin_service_pb2.GetSystemDetailsResponse(
            server_version="0.1.0",
            uptime=Duration(seconds=90),
            model_count=2,
            queued_jobs=3,
            queue_duration=Duration(seconds=4, nanos=500_000_000),
            gpu_usage=0.25,
        )
        self.GetSystemDetails = answering(details)
        unused = admin_service_pb2.ApiKey(id="ab12", tenant="lab")
        used = admin_service_pb2.ApiKey(
            id="web-2",
            tenant="shop",
            label="the web shop",
            permissions=["operate"],
            expire_time=Timestamp(seconds=1767225600),
            has_expired=True,
            last_use_time=Timestamp(seconds=1767225540),
        )
        self.ListKeys = answering(admin_service_pb2.ListKeysResponse(keys=[unused, used]))
        self.RestartServer = answering(admin_service_pb2.RestartServerResponse())
        self.UpdateServer = answering(admin_service_pb2.UpdateServerResponse())
        self.ClearCache = answering(admin_service_pb2.ClearCacheResponse())
        self.LoadModel = answering(admin_service_pb2.LoadModelResponse(workers=["w1"]))
        self.UnloadModel = answering(admin_service_pb2.UnloadModelResponse(workers=["w1", "w2"]))
        self.ClearQueue = answering(admin_service_pb2.ClearQueueResponse(cleared_jobs=3))
