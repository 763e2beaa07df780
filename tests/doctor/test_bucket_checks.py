"""The parts of the checks of S3 that need no server."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest

from pipelines.doctor.bucket_checks import CLOCK_LIMIT_S, check_clock, choose_known_key

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("keys", "chosen"),
    [
        ([], ""),
        (["policies/shop/versions/1.json"], "policies/shop/versions/1.json"),
        (["policies/shop/versions/1.json", "policies/shop/changes/1.json"], "policies/shop/changes/1.json"),
        (["policies/a/changes/1.json", "policies/default/changes/1.json"], "policies/default/changes/1.json"),
    ],
)
def test_object_that_most_roles_may_write_is_chosen(keys: list[str], chosen: str) -> None:
    assert choose_known_key(keys) == chosen


@pytest.mark.parametrize(
    ("seconds", "is_ok"), [(0, True), (CLOCK_LIMIT_S, True), (CLOCK_LIMIT_S + 1, False), (-CLOCK_LIMIT_S - 1, False)]
)
def test_clock_may_differ_a_little(seconds: float, is_ok: bool) -> None:
    date = format_datetime(NOW + timedelta(seconds=seconds), usegmt=True)

    assert check_clock(date, NOW).is_ok is is_ok


@pytest.mark.parametrize("date", ["", "yesterday"])
def test_store_that_sends_no_date_is_told(date: str) -> None:
    result = check_clock(date, NOW)

    assert result.is_ok
    assert "sends no date" in result.detail
