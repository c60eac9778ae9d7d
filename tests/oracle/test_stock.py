"""Our images are equal to those of the stock pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from img2img_server.engine.base import Engine
from img2img_server.engine.diffusers.families import families as served
from tests.engine_bench import BOUND, Stock, difference, images, load, run, running
from tests.oracle.harness import RUNS, Case, cases, covering, families, models

SCHEDULERS = {family.name: family.schedulers for family in served()}
CASES: dict[tuple[str, str], list[Case]] = {}
for _family in families():
    for _case in cases(_family, SCHEDULERS[_family]):
        CASES.setdefault((_case.model, _case.scheduler), []).append(_case)


@pytest.fixture(scope="module", params=models())
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models()[model].write(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def stock(model: str, folder: Path) -> Stock:
    return Stock(folder, models()[model].call)


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[Engine]:
    with running(load(folder)) as opened:
        yield opened


@pytest.mark.parametrize(("model", "scheduler"), list(CASES), indirect=["model"], scope="module")
def test_an_image_is_the_stock_pipelines_image(
    model: str, engine: Engine, stock: Stock, scheduler: str
) -> None:
    found = {}
    for case in CASES[model, scheduler]:
        wanted = case.job()
        pairs = zip(images(run(engine, wanted)), stock.images(wanted), strict=True)
        found[case] = max(difference(ours, theirs) for ours, theirs in pairs)

    assert {case: worst for case, worst in found.items() if worst > BOUND} == {}


def test_the_oracle_would_notice_another_prompt_seed_or_guidance(
    model: str, engine: Engine, stock: Stock
) -> None:
    *_, scale = models()[model].guidance_scales
    case = next(case for (name, _), found in CASES.items() if name == model for case in found)
    base = {"strength": 0.9, "num_inference_steps": 4, "guidance_scale": scale, "seeds": (5,)}
    (theirs,) = stock.images(case.job(**base))

    others = [{"prompt": "a horse"}, {"seeds": (6,)}]
    if len(set(models()[model].guidance_scales)) > 1:
        others.append({"guidance_scale": 2 * scale})
    for changes in others:
        (ours,) = images(run(engine, case.job(**{**base, **changes})))
        assert difference(ours, theirs) > BOUND, changes


def test_the_covering_set_has_each_pair_of_values() -> None:
    dimensions = ["abcdefg", RUNS, (1, 2, 3), (True, False)]
    rows = list(covering(dimensions))

    for i, one in enumerate(dimensions):
        for j, other in enumerate(dimensions[:i]):
            assert {(row[i], row[j]) for row in rows} == {(a, b) for a in one for b in other}
    assert len(rows) < 1.3 * len(dimensions[0]) * len(dimensions[1])
