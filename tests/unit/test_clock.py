"""The clock that follows that of NATS, and the reports of clocks that differ."""

from __future__ import annotations

import logging

import pytest
from prometheus_client import REGISTRY

from img2img_server.clock import Clock, SkewReport
from img2img_server.storage.s3_faults import clock_skew

HOUR = 3600.0


class Times:
    """Settable times. `wall`: Unix seconds of this machine, `real`: those of NATS."""

    def __init__(self, skew: float) -> None:
        self.monotonic, self.real, self.skew = 50.0, 1_800_000_000.0, skew

    def pass_(self, seconds: float) -> None:
        self.monotonic += seconds
        self.real += seconds

    def clock(self) -> Clock:
        return Clock(lambda: self.real + self.skew, lambda: self.monotonic)


@pytest.mark.parametrize("skew", [HOUR, -HOUR, 0.0])
def test_the_clock_follows_the_other_one_and_reports_the_difference(
    skew: float, caplog: pytest.LogCaptureFixture
) -> None:
    times = Times(skew)
    clock = times.clock()
    assert clock.now() == times.real + skew
    asked = times.monotonic
    times.pass_(0.004)
    clock.observe(times.real, asked, times.monotonic)
    assert clock.now() == pytest.approx(times.real, abs=0.004)
    times.pass_(600.0)
    assert clock.now() == pytest.approx(times.real, abs=0.004)
    assert clock.skew.seconds == pytest.approx(skew, abs=0.004)
    words = {HOUR: "3600.0 s ahead of that of NATS", -HOUR: "3600.0 s behind that of NATS"}
    assert words.get(skew, "") in caplog.text
    assert bool(caplog.text) is bool(skew)
    metric = REGISTRY.get_sample_value("img2img_clock_skew_seconds", {"against": "NATS"})
    assert metric == clock.skew.seconds


def test_a_possible_time_does_not_change_the_clock() -> None:
    times = Times(0.001)
    clock = times.clock()
    before = clock.now()
    clock.observe(times.real, times.monotonic - 0.5, times.monotonic + 0.5)
    assert clock.now() == before


def test_steps_of_the_local_clock_do_not_change_the_time() -> None:
    times = Times(0.0)
    clock = times.clock()
    clock.observe(times.real, times.monotonic, times.monotonic)
    times.skew = -HOUR
    assert clock.now() == times.real


def test_a_difference_is_logged_once_and_its_end_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    report = SkewReport("the object store", "It refuses requests.")
    for seconds in (0.4, 900.0, 900.2, 900.1):
        report.note(seconds)
    assert caplog.messages == [
        "clock_skew: the clock of this machine is 900.0 s ahead of that of the object store; "
        "synchronise it (NTP). It refuses requests."
    ]
    report.note(0.1)
    assert caplog.messages[1:] == [
        "clock_skew_ended: the clock agrees with that of the object store"
    ]


@pytest.mark.parametrize("headers", [{}, {"date": "yesterday"}])
def test_a_response_without_a_date_says_nothing_about_clocks(headers: dict[str, str]) -> None:
    assert clock_skew(headers) is None
