"""Which model a request means."""

from __future__ import annotations

from dataclasses import replace

from img2img_server.api.model_names import default_model, full_name
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.testing.fake_engine import FAKE_MODEL

MODELS = [replace(FAKE_MODEL, name=name) for name in ("a/model", "b/model", "c/other", "plain")]


def worker(model: str, rank: int = 0, state: ModelState = ModelState.COLD) -> WorkerInfo:
    info = replace(FAKE_MODEL, name=model)
    return WorkerInfo(name=f"w/{model}", model=info, device="cpu", rank=rank, model_state=state)


def test_a_name_without_its_owner_means_the_only_model_that_has_it() -> None:
    assert full_name("other", MODELS) == "c/other"
    assert full_name("plain", MODELS) == "plain"
    assert full_name("a/model", MODELS) == "a/model"


def test_models_of_two_owners_are_not_mixed_up() -> None:
    assert full_name("model", MODELS) == "model"  # No model has this name, so it is refused.


def test_a_model_of_the_exact_name_comes_first() -> None:
    assert full_name("model", [*MODELS, replace(FAKE_MODEL, name="model")]) == "model"


def test_the_default_is_the_first_model_of_the_catalogue_also_while_it_is_cold() -> None:
    workers = [worker("a", 1, ModelState.LOADED), worker("z", 0)]
    assert default_model("", MODELS, workers) == "z"
    assert default_model("other", MODELS, workers) == "c/other"


def test_a_model_that_failed_is_no_default() -> None:
    workers = [worker("a", 0, ModelState.FAILED), worker("z", 1)]
    assert default_model("", MODELS, workers) == "z"


def test_without_workers_the_default_is_a_model_that_was_served_before() -> None:
    assert default_model("", MODELS, []) == "a/model"
    assert default_model("", [], []) == ""
