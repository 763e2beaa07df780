"""Text for a terminal."""

import pytest

from pipelines.reporting.text import format_duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (3599, "59 min 59 s"),
        (3600, "1 h 0 min"),
        (93_900, "26 h 5 min"),
    ],
)
def test_format_duration_uses_two_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
