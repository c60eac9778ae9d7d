"""Sana-Sprint: a consistency model with few steps, an autoencoder with 32 pixels per latent."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from img2img_server.domain.models import Guidance
from img2img_server.engine.diffusers.families.base import FlowFamily, Forward, LoadedModel

if TYPE_CHECKING:
    from torch import Tensor

    from img2img_server.engine.diffusers.vae import Autoencoder
    from img2img_server.engine.sampler import Schedule

# longest prompt in tokens, including the end of the instruction before it, as in the stock pipeline
_TOKENS = 300
# Timesteps are angles, as in the stock pipeline: pi / 2 is pure noise.
_FIRST_ANGLE, _SECOND_ANGLE_OF_TWO = 1.57080, 1.3


class SanaSprint(FlowFamily):
    """Sana-Sprint of 0.6 and 1.6 billion parameters.

    Latents are those of the stock pipeline divided by the scheduler's sigma_data, so that their
    noise is standard normal.
    """

    name = "sana_sprint"
    pipelines = dict.fromkeys(
        ("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"), "SanaSprintImg2ImgPipeline"
    )
    schedulers = ("scm",)
    default_scheduler = "scm"
    side_multiple = 32
    # With 2 steps, the default strength would keep nothing of the init image.
    num_inference_steps = 4
    guidance_scale = 4.5

    def guidance(self, config: Mapping[str, Any]) -> Guidance:
        return Guidance.EMBEDDED

    def timestep_arguments(
        self, config: Mapping[str, Any], num_inference_steps: int, height: int, width: int
    ) -> Mapping[str, Hashable]:
        second = _SECOND_ANGLE_OF_TWO if num_inference_steps == 2 else None
        return {"max_timesteps": _FIRST_ANGLE, "intermediate_timesteps": second}

    def derive_schedule(self, scheduler: Any, run: int, num_inference_steps: int) -> Schedule:
        """Returns the last `run` steps: each predicts the clean latents and adds fresh noise."""
        from img2img_server.engine.sampler import Schedule, Step

        angles = scheduler.timesteps[num_inference_steps - run :]
        signals, noises = angles.cos().tolist(), angles.sin().tolist()
        steps = []
        for (angle, after), (signal, signal_after), (noise, noise_after) in zip(
            pairwise(angles.tolist()), pairwise(signals), pairwise(noises), strict=True
        ):
            steps.append(
                Step(
                    timestep=angle,
                    input_scale=1.0,
                    slots=((signal_after * signal, -signal_after * noise, noise_after),),
                    clean=(signal, -noise, 0.0),
                    draws_noise=True,
                    sigma_after=noise_after / signal_after if after else 0.0,
                )
            )
        return Schedule(init_signal=signals[0], init_noise=noises[0], steps=tuple(steps))

    def noise_shares(self, scheduler: Any, num_inference_steps: int) -> Iterable[float]:
        shares: list[float] = scheduler.timesteps[:num_inference_steps].sin().tolist()
        return shares[::-1]

    def schedule_from_noise(
        self, make: Callable[..., Any], share: float, num_inference_steps: int
    ) -> Schedule:
        scheduler = make()
        shares = list(self.noise_shares(scheduler, num_inference_steps))
        run = sum(each < share for each in shares[:-1]) + 1
        if share < shares[run - 1]:
            scheduler.timesteps[-run - 1] = math.asin(share)
        return self.derive_schedule(scheduler, run, num_inference_steps)

    def predict(self, model: LoadedModel, forwards: Sequence[Forward]) -> Sequence[Tensor]:
        import torch

        angles = torch.cat([forward.timestep for forward in forwards])
        times = angles.sin() / (angles.cos() + angles.sin())
        time = times.reshape(-1, 1, 1, 1)
        size = (time**2 + (1 - time) ** 2).sqrt()
        latents = torch.cat([forward.latents for forward in forwards]) * size
        scales = torch.stack([forward.conditioning.guidance_scale for forward in forwards])
        output = model.network(
            latents.to(model.dtype),
            encoder_hidden_states=torch.stack([it.text.tensors["tokens"] for it in forwards]),
            encoder_attention_mask=torch.stack([it.text.tensors["mask"] for it in forwards]),
            guidance=scales.to(model.dtype) * model.network.config.guidance_embeds_scale,
            timestep=times,
            return_dict=False,
        )[0].float()
        # The network predicts the flow between image and noise; the sampler takes the derivative
        # along the angle.
        outputs = ((1 - 2 * time) * latents + size**2 * output) / size
        return torch.split(outputs, 1)

    def encode_prompts(
        self, model: LoadedModel, prompts: Sequence[str], are_negative: Sequence[bool]
    ) -> list[Mapping[str, Tensor]]:
        call = inspect.signature(model.pipeline.__call__)
        encoded, masks = model.pipeline.encode_prompt(
            list(prompts),
            device=model.device,
            max_sequence_length=_TOKENS,
            complex_human_instruction=call.parameters["complex_human_instruction"].default,
        )
        encoded = encoded.to(model.dtype)
        return [
            {"tokens": tokens.clone(), "mask": mask.clone()}
            for tokens, mask in zip(encoded, masks, strict=True)
        ]

    def token_limit(self, tokenizer: Any) -> int:
        # The pipeline keeps two tokens more than it reads, special tokens not counted.
        return _TOKENS - 2 + int(tokenizer.num_special_tokens_to_add())

    def codec(self, vae: Any, tile_pixels: int) -> Autoencoder:
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput

        from img2img_server.engine.diffusers.vae import Autoencoder

        class DeepCompression(Autoencoder):
            """The autoencoder of Sana, whose output is deterministic."""

            def run_encode(self, images: Tensor) -> Any:
                return AutoencoderTinyOutput(latents=self._vae.encode(images).latent)

        return DeepCompression(vae, tile_pixels)
