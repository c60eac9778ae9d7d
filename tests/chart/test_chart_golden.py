"""The whole rendered chart of each value set. `make gold` rewrites the files."""

from __future__ import annotations

import pytest
import yaml

from tests.chart_render import SETS, render
from tests.golden_file import assert_golden


@pytest.mark.parametrize("name", SETS)
def test_the_golden_render_of_a_value_set(name: str) -> None:
    text = yaml.safe_dump_all(render(name), sort_keys=True, width=100, allow_unicode=True)
    assert_golden(f"chart/{name}.yaml", text)


def test_there_are_the_eight_value_sets() -> None:
    assert [
        *("default", "everything", "gateway-only", "identity", "platform", "production"),
        *("quickstart", "two-pools"),
    ] == SETS
