"""Records of the model libraries: those on which an operator cannot act are not written."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers
from transformers import CLIPTextConfig

from img2img_server.engine.base import JobDone
from img2img_server.telemetry import log_handler
from tests.engine_bench import blocks, job, load, run, running
from tests.oracle.harness import models
from tests.tiny_models import write_sd, write_sdxl

LONG = "a boat on the sea " * 40


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """Writes the records of the libraries to this text, as a role does in JSON."""
    for library in ("diffusers", "transformers"):
        logger = logging.getLogger(library)
        monkeypatch.setattr(logger, "propagate", True)
        monkeypatch.setattr(logger, "handlers", [])
        monkeypatch.setattr(logger, "level", logger.level)
        logger.setLevel(logging.WARNING)  # also for loggers that asked before
    # The library writes some sentences once in the life of a process.
    logging.Logger.warning_once.cache_clear()  # type: ignore[attr-defined]
    stream = io.StringIO()
    handler = log_handler(stream, as_json=True)
    logging.root.addHandler(handler)
    logging.captureWarnings(True)
    yield stream
    logging.captureWarnings(False)
    logging.root.removeHandler(handler)


def events(written: io.StringIO) -> list[str]:
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    return [line["event"] for line in lines if line["level"] != "info"]


def test_an_image_processor_without_torchvision_writes_nothing(written: io.StringIO) -> None:
    vars(transformers).pop("CLIPImageProcessor", None)
    assert transformers.CLIPImageProcessor
    assert events(written) == []


def test_tokens_outside_the_vocabulary_of_a_configuration_write_nothing(
    written: io.StringIO,
) -> None:
    CLIPTextConfig(vocab_size=50, bos_token_id=49406, eos_token_id=49407)
    assert events(written) == []


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux dev", "sd3.5", "lumina 2", "kolors"])
def test_a_model_and_a_long_prompt_write_nothing(
    name: str, written: io.StringIO, tmp_path: Path
) -> None:
    write = {"sd": lambda folder: write_sd(folder, tiny_vae=True), "sdxl": write_sdxl}.get(name)
    model = (write or models()[name].write)(tmp_path / "model")
    written.truncate(0)  # of what the libraries say about the writing
    written.seek(0)
    scheduler = "ddim" if write or name == "kolors" else "flow_match_euler"
    wanted = job(
        prompt=LONG,
        negative_prompt=LONG,
        guidance_scale=4.0,
        scheduler=scheduler,
        init_image=blocks(64, 64),
    )
    with running(load(model)) as engine:
        assert isinstance(run(engine, wanted)[-1], JobDone)
    assert events(written) == []


def test_an_entry_of_a_configuration_that_is_ignored_is_written(
    written: io.StringIO, tmp_path: Path
) -> None:
    model = write_sd(tmp_path)
    load(model)  # The level of the library's logger is set when a model is loaded.
    file = model / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "made_up": 3}))
    load(model)
    assert [line for line in events(written) if "made_up" in line]
