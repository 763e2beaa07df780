"""Durations, points in time and rates as people type them."""

from datetime import UTC, datetime, timedelta

import pytest

from pipelines.cli.times import parse_duration, parse_rate, parse_time
from services.core.errors import ConfigurationError

NOW = datetime(2026, 11, 21, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *(("30s", 30), ("5m", 300), ("5min", 300), ("1.5h", 5400), ("1h30m", 5400), ("45", 45), ("2w", 1_209_600)),
        # Spellings that `sluice plan --objective` has accepted since 0.1.0.
        *(("1e3s", 1000), (".5h", 1800), ("+5m", 300), ("5 m", 300), ("1_000s", 1000), ("1e3", 1000), (" 5m ", 300)),
    ],
)
def test_parse_duration_valid_text_gives_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "5x", "0s", "0", "-5m", "nan", "inf", "nan s", "1e308d", "5m 3"])
def test_parse_duration_other_text_is_rejected(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90s", NOW - timedelta(seconds=90)),
        ("1h30m", NOW - timedelta(minutes=90)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("2w", NOW - timedelta(weeks=2)),
        ("0s", NOW),
        ("2026-11-20", NOW - timedelta(hours=34)),
        ("2026-11-21T11:00:00+01:00", NOW),
        ("2026-11-21T10:00:00Z", NOW),
    ],
)
def test_parse_time_valid_text_gives_the_time(text: str, expected: datetime) -> None:
    assert parse_time(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "soon", "5", "h", "-2h", "999999999w", "2026-13-01", "0001-01-01T00:00:00+23:00"])
def test_parse_time_other_text_is_rejected(text: str) -> None:
    with pytest.raises(ConfigurationError, match="neither a duration"):
        parse_time(text, NOW)


@pytest.mark.parametrize(
    ("text", "per_s"), [("400/s", 400), ("400", 400), ("24000/min", 400), ("1e6/h", 1e6 / 3600), ("86400/day", 1)]
)
def test_rate_with_a_unit_is_parsed(text: str, per_s: float) -> None:
    assert parse_rate(text) == pytest.approx(per_s)


@pytest.mark.parametrize("text", ["", "x/s", "-1/s", "0", "nan", "4/fortnight", "inf/s"])
def test_invalid_rate_is_rejected(text: str) -> None:
    with pytest.raises(ConfigurationError):
        parse_rate(text)
