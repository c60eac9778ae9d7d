"""A model of each family, through the api and a worker."""

from __future__ import annotations

import grpc
import pytest

from img2img.v1 import job_pb2, service_pb2
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import EngineOptions
from tests.oracle.harness import families
from tests.stack import DEV, Api, refusal, running_stack, settings, spec


async def images(api: Api, wanted: job_pb2.JobSpec) -> dict[int, job_pb2.Image]:
    """Returns the images of a request by seed."""
    found = [message.event async for message in api.generate(wanted)]
    assert found[-1].HasField("succeeded"), found[-1]
    finished = [it.sample_finished for it in found if it.HasField("sample_finished")]
    return {sample.seed: sample.image for sample in finished}


@pytest.mark.parametrize("family", families())
async def test_a_model_of_each_family_serves_what_it_announces(
    family: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = next(iter(families()[family].values())).write(tmp_path_factory.mktemp("model"))
    engine = load_engine(
        EngineOptions.of(settings(model=str(folder), device="cpu", warm_up_sizes=""))
    )
    async with running_stack(engine, api_config=settings(default_model="")) as stack:
        request = service_pb2.GetCapabilitiesRequest()
        (model,) = (await stack.api.stub.GetCapabilities(request, metadata=DEV)).models
        wanted = spec(
            height=256 + model.side_multiple,
            num_inference_steps=3,
            strength=0.7,
            guidance_scale=3.0,
            negative_prompt="fog",
            scheduler=model.schedulers[-1],
            samples=2,
        )
        first, second = [await images(stack.api, wanted) for _ in range(2)]
        strong = spec(
            height=256 + model.side_multiple,
            strength=1.0,
            num_inference_steps=2,
            strength_mode=job_pb2.STRENGTH_MODE_NOISE_LEVEL,
        )
        ended = [message.event async for message in stack.api.generate(strong)][-1].succeeded.job
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.create(
                spec(scheduler="nonesuch", height=256 + model.side_multiple // 2)
            )

    assert model.family == family
    assert ended.denoising_steps >= 2
    assert ended.start_noise > 0.9
    has_influence = ended.start_noise < 0.9999
    assert ("At strength 1 the init image had no influence." in ended.warning) is not has_influence
    assert not (has_influence and model.kind == model.KIND_FLOW)
    assert {(image.width, image.height) for image in first.values()} == {(256, wanted.height)}
    assert {seed: image.sha256 for seed, image in first.items()} == {
        seed: image.sha256 for seed, image in second.items()
    }
    assert len({image.sha256 for image in first.values()}) == 2
    assert refusal(caught.value).reasons == {
        "scheduler": "NOT_SUPPORTED",
        "height": "NOT_DIVISIBLE",
    }
