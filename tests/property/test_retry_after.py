"""Every Retry-After header has a number of seconds."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import format_datetime

from hypothesis import example, given
from hypothesis import strategies as st

from img2img_server.outbound.retry_after import seconds_of

NOW = 1_000_000_000.0
DATES = ("1", "01", "31", "Jan", "Feb", "Mon,", "2020", "9999", "0001", "70", "99999999999")
TIMES = ("00:00:00", "23:59:60", "0:0", "1:2:3:4", "+0000", "-0000", "+2360", "GMT", "EST")
ODD = ("+99999999999999999999", "-", "+", ":", ",", "(", "\0", "\udcff", "²", "1e9", "inf", "nan")
PARTS = st.sampled_from((*DATES, *TIMES, *ODD))


@given(st.text() | st.lists(PARTS, max_size=9).map(" ".join))
@example("1 Jan 2020 00:00:00 +99999999999999999999")
@example("1 Jan 0001 00:00:00 -0000")
@example("9" * 5000)
def test_every_header_has_a_finite_number_of_seconds(header: str) -> None:
    seconds = seconds_of(header, NOW)
    assert seconds >= 0
    assert math.isfinite(seconds)


@given(st.datetimes(datetime(2002, 1, 1), datetime(9999, 1, 1)), st.booleans())
def test_a_date_is_read_in_its_zone_and_without_a_zone_as_utc(date: datetime, zone: bool) -> None:
    date = date.replace(microsecond=0)
    header = format_datetime(date.replace(tzinfo=UTC) if zone else date)  # "+0000" or "-0000"
    assert seconds_of(header, NOW) == date.replace(tzinfo=UTC).timestamp() - NOW
