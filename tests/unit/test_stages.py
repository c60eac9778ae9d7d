"""The time of a job is split among its stages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img2img_server.domain.stages import STAGE_ORDER, Span, seconds_by_stage

MOMENTS = st.integers(0, 30)
SPANS = st.lists(st.builds(Span, st.sampled_from(STAGE_ORDER), MOMENTS, MOMENTS), max_size=12)


def test_stages_one_after_the_other_keep_their_times() -> None:
    spans = [Span("held", 1.0, 2.0), Span("encode", 2.0, 2.5), Span("denoise", 2.5, 6.0)]
    assert seconds_by_stage(spans) == {"held": 1.0, "encode": 0.5, "denoise": 3.5}


def test_a_moment_counts_for_the_stage_that_the_job_needs_first() -> None:
    spans = [
        Span("held", 0.0, 3.0),
        Span("prepare", 1.0, 2.0),
        Span("denoise", 3.0, 6.0),
        Span("upload", 5.0, 8.0),  # of the first sample
    ]
    assert seconds_by_stage(spans) == {"held": 2.0, "prepare": 1.0, "denoise": 3.0, "upload": 2.0}


@given(SPANS)
def test_each_moment_counts_once(spans: list[Span]) -> None:
    covered = {moment for span in spans for moment in range(int(span.began), int(span.ended))}
    assert sum(seconds_by_stage(spans).values()) == pytest.approx(len(covered))
