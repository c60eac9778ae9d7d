"""Which model a worker loads next, and which it unloads for it."""

from __future__ import annotations

from img2img_server.worker.model_plan import LoadedModel, Swap, WantedModel, choose_swap

NOW = 1000.0
SWAP_SECONDS = 30.0
ROOM = 10


def wanted(name: str, *, waits: float = 0.0, size: int = 4, is_served: bool = False) -> WantedModel:
    return WantedModel(name=name, size=size, since=NOW - waits, is_served=is_served)


def loaded(
    name: str, *, used: float = 0.0, loaded: float = 60.0, size: int = 4, busy: bool = False
) -> LoadedModel:
    return LoadedModel(
        name=name, size=size, used_at=NOW - used, loaded_at=NOW - loaded, is_busy=busy
    )


def chosen(models: list[WantedModel], there: list[LoadedModel]) -> Swap | None:
    used = sum(each.size for each in there)
    return choose_swap(
        models, there, lambda size, freed: used - freed + size <= ROOM, NOW, SWAP_SECONDS
    )


def test_a_model_that_fits_is_loaded_next_to_the_others() -> None:
    assert chosen([wanted("b")], [loaded("a", busy=True)]) == Swap("b")


def test_the_least_recently_used_idle_model_is_unloaded() -> None:
    there = [loaded("a", used=5), loaded("b", used=50)]
    assert chosen([wanted("c")], there) == Swap("c", ("b",))


def test_no_more_models_than_needed_are_unloaded() -> None:
    there = [loaded("a", used=50, size=1), loaded("b", used=5, size=8)]
    assert chosen([wanted("c", size=8)], there) == Swap("c", ("b",))


def test_a_model_with_jobs_stays_until_the_other_has_waited_for_the_bound() -> None:
    there = [loaded("a", busy=True), loaded("b", busy=True, loaded=40)]
    assert chosen([wanted("c", waits=29)], there) is None
    assert chosen([wanted("c", waits=30)], there) == Swap("c", ("a",))


def test_a_model_with_jobs_stays_for_the_bound_after_it_was_loaded() -> None:
    there = [loaded("a", busy=True, loaded=29, size=8)]
    assert chosen([wanted("c", waits=90)], there) is None


def test_idle_models_are_unloaded_before_those_with_jobs() -> None:
    there = [loaded("a", busy=True, loaded=90), loaded("b", used=2)]
    assert chosen([wanted("c", waits=90)], there) == Swap("c", ("b",))


def test_the_model_whose_jobs_wait_longest_is_loaded_first() -> None:
    there = [loaded("a", busy=True), loaded("b", busy=True)]
    models = [wanted("c", waits=40), wanted("d", waits=50)]
    assert chosen(models, there) == Swap("d", ("a",))


def test_a_model_that_fits_does_not_wait_for_one_that_does_not() -> None:
    there = [loaded("a", busy=True, size=5)]
    models = [wanted("c", waits=20, size=8), wanted("d", waits=1, size=5)]
    assert chosen(models, there) == Swap("d")


def test_a_model_that_another_worker_serves_takes_no_place_of_one_with_jobs() -> None:
    there = [loaded("a", busy=True, size=8)]
    assert chosen([wanted("c", waits=90, is_served=True)], there) is None
    idle = [loaded("a", used=5, size=8)]
    assert chosen([wanted("c", waits=29, is_served=True)], idle) is None
    assert chosen([wanted("c", waits=30, is_served=True)], idle) == Swap("c", ("a",))


def test_a_model_that_no_worker_serves_goes_before_one_that_another_worker_serves() -> None:
    models = [wanted("c", waits=90, is_served=True), wanted("d", waits=1)]
    assert chosen(models, []) == Swap("d")


def test_a_model_may_be_loaded_alone_whatever_its_size() -> None:
    assert chosen([wanted("c", size=99)], [loaded("a", used=5)]) == Swap("c", ("a",))
    assert chosen([wanted("c", size=99)], []) == Swap("c")
