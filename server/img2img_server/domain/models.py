"""Models and workers, as workers announce them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

from img2img_server.domain.noise_levels import NoiseLevels
from img2img_server.domain.params import DEFAULT_STRENGTH, JobParams, Limits
from img2img_server.domain.schedulers import model_runs
from img2img_server.domain.strength import StrengthMode, StrengthRule


class ModelKind(StrEnum):
    """The training target of a denoiser: noise of a variance schedule, or flow matching."""

    DIFFUSION = "diffusion"
    FLOW = "flow"


class Guidance(StrEnum):
    """The effect of guidance_scale on a model.

    CLASSIFIER_FREE: above 1 a second forward with the negative prompt, as in Stable Diffusion.
    CLASSIFIER_FREE_FROM_ZERO: the same above 0, as in Z-Image. EMBEDDED: an input of the model.
    NONE: it has no effect.
    """

    CLASSIFIER_FREE = "classifier_free"
    CLASSIFIER_FREE_FROM_ZERO = "classifier_free_from_zero"
    EMBEDDED = "embedded"
    NONE = "none"

    @property
    def is_classifier_free(self) -> bool:
        return self in (Guidance.CLASSIFIER_FREE, Guidance.CLASSIFIER_FREE_FROM_ZERO)

    @property
    def off_up_to(self) -> float:
        """The largest scale at which there is no guidance."""
        return 0.0 if self is Guidance.CLASSIFIER_FREE_FROM_ZERO else 1.0

    def forwards(self, scale: float) -> int:
        """Returns how many forwards of the model one step of a sample costs: 2 with
        classifier-free guidance."""
        return 2 if self.is_classifier_free and scale > self.off_up_to else 1


def true_cfg_forwards(negative_prompt: str, scale: float | None) -> int:
    """Returns how many forwards a step costs in models that take true_cfg_scale, as in the stock
    pipelines: 2 if the scale is above 1 and there is a negative prompt.
    """
    return 2 if negative_prompt and scale is not None and scale > 1 else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """A model as callers see it: its name, options and defaults."""

    name: str
    family: str
    schedulers: tuple[str, ...]  # the first one is the default
    default_num_inference_steps: int
    default_guidance_scale: float
    default_strength: float = DEFAULT_STRENGTH
    native_size: int = 512
    max_num_inference_steps: int = 100
    side_multiple: int = 1  # the divisor of width and height, in addition to the service's own
    # Schedulers that run fewer steps than max_num_inference_steps, each with its limit.
    scheduler_max_steps: tuple[tuple[str, int], ...] = ()
    takes_negative_prompt: bool = True
    takes_prompt_weights: bool = False
    max_clip_skip: int = 0  # 0: clip_skip has no effect
    kind: ModelKind = ModelKind.DIFFUSION
    strength_rule: StrengthRule = StrengthRule.FLOOR
    guidance: Guidance = Guidance.CLASSIFIER_FREE
    min_side_pixels: int = 0
    max_side_pixels: int = 1024
    loras: tuple[str, ...] = ()
    # LoRA files that do not fit the model, each with the reason.
    refused_loras: tuple[tuple[str, str], ...] = ()
    embeddings: tuple[str, ...] = ()  # words of prompts with textual inversion embeddings
    # Measured device seconds of a pixel-step, encoders included. The value remains while no worker
    # serves the model. 0.0: not measured yet.
    pixel_step_seconds: float = 0.0
    # Tables of the schedules, for strength as a noise level. Empty: the worker is older than them.
    noise_levels: tuple[NoiseLevels, ...] = ()

    @property
    def takes_true_cfg_scale(self) -> bool:
        """Whether true_cfg_scale takes the place of guidance_scale for the negative prompt."""
        return self.takes_negative_prompt and not self.guidance.is_classifier_free

    def forwards(self, params: JobParams) -> int:
        """Returns how many forwards of the model one step of a sample costs, 1 or 2."""
        if self.takes_true_cfg_scale:
            return true_cfg_forwards(params.negative_prompt, params.true_cfg_scale)
        return self.guidance.forwards(params.guidance_scale)

    def denoising_steps(self, params: JobParams) -> int:
        """Returns how many times the model runs for each sample.

        With strength as a noise level it is an estimate, see `NoiseLevels.steps`. Models without a
        table have the steps of the same strength as a share of steps, which can differ by far.
        """
        run, scheduler = self._steps(params), self._scheduler(params)
        if run and params.strength_mode is StrengthMode.NOISE_LEVEL:
            return 1 + model_runs(scheduler, run - 1)  # The first step runs the model once.
        return model_runs(scheduler, run)

    def most_denoising_steps(self, params: JobParams) -> int:
        """Returns the largest possible number of times that the model runs for each sample."""
        if params.strength_mode is StrengthMode.STEPS or not params.strength:
            return self.denoising_steps(params)
        steps, most = params.num_inference_steps, params.num_inference_steps
        if self.knows_steps(params):
            most = min(steps, self._steps(params) + max(1, math.ceil(steps / 10)))
        return model_runs(self._scheduler(params), most)

    def knows_steps(self, params: JobParams) -> bool:
        """Returns whether `denoising_steps` is close to the number of the engine."""
        return params.strength_mode is StrengthMode.STEPS or self._levels(params) is not None

    def _steps(self, params: JobParams) -> int:
        """Returns how many of the scheduler's steps run."""
        steps, strength = params.num_inference_steps, params.strength
        run = self.strength_rule.denoising_steps(strength, steps)
        if params.strength_mode is StrengthMode.STEPS or not strength:
            return run
        levels = self._levels(params)
        if levels is None:
            return max(1, run)
        if self.strength_rule is StrengthRule.ALL:
            return min(steps, levels.places_below(strength))
        return levels.steps(strength, steps, params.width * params.height)

    def _levels(self, params: JobParams) -> NoiseLevels | None:
        scheduler = self._scheduler(params)
        return next((each for each in self.noise_levels if scheduler in each.schedulers), None)

    def _scheduler(self, params: JobParams) -> str:
        return params.scheduler or self.schedulers[0]

    def pixel_steps(self, params: JobParams) -> int:
        """Returns the pixels of all samples of a job times the runs of the model for each."""
        return params.samples * params.width * params.height * self.denoising_steps(params)

    def work(self, params: JobParams) -> float:
        """Returns the forwards of all samples of a job, each counted as a share of one at the
        model's native size.
        """
        pixels = self.pixel_steps(params) * self.forwards(params)
        return pixels / self.native_size**2

    def limits(self, service: Limits, scheduler: str = "") -> Limits:
        """Returns the limits of requests for this model: those of the service, narrowed by those of
        the model and of the scheduler; an empty name means the model's default scheduler."""
        by_scheduler = dict(self.scheduler_max_steps)
        scheduler = scheduler or self.schedulers[0]
        return replace(
            service,
            max_num_inference_steps=min(
                service.max_num_inference_steps,
                self.max_num_inference_steps,
                by_scheduler.get(scheduler, service.max_num_inference_steps),
            ),
            side_multiple=math.lcm(service.side_multiple, self.side_multiple),
            min_side_pixels=max(service.min_side_pixels, self.min_side_pixels),
            max_side_pixels=min(service.max_side_pixels, self.max_side_pixels),
            max_clip_skip=self.max_clip_skip or service.max_clip_skip,
        )


