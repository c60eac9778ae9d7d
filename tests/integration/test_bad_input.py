"""Invalid requests over gRPC: a typed error names every field with a fault, and other requests
succeed.
"""

import io
import zlib
from typing import Any

import grpc
import pytest
from PIL import Image

from img2img.v1 import job_pb2, service_pb2
from img2img_server.domain.violations import Reason
from img2img_server.imaging.base import FetchError
from tests.stack import DEV, kinds, photo, refusal, running_stack, spec


def image_of_70_megapixels() -> bytes:
    """Returns a PNG of a few bytes whose header declares 10000 x 7000 pixels."""
    header = io.BytesIO()
    Image.new("L", (1, 1)).save(header, "PNG")
    data = bytearray(header.getvalue())
    data[16:24] = (10_000).to_bytes(4, "big") + (7_000).to_bytes(4, "big")
    data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    return bytes(data)


def inline(data: bytes) -> dict[str, Any]:
    return {"init_image": job_pb2.InitImage(data=data)}


CASES: dict[str, tuple[dict[str, Any], dict[str, Reason]]] = {
    "missing prompt": ({"prompt": ""}, {"prompt": Reason.REQUIRED}),
    "strength 1.5": ({"strength": 1.5}, {"strength": Reason.OUT_OF_RANGE}),
    "width 513": ({"width": 513}, {"width": Reason.NOT_DIVISIBLE}),
    "samples 9": ({"samples": 9}, {"samples": Reason.OUT_OF_RANGE}),
    "no image": ({"init_image": None}, {"init_image": Reason.REQUIRED}),
    "not an image": (inline(b"just some text"), {"init_image": Reason.INVALID_IMAGE}),
    "an address that gives nothing": (  # real addresses are in test_http_contract_parity.py
        {"init_image": job_pb2.InitImage(url="http://127.0.0.1:9/none.png")},
        {"init_image": Reason.DOWNLOAD_FAILED},
    ),
    "no URL": (
        {"init_image": job_pb2.InitImage(url="file:///etc/passwd")},
        {"init_image": Reason.DOWNLOAD_FAILED},
    ),
    "70 megapixels": (inline(image_of_70_megapixels()), {"init_image": Reason.TOO_MANY_PIXELS}),
    "30 MB body": (inline(photo() + bytes(30_000_000)), {"init_image": Reason.TOO_MANY_BYTES}),
    "truncated JPEG": (inline(photo(640, 480)[:-2000]), {"init_image": Reason.INVALID_IMAGE}),
    "everything at once": (
        {"prompt": "", "width": 513, "height": 10, "samples": 9, "strength": -1, **inline(b"x")},
        {
            "prompt": Reason.REQUIRED,
            "width": Reason.NOT_DIVISIBLE,
            "height": Reason.OUT_OF_RANGE,
            "samples": Reason.OUT_OF_RANGE,
            "strength": Reason.OUT_OF_RANGE,
        },  # The image is checked after all other fields.
    ),
    "unknown enum values": (
        {"output_format": 77, "lane": 9},
        {"output_format": Reason.NOT_SUPPORTED, "lane": Reason.NOT_SUPPORTED},
    ),
}


async def no_such_page(_: str) -> bytes:
    raise FetchError


@pytest.mark.parametrize("case", CASES, ids=lambda name: name.replace(" ", "-"))
async def test_bad_input_names_every_violated_field_and_later_requests_work(case: str) -> None:
    changes, reasons = CASES[case]
    async with running_stack(fetch=no_such_page) as stack:
        for call in (
            lambda api: api.create(spec(**changes)),
            lambda api: api.generate(spec(**changes)).read(),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call(stack.api)
            found = refusal(caught.value)
            assert (found.code, found.reason) == (
                grpc.StatusCode.INVALID_ARGUMENT,
                "INVALID_REQUEST",
            )
            assert found.reasons == reasons
            assert caught.value.details() == "; ".join(found.violations.values())
        good = [m async for m in stack.api.generate(spec())]
        assert kinds(good)[-1] == "succeeded"
        listed = await stack.api.stub.ListJobs(service_pb2.ListJobsRequest(), metadata=DEV)
        assert len(listed.jobs) == 1  # Rejected requests create no job.


@pytest.mark.parametrize("header", ["Bearer unknown", "Bearer ", "dev-key", ""])
async def test_an_unknown_key_is_reported_whatever_else_is_wrong_and_later_requests_work(
    header: str,
) -> None:
    metadata = (("authorization", header),) if header else ()
    async with running_stack() as stack:
        for job_spec in (spec(), spec(width=513, prompt="")):
            for call in (
                stack.api.stub.CreateJob(
                    service_pb2.CreateJobRequest(spec=job_spec), metadata=metadata
                ),
                stack.api.stub.Generate(
                    service_pb2.GenerateRequest(spec=job_spec), metadata=metadata
                ).read(),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                found = refusal(caught.value)
                assert (found.code, found.reason) == (
                    grpc.StatusCode.UNAUTHENTICATED,
                    "INVALID_API_KEY",
                )
                assert found.violations == {}
        assert await stack.bus.jobs.list_ids("dev") == []
        assert kinds([m async for m in stack.api.generate(spec())])[-1] == "succeeded"


async def test_a_message_over_the_limit_is_refused_and_the_connection_lives() -> None:
    async with running_stack() as stack:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.create(spec(**inline(bytes(35 * 2**20))))
        assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert kinds([m async for m in stack.api.generate(spec())])[-1] == "succeeded"
