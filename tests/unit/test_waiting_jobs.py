"""The reason why a job waits for a worker."""

from __future__ import annotations

from dataclasses import replace

from img2img_server.api.waiting_jobs import unserved_warning
from img2img_server.domain.models import ModelState, WorkerInfo
from img2img_server.testing.fake_engine import FAKE_MODEL

END = 1_796_000_000.0
LIMIT = "until 2026-11-30 00:53 UTC at most."


def worker(name: str, model: str = "a", failure: str = "") -> WorkerInfo:
    state = ModelState.FAILED if failure else ModelState.COLD
    info = replace(FAKE_MODEL, name=model)
    return WorkerInfo(name=name, model=info, device="cpu", model_state=state, failure=failure)


def test_a_model_that_one_worker_serves_has_no_warning() -> None:
    assert unserved_warning("a", [worker("w1"), worker("w2", failure="it is damaged")], END) == ""


def test_a_model_that_no_worker_announces_is_not_served() -> None:
    expected = f"No worker serves the model a now. The job waits until one does, {LIMIT}"
    assert unserved_warning("a", [worker("w1", "b", "it is damaged")], END) == expected
    draining = replace(worker("w1"), draining=True)
    assert unserved_warning("a", [draining], END) == expected


def test_the_reasons_of_workers_stay_with_the_operator() -> None:
    workers = [worker("w1", failure="/models/a has no vae"), worker("w2", failure="no file")]
    expected = (
        "No worker can load the model a now; Model.load_failures says why. "
        f"The job waits until one can, {LIMIT}"
    )
    assert unserved_warning("a", workers, END) == expected