class ModelState(StrEnum):
    """The state of a model on a worker.

    LOADED: it takes requests now. LOADING: it will within minutes. COLD: the worker loads it for
    requests. FAILED: it could not be loaded, so the worker does not serve it.
    """

    LOADED = "loaded"
    LOADING = "loading"
    COLD = "cold"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """A live worker, which announces itself repeatedly. It counts as lost when its announcement
    expires. A worker with a catalogue announces each of its models as a worker.

    Attributes:
        job_seconds: Recent mean time of one sample at 512x512, the base of estimates; 0.0: not
            measured yet.
        forward_seconds: Recent mean of the device's seconds for a forward at the model's native
            size; jobs that share batches share it. 0.0: not measured yet.
        job_forward_seconds: The same for the job that waits for it; larger, if jobs share batches.
        busy: Share of the time since the last announcement in which the device worked, 0 to 1.
        held_jobs: Jobs that the worker has pulled and not begun; they count as queued.
        draining: The worker finishes its jobs and takes no more.
        begun_jobs: Jobs that use the device.
        state_key: Workers with the same key continue each other's jobs, see Engine.state_key;
            empty: it is not known, so that no other worker has the same.
        store_trouble: Why the worker cannot store files now; empty while it can.
        model_state: The state of the model on the worker.
        load_seconds: Estimated seconds until the worker has loaded its model, if it is not loaded;
            0.0: not known.
        failure: Why the model could not be loaded, if it failed.
        has_catalogue: The worker can load and unload its model.
        rank: The place of the model in the catalogue, from 0.
    """

    name: str
    model: ModelInfo
    device: str
    job_seconds: float = 0.0
    forward_seconds: float = 0.0
    job_forward_seconds: float = 0.0
    busy: float = 0.0
    held_jobs: int = 0
    draining: bool = False
    store_trouble: str = ""
    begun_jobs: int = 0
    state_key: str = ""
    model_state: ModelState = ModelState.LOADED
    load_seconds: float = 0.0
    failure: str = ""
    has_catalogue: bool = False
    rank: int = 0

    @property
    def is_loaded(self) -> bool:
        """Whether the model takes requests now."""
        return self.model_state is ModelState.LOADED

    @property
    def serves(self) -> bool:
        """Whether the worker runs requests for the model, perhaps after loading it."""
        return self.model_state is not ModelState.FAILED and not self.draining

    def can_continue(self, other: WorkerInfo) -> bool:
        """Returns whether the worker could continue a job of another one now."""
        is_busy = self.begun_jobs or self.held_jobs
        is_idle = not (is_busy or self.draining or self.store_trouble or not self.is_loaded)
        is_same = self.model.name == other.model.name and self.state_key == other.state_key != ""
        return is_idle and is_same and self.name != other.name
