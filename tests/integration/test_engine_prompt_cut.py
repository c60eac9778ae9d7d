"""If a text encoder truncates a prompt, the job has a warning with the correct words."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from img2img_server.engine.base import JobDone
from img2img_server.engine.load import load_engine
from img2img_server.engine.options import EngineOptions
from img2img_server.settings import Settings
from tests.engine_bench import blocks, images, job, load, run, running
from tests.oracle.harness import models
from tests.tiny_models import write_sd, write_sdxl


def kept_text(prompt: str, warning: str) -> str:
    """Returns the part of the prompt before the words that the warning names."""
    match = re.search(r"the words from '(.*?)…?' on have no effect\.$", warning)
    assert match, warning
    return prompt[: prompt.index(match[1])]


@pytest.mark.parametrize("write", [write_sd, write_sdxl], ids=["one encoder", "two encoders"])
def test_the_words_that_are_named_change_nothing(write: object, tmp_path: Path) -> None:
    with running(load(write(tmp_path))) as engine:  # type: ignore[operator]
        prompt = " ".join(f"boat{index}" for index in range(150))
        negative = prompt.replace("boat", "sea")
        events = run(engine, job(prompt=prompt, negative_prompt=negative, guidance_scale=3.0))
        done = events[-1]
        assert isinstance(done, JobDone)
        first, second = done.warnings
        assert re.match(r"The prompt was cut after 600 of \d{3} tokens; ", first)
        assert re.match(r"The negative prompt was cut after 600 of \d{3} tokens; ", second)
        other = job(
            job_id=2,
            prompt=kept_text(prompt, first) + "other words",
            negative_prompt=kept_text(negative, second) + "and others",
            guidance_scale=3.0,
        )
        again = run(engine, other)
        assert np.array_equal(images(events)[0], images(again)[0])
        short = run(engine, job(job_id=3, prompt="a boat", guidance_scale=3.0))[-1]
        assert isinstance(short, JobDone)
        assert short.warnings == ()


@pytest.mark.parametrize(
    ("model", "count"), [("sd3.5", 0), ("sd3 without t5", 1)], ids=["t5", "no t5"]
)
def test_a_prompt_that_only_t5_reads_whole_is_not_cut(
    model: str, count: int, tmp_path: Path
) -> None:
    folder = models()[model].write(tmp_path)
    wanted = job(
        prompt="sixteen letters a",
        scheduler="flow_match_euler",
        init_image=blocks(64, 80),
        num_inference_steps=4,
    )
    with running(load(folder)) as engine:
        done = run(engine, wanted)[-1]

    assert isinstance(done, JobDone)
    assert len(done.warnings) == count


def test_the_packaged_model_says_what_its_encoder_does_not_read() -> None:
    engine = load_engine(EngineOptions.of(Settings()))
    try:
        prompt = "an oil painting of a cat, " + "with many letters " * 100
        wanted = job(prompt=prompt, init_image=blocks(64, 64), num_inference_steps=2)
        done = run(engine, wanted)[-1]
        assert isinstance(done, JobDone)
        (warning,) = done.warnings
        found = re.fullmatch(
            r"The prompt was cut after 600 of (\d+) tokens; the words from '(.+)…' on have no "
            r"effect\.",
            warning,
        )
        assert found, warning
        assert int(found[1]) > 600
        assert found[2] in prompt
    finally:
        engine.stop()
