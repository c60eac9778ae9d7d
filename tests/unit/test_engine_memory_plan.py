"""Limits batches by measured peaks of memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from img2img_server.engine.memory import MemoryModel, NoProbe
from img2img_server.engine.turns import DeviceTurns

GIB = 2**30


class Device:
    """A device with 10 GiB of free memory, on which a forward at 512x512 needs 1 GiB."""

    free: int | None = 10 * GIB

    def __init__(self) -> None:
        self.next_peak = 0

    def start(self) -> None:
        """Does nothing."""

    def peak(self) -> int:
        return self.next_peak


def ran(memory: MemoryModel, device: Device, side: int, forwards: int, peak: int) -> None:
    device.next_peak = peak
    with memory.measured(side, side, forwards):
        pass


@pytest.fixture
def device() -> Device:
    return Device()


def test_what_ran_needs_what_was_measured_and_the_rest_its_proportion(device: Device) -> None:
    memory = MemoryModel(device)
    ran(memory, device, 512, 1, GIB + 5)
    ran(memory, device, 512, 4, 4 * GIB)

    assert memory.need(512, 512, 1) == GIB + 5
    assert memory.need(512, 512, 2) == 2 * GIB
    assert memory.need(1024, 1024, 1) == 4 * GIB


def test_the_largest_peak_of_a_shape_counts(device: Device) -> None:
    memory = MemoryModel(device)
    for peak in (3 * GIB, GIB):
        ran(memory, device, 512, 1, peak)

    assert memory.need(512, 512, 1) == 3 * GIB


def test_a_batch_is_as_large_as_fits_what_is_free(device: Device) -> None:
    memory = MemoryModel(device)
    ran(memory, device, 512, 1, GIB)

    assert memory.max_forwards(512, 512, 16) == 9
    assert memory.max_forwards(512, 512, 4) == 4
    assert memory.max_forwards(2048, 2048, 16) == 1


def test_a_batch_that_is_filled_up_is_held_against_what_it_is_filled_up_to(device: Device) -> None:
    memory = MemoryModel(device)
    ran(memory, device, 512, 1, GIB)

    assert memory.max_forwards(512, 512, 12, lambda forwards: 8 if forwards <= 8 else 16) == 8


def test_what_can_never_fit_lacks_its_need(device: Device) -> None:
    memory = MemoryModel(device)
    ran(memory, device, 512, 1, GIB)

    assert memory.shortfall(512, 512, 2) is None
    assert memory.shortfall(2048, 2048, 1) == 16 * GIB


def test_a_job_waits_for_the_step_of_another_model_before_it_is_refused(device: Device) -> None:
    turns = DeviceTurns()
    memory = MemoryModel(device, turns=turns)
    ran(memory, device, 512, 1, GIB)
    with ThreadPoolExecutor(1) as thread:
        with turns.turn():
            device.free = 0
            waiting = thread.submit(memory.lasting_shortfall, 512, 512, 1)
            with pytest.raises(TimeoutError):
                waiting.result(0.2)
            device.free = 10 * GIB
        assert waiting.result(30) is None
    assert memory.lasting_shortfall(2048, 2048, 1) == 16 * GIB


def test_no_job_is_refused_while_another_model_is_loaded(device: Device) -> None:
    turns = DeviceTurns()
    memory = MemoryModel(device, turns=turns)
    ran(memory, device, 512, 1, GIB)
    with turns.loading():
        assert memory.lasting_shortfall(2048, 2048, 1) is None
    assert memory.lasting_shortfall(2048, 2048, 1) == 16 * GIB


def test_a_limit_is_held_where_more_is_free(device: Device) -> None:
    memory = MemoryModel(device, limit_bytes=3 * GIB)
    ran(memory, device, 512, 1, GIB)

    assert memory.max_forwards(512, 512, 16) == 3


def test_nothing_is_refused_before_anything_was_measured(device: Device) -> None:
    memory = MemoryModel(device)

    assert memory.shortfall(4096, 4096, 8) is None
    assert memory.max_forwards(4096, 4096, 8) == 8


def test_work_that_failed_is_not_noted(device: Device) -> None:
    memory = MemoryModel(device)
    device.next_peak = GIB
    with pytest.raises(MemoryError), memory.measured(512, 512, 8):
        raise MemoryError

    assert memory.need(512, 512, 8) is None


def test_without_a_meter_everything_is_let_in() -> None:
    memory = MemoryModel(NoProbe())
    with memory.measured(512, 512, 1):
        pass

    assert memory.shortfall(8192, 8192, 8) is None
