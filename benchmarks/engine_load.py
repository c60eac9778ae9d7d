"""The mixed load of the engine benchmark: Poisson arrivals of requests with little in common."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from img2img_server.domain.params import denoising_steps

STEPS = (4, 8, 16, 30)
PROMPTS = ("an oil painting of a harbour", "a pencil sketch", "a watercolour garden", "a mosaic")


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

    @property
    def seed(self) -> int:
        return self.number

    @property
    def forwards(self) -> int:
        """UNet forwards it needs."""
        steps = denoising_steps(self.strength, self.num_inference_steps)
        return steps * (2 if self.guidance_scale > 1 else 1)

    @property
    def pixel_forwards(self) -> int:
        return self.forwards * self.side**2


@dataclass(frozen=True)
class Outcome:
    """What became of a request. Seconds after the start; `first_look`: first preview or picture."""

    request: Request
    first_look: float
    finished: float

    @property
    def latency(self) -> float:
        return self.finished - self.request.arrival


@dataclass(frozen=True)
class Served:
    """What serving a load gave. `busy`: seconds of work; `networks`: those of them in networks."""

    outcomes: list[Outcome]
    busy: float
    networks: float


def requests(count: int, rate: float | None, sides: Sequence[int], seed: int = 0) -> list[Request]:
    """A load of `count` requests, `rate` of them a second; None: all at once."""
    rng = random.Random(seed)
    found, now = [], 0.0
    for number in range(count):
        now += rng.expovariate(rate) if rate else 0.0
        found.append(
            Request(
                number=number,
                arrival=now,
                side=rng.choice(list(sides)),
                strength=round(rng.uniform(0.3, 0.9), 2),
                num_inference_steps=rng.choice(STEPS),
                guidance_scale=rng.choice([1.0, 5.0]),
                prompt=rng.choice(PROMPTS),
            )
        )
    return found


def percentile(values: Sequence[float], percent: float) -> float:
    """Nearest rank."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(percent / 100 * (len(ordered) - 1)))]


def summary(served: Served) -> dict[str, float]:
    """Throughput in pictures a second, latencies in seconds, and what the device did.

    Short requests are the third that needs the fewest pixels x forwards. `busy_share`: of the time
    from the first arrival to the last picture. `overhead`: work beyond UNet, autoencoder and text
    encoders as a share of theirs; of no meaning on a GPU, where calls return early.
    """
    outcomes = served.outcomes
    latencies = [outcome.latency for outcome in outcomes]
    by_work = sorted(outcomes, key=lambda outcome: outcome.request.pixel_forwards)
    short = [outcome.latency for outcome in by_work[: max(1, len(by_work) // 3)]]
    looks = [outcome.first_look - outcome.request.arrival for outcome in outcomes]
    span = max(o.finished for o in outcomes) - min(o.request.arrival for o in outcomes)
    return {
        "throughput": round(len(outcomes) / span, 3),
        "median": round(percentile(latencies, 50), 2),
        "p95": round(percentile(latencies, 95), 2),
        "p99": round(percentile(latencies, 99), 2),
        "short_median": round(percentile(short, 50), 2),
        "short_p95": round(percentile(short, 95), 2),
        "first_look_median": round(percentile(looks, 50), 2),
        "busy_share": round(served.busy / span, 3),
        "overhead": round(served.busy / served.networks - 1, 3),
    }
