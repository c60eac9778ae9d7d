"""Splits a batch until the failing items are alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from img2img_server.engine.isolation import bisect_failures, is_out_of_memory, needed_bytes


def test_work_that_succeeds_is_done_once_for_all() -> None:
    calls: list[Sequence[int]] = []

    assert bisect_failures([1, 2, 3], calls.append, lambda *_: None) == []
    assert calls == [[1, 2, 3]]


def test_only_the_culprits_fail_and_all_others_are_done_exactly_once() -> None:
    done: list[int] = []

    def work(items: Sequence[int]) -> None:
        if any(item % 10 == 7 for item in items):
            raise RuntimeError(f"{len(items)} items")
        done.extend(items)

    failed = bisect_failures(range(30), work, lambda *_: None)

    assert [(item, str(error)) for item, error in failed] == [
        (7, "1 items"),
        (17, "1 items"),
        (27, "1 items"),
    ]
    assert sorted([*done, 7, 17, 27]) == list(range(30))


def test_before_each_retry_it_tells_what_failed_together_and_why() -> None:
    reported: list[tuple[list[int], bool]] = []

    def work(items: Sequence[int]) -> None:
        if len(items) > 2:
            raise torch.OutOfMemoryError("out of memory")
        if 3 in items:
            raise RuntimeError("boom")

    failed = bisect_failures(
        [1, 2, 3, 4], work, lambda items, lacked: reported.append((list(items), lacked))
    )

    assert [item for item, _ in failed] == [3]
    assert reported == [([1, 2, 3, 4], True), ([3, 4], False)]


def test_nothing_to_do_is_not_tried() -> None:
    def work(items: Sequence[int]) -> None:
        raise AssertionError("called")

    assert bisect_failures([], work, lambda *_: None) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("boom"), False),
    ],
)
def test_errors_of_memory_are_reported_from_others(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("Tried to allocate 2.50 GiB. GPU 0 has", 5 * 2**29),
        ("you tried to allocate 1024 bytes. Error code 12", 1024),
        ("CUDA error", None),
    ],
)
def test_the_need_is_read_from_the_sentence(sentence: str, expected: int | None) -> None:
    assert needed_bytes(RuntimeError(sentence)) == expected
