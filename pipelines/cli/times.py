"""Parses durations, points in time and rates on the command line."""

import math
import re
from datetime import UTC, datetime, timedelta
from typing import Final

from services.core.errors import ConfigurationError

_SECONDS_PER_UNIT: Final = {"s": 1, "m": 60, "min": 60, "h": 3_600, "d": 86_400, "day": 86_400, "w": 604_800}
_PART: Final = r"(\d{1,9}(?:\.\d{1,9})?)(s|min|m|h|day|d|w)"
_DURATION: Final = re.compile(f"(?:{_PART})+")
_NUMBER_WITH_UNIT: Final = re.compile(r"(.*?)([a-z]*)")


def parse_duration(text: str) -> float:
    """Return the seconds of `90s`, `15m`, `1h30m`, `1.5h`, `7d` or `2w`. A number without a unit is in seconds.

    A single number may have any form that Python's `float` accepts, such as `1e3s`, `.5h` or `1_000s`.

    Raises:
        ConfigurationError: the text has another form, or the duration is not more than 0.
    """
    seconds = _parse_units(text.strip())
    if seconds is None:
        seconds = _parse_number(text.strip())
    if not 0 < seconds < math.inf:
        raise ConfigurationError(f"{text!r} is not a duration; write one such as 30s, 5m or 1h30m")
    return seconds


def parse_time(text: str, now: datetime) -> datetime:
    """The time that `text` names: a duration with units before `now`, or an ISO 8601 time (UTC unless it has a zone).

    Raises:
        ConfigurationError: the text is neither.
    """
    try:
        seconds = _parse_units(text)
        if seconds is not None:
            return now - timedelta(seconds=seconds)
        parsed = datetime.fromisoformat(text)
        return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigurationError(
            f"{text!r} is neither a duration, such as 90s, 15m, 2h or 7d, nor a time, such as 2026-11-21T10:00:00Z"
        ) from None


def parse_rate(text: str) -> float:
    """Return the submissions a second of `400/s`, `24000/min`, `1e6/h`, `10000000/day`, or `400` for `400/s`.

    Raises:
        ConfigurationError: the text is no such rate.
    """
    number, _, unit = text.partition("/")
    try:
        count = float(number)
    except ValueError:
        count = math.nan
    if not 0 < count < math.inf:
        raise ConfigurationError(f"{text!r} is not a rate; write one such as 400/s or 1000000/h")
    if (unit or "s") not in _SECONDS_PER_UNIT:
        raise ConfigurationError(f"{text!r} has no unit of time; use one of {', '.join(_SECONDS_PER_UNIT)}")
    return count / _SECONDS_PER_UNIT[unit or "s"]


def _parse_units(text: str) -> float | None:
    """Seconds of numbers with units, such as `1h30m`; None if the text has another form."""
    if not _DURATION.fullmatch(text):
        return None
    return sum(float(number) * _SECONDS_PER_UNIT[unit] for number, unit in re.findall(_PART, text))


def _parse_number(text: str) -> float:
    """Seconds of one number with or without a unit; NaN if the text has another form."""
    found = _NUMBER_WITH_UNIT.fullmatch(text)
    if not found:
        return math.nan
    number, unit = found.groups()
    try:
        return float(number) * _SECONDS_PER_UNIT[unit or "s"]
    except (ValueError, KeyError):
        return math.nan
