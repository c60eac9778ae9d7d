"""Runs the operations of the device thread for many rows at once. A failure affects only its own
row.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch

from img2img_server.engine.denoiser import Denoiser, DeviceImage
from img2img_server.engine.isolation import bisect_failures
from img2img_server.engine.rows import EngineJobState, SampleState
from img2img_server.engine.sampler import advance, scale_input, timesteps

T = TypeVar("T")


class BatchExecutor:
    """Encodes, steps, previews and decodes runs and samples, also of several sizes.

    Every method returns the failed items, each with its error. All other items have succeeded.

    Args:
        on_split: called with samples that do not fit the device together.
    """

    def __init__(
        self, denoiser: Denoiser, on_split: Callable[[Sequence[SampleState]], None]
    ) -> None:
        self._denoiser = denoiser
        self._on_split = on_split
        self._step_before: torch.cuda.Event | None = None

    def prefetch_prompts(self, runs: Sequence[EngineJobState]) -> None:
        """Encodes prompts in one batch into the cache. A failure is ignored here, because `encode`
        repeats the work.
        """

        def work(some: Sequence[EngineJobState]) -> None:
            self._denoiser.encode_texts([run.text for run in some])

        bisect_failures(runs, work, self._free_memory)

    def encode(self, runs: Sequence[EngineJobState]) -> list[tuple[EngineJobState, Exception]]:
        """Encodes prompts and init images, and creates the samples of jobs without a state."""

        def work(some: Sequence[EngineJobState]) -> None:
            conditionings = self._denoiser.encode_texts([run.text for run in some])
            new = [run for run in some if not run.resumed]
            images = (
                self._denoiser.encode_images([run.job.init_image for run in new]) if new else []
            )
            encoded = dict(zip(new, images, strict=True))
            for run, conditioning in zip(some, conditionings, strict=True):
                run.prepare(conditioning, encoded.get(run))

        groups = grouped(runs, lambda run: (run.job.height, run.job.width))
        return [
            failed for group in groups for failed in bisect_failures(group, work, self._free_memory)
        ]

    def step(self, samples: Sequence[SampleState]) -> list[tuple[SampleState, Exception]]:
        """Takes one step of every sample."""

        def before_retry(some: Sequence[SampleState], lacked_memory: bool) -> None:
            self._free_memory()
            if lacked_memory:
                self._on_split(some)

        failed = bisect_failures(samples, self._step, before_retry)
        self._wait_for_device()
        return failed

    def preview(
        self, samples: Sequence[SampleState]
    ) -> tuple[list[tuple[SampleState, DeviceImage]], list[tuple[SampleState, Exception]]]:
        """Makes a rough image of each sample."""
        return self._images(
            samples, lambda some: self._denoiser.preview(torch.cat([it.clean for it in some]))
        )

    def decode(
        self, samples: Sequence[SampleState]
    ) -> tuple[list[tuple[SampleState, DeviceImage]], list[tuple[SampleState, Exception]]]:
        """Decodes the images of finished samples."""
        return self._images(
            samples, lambda some: self._denoiser.decode(torch.cat([it.latents for it in some]))
        )

    def _images(
        self,
        samples: Sequence[SampleState],
        make: Callable[[Sequence[SampleState]], Sequence[DeviceImage]],
    ) -> tuple[list[tuple[SampleState, DeviceImage]], list[tuple[SampleState, Exception]]]:
        """Makes an image of each sample, those of one size together."""
        found: list[tuple[SampleState, DeviceImage]] = []
        failed: list[tuple[SampleState, Exception]] = []

        def work(some: Sequence[SampleState]) -> None:
            found.extend(zip(some, make(some), strict=True))

        for group in grouped(samples, lambda sample: sample.latents.shape):
            failed += bisect_failures(group, work, self._free_memory)
        return found, failed

    def clear_cache(self) -> None:
        """Drops encoded prompts and returns cached memory to the device."""
        self._denoiser.clear_cache()
        self._free_memory()

    def _step(self, samples: Sequence[SampleState]) -> None:
        for sample in samples:
            sample.draw()
        coefficients = torch.stack([sample.coefficients for sample in samples])
        inputs = scale_input([sample.latents for sample in samples], coefficients)
        conditionings = [s.run.conditioning for s in samples if s.run.conditioning is not None]
        outputs = self._denoiser.denoise(inputs, timesteps(coefficients), conditionings)
        results = advance(
            [sample.next_step for sample in samples],
            [sample.slots for sample in samples],
            outputs,
            [sample.noise for sample in samples],
            coefficients,
        )
        for sample, (slots, clean) in zip(samples, results, strict=True):
            sample.advance(slots, clean)

    def _wait_for_device(self) -> None:
        """Lets the host run at most one step ahead of a GPU, for exact timings and cancels."""
        if self._denoiser.device.type != "cuda":
            return
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        if self._step_before is not None:
            self._step_before.synchronize()
        self._step_before = event

    def _free_memory(self, *_: object) -> None:
        if self._denoiser.device.type == "cuda":
            torch.cuda.empty_cache()


def grouped(items: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Returns the items in groups of one key."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())
