"""The arithmetic of the engine benchmark: the classes of requests."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.engine_load import (
    Outcome,
    Request,
    Served,
    Traits,
    behind_long,
    merged,
    requests,
    span,
    summary,
)
from benchmarks.engine_report import misses
from img2img_server.domain.models import Guidance
from img2img_server.domain.strength import StrengthRule


def request(number: int, arrival: float, steps: int) -> Request:
    return Request(number, arrival, 8, 1.0, steps, 1.0, "a mosaic")


def test_the_same_seed_gives_the_same_requests_and_another_one_other_numbers() -> None:
    assert requests(5, 2.0, [64]) == requests(5, 2.0, [64])
    assert requests(5, 2.0, [64])[-1].arrival == pytest.approx(2.5)
    numbers = [one.number for seed in (0, 1) for one in requests(5, 2.0, [64], seed)]
    assert numbers == list(range(10))


def test_a_short_request_is_behind_a_long_one_that_could_not_be_done_yet() -> None:
    pace = 1.0 / (100 * 64)  # The long request of 100 steps takes a second.
    load = [
        request(0, 0.0, steps=2),  # This request arrives before the long one.
        request(1, 1.0, steps=100),
        request(2, 1.9, steps=2),
        request(3, 2.1, steps=3),  # The long request could be finished at this time.
        request(4, 1.5, steps=50),
        request(5, 9.0, steps=60),
        request(6, 1.5, steps=20),  # This request is in neither third.
    ]

    assert behind_long(load, pace) == {2}


def test_the_work_of_a_request_depends_on_its_family() -> None:
    flow = Traits(
        scheduler="flow_match_euler",
        strength_rule=StrengthRule.CEIL,
        guidance=Guidance.CLASSIFIER_FREE_FROM_ZERO,
        guidance_scales=(0.0, 1.0),
        steps=(8,),
    )
    one = Request(0, 0.0, 64, 0.6, 8, 1.0, "a mosaic")

    assert one.forwards == 4
    assert replace(one, traits=flow).forwards == 5 * 2
    load = requests(20, None, [64], traits=flow)
    assert {each.num_inference_steps for each in load} == {8}
    assert {each.guidance_scale for each in load} == {0.0, 1.0}


def test_a_ratio_that_is_too_small_is_named() -> None:
    found = {
        "flux": {"throughput ratio": 1.1, "short p95 ratio": 3.0},
        "z_image": {"throughput ratio": 1.0, "short p95 ratio": 2.9},
    }

    assert misses({"families": found}) == [
        "flux: throughput 1.1, at least 1.2",
        "z_image: short p95 2.9, at least 3.0",
    ]


def test_rounds_are_summed_up_without_the_time_between_them() -> None:
    rounds = [
        Served([Outcome(request(0, 1.0, 4), 1.5, 2.0), Outcome(request(1, 1.5, 8), 2, 3.0)], 2, 1),
        Served([Outcome(request(2, 0.0, 4), 0.5, 3.0)], 1, 1),
    ]
    both = merged(rounds)
    found = summary(both, behind={2})

    assert [outcome.latency for outcome in both.outcomes] == [1.0, 1.5, 3.0]
    assert span(both) == 5.0
    assert (found["throughput"], found["device_seconds"], found["overhead"]) == (0.6, 1.0, 0.5)
    assert (found["behind_p95"], found["p99"], found["busy_share"]) == (3.0, 3.0, 0.6)
