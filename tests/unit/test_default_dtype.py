"""While a network is created in another number format, other threads wait with their steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers
import pytest
import torch
import transformers
from transformers import CLIPTextConfig, CLIPTextModel

from img2img_server.default_dtype import DEFAULT_DTYPE
from img2img_server.engine.diffusers.families.sd import StableDiffusion
from img2img_server.engine.diffusers.parts import guarded
from img2img_server.engine.diffusers.schedules import Schedules
from img2img_server.engine.family import ModelError
from img2img_server.engine.load import on_own_thread

SECONDS = 30.0


class Creation:
    """A network that is being created in bfloat16 on a thread of its own, until `end`."""

    def __init__(self, thread: ThreadPoolExecutor) -> None:
        self._began, self._may_end = threading.Event(), threading.Event()
        self._done = thread.submit(self._create)
        assert self._began.wait(SECONDS)

    def _create(self) -> None:
        with transformers.modeling_utils.local_torch_dtype(torch.bfloat16):
            self._began.set()
            assert self._may_end.wait(SECONDS)

    def end(self) -> None:
        self._may_end.set()
        self._done.result(SECONDS)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def test_a_step_waits_while_a_network_is_created(threads: ThreadPoolExecutor) -> None:
    creation = Creation(threads)
    entered = threading.Event()

    def step() -> torch.dtype:
        with DEFAULT_DTYPE.normal():
            entered.set()
            return torch.tensor(7.3).dtype

    result = threads.submit(step)
    try:
        assert not entered.wait(0.2)
    finally:
        creation.end()
    assert result.result(SECONDS) == torch.float32


def test_a_schedule_is_derived_in_float32_while_a_network_is_created(
    threads: ThreadPoolExecutor,
) -> None:
    config = {"beta_schedule": "scaled_linear"}

    def derive() -> object:
        return Schedules(StableDiffusion(), config).get("dpmpp_2m_sde", 12, 0.5, 64, 64)

    wanted = derive()
    creation = Creation(threads)
    result = threads.submit(derive)
    threading.Timer(0.3, creation.end).start()
    assert result.result(SECONDS) == wanted


def test_a_network_is_created_after_the_running_steps_and_before_later_ones(
    threads: ThreadPoolExecutor,
) -> None:
    seen: list[str] = []
    waits = threading.Event()

    def create() -> None:
        waits.set()
        with transformers.modeling_utils.local_torch_dtype(torch.float16):
            seen.append("created")

    with DEFAULT_DTYPE.normal():
        creation = threads.submit(create)
        assert waits.wait(SECONDS)
        with pytest.raises(TimeoutError):
            creation.result(0.2)
        with DEFAULT_DTYPE.normal():  # A nested body does not wait.
            assert torch.get_default_dtype() == torch.float32
        seen.append("step")
    with DEFAULT_DTYPE.normal():
        seen.append("next step")
    creation.result(SECONDS)
    assert seen == ["step", "created", "next step"]


def fail_within(dtype: torch.dtype) -> None:
    diffusers.ModelMixin._set_default_torch_dtype(dtype)  # It restores nothing after an error.
    raise KeyError("a file lacks an entry")


def test_a_load_that_fails_restores_the_default(threads: ThreadPoolExecutor) -> None:
    with pytest.raises(ModelError):
        threads.submit(guarded, "a folder", fail_within, torch.float16).result(SECONDS)
    with pytest.raises(KeyError):
        on_own_thread(lambda: fail_within(torch.bfloat16))
    with DEFAULT_DTYPE.normal():
        assert torch.get_default_dtype() == torch.float32


def test_networks_are_still_created_in_their_format() -> None:
    config = CLIPTextConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    create: Any = CLIPTextModel._from_config
    assert create(config, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32
