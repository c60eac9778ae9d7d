"""Places for event streams: many streams of some tenants leave places for other tenants."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from img2img_server.api.places import StreamPlaces
from img2img_server.errors import TooManyWatchersError


def take_all(held: ExitStack, places: StreamPlaces, tenant: str, most: int = 10_000) -> int:
    """Takes places until one is refused; returns their number."""
    for taken in range(most):
        try:
            held.enter_context(places.taken(tenant))
        except TooManyWatchersError:
            return taken
    return most


def test_tenants_within_their_limits_leave_places_for_others() -> None:
    with ExitStack() as held:
        places = StreamPlaces(1000)
        assert [take_all(held, places, name, 500) for name in ("a", "b")] == [500, 500]
        with pytest.raises(TooManyWatchersError):
            held.enter_context(places.taken("a"))
        newcomers = [take_all(held, places, f"new-{number}") for number in range(20)]
        assert newcomers[0] > 20
        assert min(newcomers) >= 1
        assert sum(newcomers) <= 250


@pytest.mark.parametrize("most", [1, 2, 20])
def test_few_places_leave_one_for_a_new_tenant(most: int) -> None:
    with ExitStack() as held:
        places = StreamPlaces(most)
        assert take_all(held, places, "a") == most
        assert take_all(held, places, "b") == 1


def test_a_place_is_free_again_after_its_stream() -> None:
    places = StreamPlaces(1)
    for _ in range(3):
        with places.taken("a"), pytest.raises(TooManyWatchersError), places.taken("a"):
            pass
