"""A model of each family in a service of api and worker."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import grpc
import pytest

from img2img.v1 import job_pb2, service_pb2
from img2img_server.domain.params import JobParams
from img2img_server.engine.base import EngineJob
from img2img_server.engine.diffusers.families import detect
from img2img_server.engine.family import ModelFiles
from img2img_server.engine.load import load_engine
from img2img_server.engine.model_spec import read_model_spec
from img2img_server.engine.options import EngineOptions
from img2img_server.engine.rows import text_of
from tests.engine_bench import blocks
from tests.oracle.harness import families, models
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
    tiny = next(iter(families()[family].values()))
    folder = tiny.write(tmp_path_factory.mktemp("model"))
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
            **tiny.options,
        )
        first, second = [await images(stack.api, wanted) for _ in range(2)]
        strong = spec(
            height=256 + model.side_multiple,
            strength=1.0,
            num_inference_steps=2,
            strength_mode=job_pb2.STRENGTH_MODE_NOISE_LEVEL,
            preview_interval_steps=50,
        )
        estimate = await stack.api.stub.EstimateJob(
            service_pb2.EstimateJobRequest(spec=strong), metadata=DEV
        )
        ended = [message.event async for message in stack.api.generate(strong)][-1].succeeded.job
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stack.api.create(
                spec(scheduler="nonesuch", height=256 + model.side_multiple // 2)
            )

    assert model.family == family
    assert ended.denoising_steps >= 2
    assert ended.start_noise > 0.9
    reason = "no step before the last one reaches preview_interval_steps 50"
    assert ended.warning.count(f"No preview is sent: {reason}.") == 1
    assert abs(estimate.denoising_steps - ended.denoising_steps) <= 1
    assert estimate.warning == f"No preview is sent: {reason}."
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


@pytest.mark.parametrize("name", models())
def test_the_worker_counts_as_many_forwards_as_the_engine_runs(name: str, tmp_path: Path) -> None:
    model = models()[name]
    files = ModelFiles.read(model.write(tmp_path))
    family, info = detect(files, name), read_model_spec(str(tmp_path)).info
    config = files.config(family.denoiser)
    for scale, negative, cfg in product(model.guidance_scales, ("", "fog"), (None, 1.0, 2.0)):
        params = JobParams(
            prompt="p", guidance_scale=scale, negative_prompt=negative, true_cfg_scale=cfg
        )
        wanted = EngineJob(job_id=1, tenant="t", params=params, init_image=blocks(64, 64))
        assert info.forwards(params) == family.forwards(config, text_of(wanted)), params
