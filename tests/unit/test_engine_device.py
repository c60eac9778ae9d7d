"""The GPU benchmark's report: what fails or does not fit the budget costs nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.engine_device import Report


def test_what_fails_or_does_not_fit_the_budget_is_noted_and_the_rest_goes_on(
    tmp_path: Path,
) -> None:
    output = tmp_path / "results" / "report.json"
    report = Report({"side": 64}, output, budget=60.0)

    def broken() -> None:
        raise RuntimeError("out of luck")

    report.part("toy", "first", 1.0, broken)
    report.part("toy", "second", 600.0, lambda: {"ms": 1})
    report.part("toy", "third", 1.0, lambda: {"ms": 2})

    found = json.loads(output.read_text(encoding="utf-8"))
    failed = found.pop("failed")
    assert found == {
        "side": 64,
        "results": {"toy": {"third": {"ms": 2}}},
        "left_out": ["toy: second"],
    }
    assert list(failed) == ["toy: first"]
    assert "out of luck" in failed["toy: first"]
