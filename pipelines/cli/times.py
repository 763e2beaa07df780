"""Parse the durations and points in time that people type."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from services.core.errors import ConfigurationError

_SECONDS: Final = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "day": 86_400, "w": 604_800}
_PART: Final = r"(\d{1,9}(?:\.\d{1,9})?)(s|min|m|h|day|d|w)"
_DURATION: Final = re.compile(f"(?:{_PART})+")
_BARE_SECONDS: Final = re.compile(r"\d{1,9}(?:\.\d{1,9})?")


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `15m`, `1h30m`, `1.5h`, `7d` or `2w`; a bare number is seconds.

    Raises:
        ConfigurationError: it is none of these, or not more than 0.
    """
    text = text.strip()
    seconds = float(text) if _BARE_SECONDS.fullmatch(text) else _seconds(text)
    if not seconds:
        raise ConfigurationError(f"{text!r} is not a duration; write one such as 30s, 5m or 1h30m")
    return seconds


def parse_time(text: str, now: datetime) -> datetime:
    """A duration before `now` (as for `parse_duration`, with a unit), or an ISO 8601 time; UTC unless it names a zone.

    Raises:
        ConfigurationError: it is neither.
    """
    try:
        seconds = _seconds(text)
        if seconds is not None:
            return now - timedelta(seconds=seconds)
        parsed = datetime.fromisoformat(text)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"{text!r} is neither a duration, such as 90s, 15m, 2h or 7d, nor a time, such as 2026-11-21T10:00:00Z"
        ) from None


def _seconds(text: str) -> float | None:
    """Seconds of a duration with units; None where it is no such duration."""
    if not _DURATION.fullmatch(text):
        return None
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(_PART, text))
