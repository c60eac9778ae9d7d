"""The mixed load of the engine benchmark: Poisson arrivals of different requests."""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from img2img_server.domain.models import Guidance
from img2img_server.domain.strength import StrengthRule

STEPS = (4, 8, 16, 30)
# Strengths are in tenths, as users set them, so that some requests can share a call of the
# pipeline.
STRENGTHS = tuple(tenth / 10 for tenth in range(3, 10))
PROMPTS = ("an oil painting of a harbour", "a pencil sketch", "a watercolour garden", "a mosaic")


@dataclass(frozen=True)
class Traits:
    """How requests to a family of models differ from those to another one.

    Attributes:
        guidance_scales: Off first, by the family's own rule.
    """

    scheduler: str = "euler"
    strength_rule: StrengthRule = StrengthRule.FLOOR
    guidance: Guidance = Guidance.CLASSIFIER_FREE
    guidance_scales: tuple[float, ...] = (1.0, 5.0)
    steps: tuple[int, ...] = STEPS


UNET = Traits()


@dataclass(frozen=True)
class Request:
    """One request. `arrival`: seconds after the start."""

    number: int
    arrival: float
    side: int
    strength: float
    num_inference_steps: int
    guidance_scale: float
    prompt: str
    traits: Traits = UNET

    @property
    def seed(self) -> int:
        return self.number

    @property
    def forwards(self) -> int:
        """Returns the number of forwards of the denoiser."""
        rule, guidance = self.traits.strength_rule, self.traits.guidance
        steps = rule.denoising_steps(self.strength, self.num_inference_steps)
        return steps * guidance.forwards(self.guidance_scale)

    @property
    def pixel_forwards(self) -> int:
        return self.forwards * self.side**2


@dataclass(frozen=True)
class Outcome:
    """Times of a request, in seconds after the start; `first_look`: the first preview or image."""

    request: Request
    first_look: float
    finished: float

    @property
    def latency(self) -> float:
        return self.finished - self.request.arrival


@dataclass(frozen=True)
class Served:
    """Outcomes of a load. `busy`: seconds of work; `networks`: seconds of them in networks."""

    outcomes: list[Outcome]
    busy: float
    networks: float


def requests(
    count: int,
    rate: float | None,
    sides: Sequence[int],
    seed: int = 0,
    traits: Traits = UNET,
) -> list[Request]:
    """Returns a load of `count` requests, `rate` of them a second; None: all at once.

    Arrivals are those of a Poisson process under the condition that `count` of them arrive in
    `count / rate` seconds; otherwise a small number of requests would have another rate.
    """
    rng = random.Random(seed)
    found, now = [], 0.0
    for number in range(seed * count, (seed + 1) * count):
        now += rng.expovariate(rate) if rate else 0.0
        found.append(
            Request(
                number=number,
                arrival=now,
                side=rng.choice(list(sides)),
                strength=rng.choice(STRENGTHS),
                num_inference_steps=rng.choice(traits.steps),
                guidance_scale=rng.choice(traits.guidance_scales),
                prompt=rng.choice(PROMPTS),
                traits=traits,
            )
        )
    stretch = count / rate / now if rate else 1.0
    return [replace(request, arrival=request.arrival * stretch) for request in found]


def percentile(values: Sequence[float], percent: float) -> float:
    """Returns the percentile by the nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def merged(rounds: Sequence[Served]) -> Served:
    """Returns several loads as one, as if served one after the other without pauses."""
    outcomes, offset = [], 0.0
    for served in rounds:
        first = min(o.request.arrival for o in served.outcomes)
        for one in served.outcomes:
            shift = offset - first
            request = replace(one.request, arrival=one.request.arrival + shift)
            outcomes.append(Outcome(request, one.first_look + shift, one.finished + shift))
        offset += span(served)
    busy, networks = (sum(getattr(s, name) for s in rounds) for name in ("busy", "networks"))
    return Served(outcomes, busy, networks)


def span(served: Served) -> float:
    """Returns the seconds from the first arrival to the last image."""
    outcomes = served.outcomes
    return max(o.finished for o in outcomes) - min(o.request.arrival for o in outcomes)


def behind_long(load: Sequence[Request], pace: float) -> set[int]:
    """Returns the numbers of the short requests that arrive before a long one can be finished.

    The third of the requests with the fewest pixels x forwards is short, the third with the most is
    long. The result depends on the arrivals, not on the system that serves them.

    Args:
        pace: seconds of the stock pipeline for a pixel x forward.
    """
    by_work = sorted(load, key=lambda request: request.pixel_forwards)
    third = max(1, len(load) // 3)
    return {
        short.number
        for short in by_work[:third]
        if any(
            0 <= short.arrival - long.arrival < long.pixel_forwards * pace
            for long in by_work[-third:]
        )
    }


def summary(served: Served, behind: Collection[int] = ()) -> dict[str, float]:
    """Returns latencies and work in seconds, and the throughput in images a second.

    Short requests are the third with the fewest pixels x forwards; those in `behind` arrived behind
    a long one. `throughput` counts to the last image; below saturation it is the rate of arrivals.
    `device_seconds`: work for an image; its inverse is the rate that the system could serve.
    `overhead`: work beyond UNet, autoencoder and text encoders as a share of theirs; it has no
    meaning on a GPU, where calls return early.
    """
    outcomes = served.outcomes
    latencies = [outcome.latency for outcome in outcomes]
    by_work = sorted(outcomes, key=lambda outcome: outcome.request.pixel_forwards)
    short = [outcome.latency for outcome in by_work[: max(1, len(by_work) // 3)]]
    held_up = [o.latency for o in outcomes if o.request.number in behind] or [0.0]
    looks = [outcome.first_look - outcome.request.arrival for outcome in outcomes]
    return {
        "throughput": round(len(outcomes) / span(served), 3),
        "device_seconds": round(served.busy / len(outcomes), 3),
        "median": round(percentile(latencies, 50), 2),
        "p95": round(percentile(latencies, 95), 2),
        "p99": round(percentile(latencies, 99), 2),
        "short_median": round(percentile(short, 50), 2),
        "short_p95": round(percentile(short, 95), 2),
        "behind_p95": round(percentile(held_up, 95), 2),
        "first_look_median": round(percentile(looks, 50), 2),
        "busy_share": round(served.busy / span(served), 3),
        "overhead": round(served.busy / served.networks - 1, 3),
    }
