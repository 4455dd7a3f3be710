"""Numbers for people, and the lines and bars that show progress."""

import io

import pytest
from rich.console import Console

from polytope_hsae.progress import Ticker
from polytope_hsae.units import count, duration, rate, size


@pytest.mark.parametrize(
    "function, cases",
    [
        (size, {0: "0 bytes", 950: "950 bytes", 1_240_000: "1.2 MB", 999_600: "1.0 MB"}),
        (size, {64e9: "64 GB", 2.5e12: "2.5 TB"}),
        (duration, {0.04: "0.0 s", 3.24: "3.2 s", 9.96: "10 s", 59.6: "1.0 minutes", 366: "6.1 minutes"}),
        (duration, {3571: "1.0 hours", 9000: "2.5 hours", 47 * 3600: "47 hours", 48 * 3600: "2.0 days"}),
        (count, {0: "0", 39_819: "39,819", 999_499: "999,499", 999_500: "1.0 M"}),
        (count, {1_240_000: "1.2 M", 64_000_000: "64 M", 999_499_999: "999 M", 3_400_000_000: "3.4 billion"}),
        (rate, {9812: "9,800/s", 999.6: "1,000/s", 45.2: "45/s", 3.2: "3.2/s", 0.5: "30/min", 1 / 3600: "1.0/h"}),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(function, cases):
    assert {number: function(number) for number in cases} == cases


def ticked(calls: list[tuple[float, int, int]], **console) -> list[str]:
    """What a ticker that was made at time 0 prints for calls of (time, done, total)."""
    out, times = io.StringIO(), iter([0.0, *(time for time, _, _ in calls)])
    ticker = Ticker(Console(file=out, width=100, **console), "harvest", "rows", clock=lambda: next(times))
    for _, done, total in calls:
        ticker(done, total)
    return out.getvalue().splitlines()


def test_a_line_every_tenth_has_rate_and_time_left():
    lines = ticked([(10 + step, 1000 * step, 10_000) for step in range(1, 11)])
    assert lines == [
        *(f"  harvest: {n},000 of 10,000 rows, 1,000/s, {10 - n}.0 s left" for n in range(2, 10)),
        "  harvest: 10,000 of 10,000 rows, 1,000/s, took 20 s",
    ]


def test_a_resumed_step_counts_from_where_it_began():
    assert ticked([(1, 520, 1000), (11, 620, 1000)]) == ["  harvest: 620 of 1,000 rows, 10/s, 38 s left"]
